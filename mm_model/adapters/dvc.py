"""`dvc repro` as a child that cannot outlive its caller.

DVC leaves the running stage alive when it is ended itself. So DVC runs below a guard, this very
file as a script: the guard and all that it starts are one process group, and the guard ends that
group as soon as its standard input closes. The caller holds the other end: whether it is cancelled,
fails or is killed outright, the kernel closes the pipe and nothing is left behind.

Imports nothing but the standard library and this package's errors, since flows import it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mm_model.errors import StageError

GRACE_S = 8.0  # below the 30 s that Prefect waits before it kills a cancelled flow
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


def repro(
    pipeline_dir: Path,
    stages: Sequence[str],
    on_line: Callable[[str], None],
    *,
    force: bool = False,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Bring the named stages, and what they need, up to date.

    Args:
        pipeline_dir: the folder that holds params.yaml and dvc.yaml.
        stages: names of stages in dvc.yaml.
        on_line: called with each line that DVC or a stage prints, as it comes.
        force: run just these stages, even if nothing changed; what they need must be there.
        environment: variables for the stages, beside those of this process.

    Raises:
        StageError: a stage failed; the message is the stage's own last `error: …` line.
    """
    command = [
        sys.executable,
        "-m",
        "dvc",
        "repro",
        *(["--force", "--single-item"] if force else []),
        *stages,
    ]
    tail: deque[str] = deque(maxlen=200)
    # Stages are called `python …` in dvc.yaml: that has to be this environment's.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    # -P: this file's folder must not become importable, it would shadow dvc, mlflow and others.
    guard = subprocess.Popen(
        [sys.executable, "-P", __file__, *command],
        cwd=pipeline_dir,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PATH": path, **(environment or {})},
    )
    assert guard.stdin is not None
    assert guard.stdout is not None
    try:
        for raw in guard.stdout:
            # A progress bar redraws its line: what stands at the end is what a log needs.
            text = _ANSI.sub("", raw.decode(errors="replace")).rstrip()
            line = text.rsplit("\r", 1)[-1]
            if line:
                tail.append(line)
                on_line(line)
        code = guard.wait()
    finally:
        _end(guard)
    if code != 0:
        raise StageError(failure_message(tail, stages, code))


def failure_message(lines: Sequence[str], stages: Sequence[str], code: int) -> str:
    """What a person needs to read first: the last `error: …` line, else DVC's, else the last."""
    for prefix in ("error: ", "ERROR: "):
        found = [line for line in lines if line.startswith(prefix)]
        if found:
            return found[-1].removeprefix(prefix)
    last = lines[-1] if lines else "no output"
    return f"dvc repro {' '.join(stages)} ended with code {code}: {last}"


def _end(guard: subprocess.Popen[bytes]) -> None:
    """Close the pipe and wait until the group is gone; kill it if the guard does not."""
    assert guard.stdin is not None
    assert guard.stdout is not None
    guard.stdin.close()
    try:
        guard.wait(GRACE_S + 5)
    except subprocess.TimeoutExpired:
        os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()
    guard.stdout.close()


def _others() -> list[int]:
    """Living processes of the guard's group besides the guard."""
    group, me, found = os.getpgid(0), os.getpid(), []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == me:
            continue
        try:
            state, _, pgrp = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
        except (OSError, ValueError):
            continue  # it ended between the listing and the look
        if int(pgrp) == group and state != "Z":
            found.append(int(entry.name))
    return found


def _end_others(grace_s: float) -> None:
    """SIGTERM to everyone else in the group, SIGKILL to who is left after the grace."""
    deadline = time.monotonic() + grace_s
    told: set[int] = set()
    while alive := _others():
        late = time.monotonic() > deadline
        for pid in alive:
            if late or pid not in told:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
                told.add(pid)
        time.sleep(0.05)


def _guard(command: Sequence[str]) -> int:
    """Run a command; end it and its group when standard input closes or SIGTERM comes."""

    def stop(*_: object) -> None:
        _end_others(GRACE_S)
        os._exit(128 + signal.SIGTERM)

    def watch() -> None:
        os.read(0, 1)  # returns when nobody holds the other end any more
        stop()

    signal.signal(signal.SIGTERM, stop)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=watch, daemon=True).start()
    code = child.wait()
    _end_others(0.0)  # what a stage left in the background would hold the output open
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(_guard(sys.argv[1:]))
