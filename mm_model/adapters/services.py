"""The local services under supervisord: start, stop, look.

infra/local/supervisord.conf says what runs. This module prepares what the programs need, starts
them in the order in which they need each other, waits until each answers, and ends all of it. Every
process below our supervisord carries MM_SERVICES=<project> in its environment: that is how what is
ours is found again even after supervisord itself was killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from supervisor.xmlrpc import Faults, SupervisorTransport

from mm_model.adapters.environment import (
    endpoint_tls,
    port,
    project_root,
    ray_temp_dir,
    service_environment,
    state_dir,
)
from mm_model.config import load_params
from mm_model.errors import ServiceError

WORK_POOL = "local"
RAY_CPUS = 6  # logical: 2 training workers, their driver, the endpoint's proxy and replicas
START_S = 300.0  # a busy small machine needs a third of that
STOP_S = 20.0
MARK = "MM_SERVICES"


@dataclass(frozen=True)
class Service:
    """A program of supervisord.conf.

    Attributes:
        name: its name there, in tables and in the name of its log.
        ports: keys of `environment.port`; the first is where it is looked at.
        answers: asks it whether it is ready.
        needs: services that must answer before it is started.
    """

    name: str
    ports: tuple[str, ...]
    answers: Callable[[], bool]
    needs: tuple[str, ...] = ()

    @property
    def url(self) -> str:
        return f"{_scheme(self.name)}://127.0.0.1:{port(self.ports[0])}" if self.ports else ""

    @property
    def log(self) -> Path:
        return state_dir() / "log" / f"{self.name}.log"


@dataclass(frozen=True)
class Status:
    """What `status` shows of one service; memory_mb is the proportional set size, all processes."""

    name: str
    state: str
    pid: int | None
    url: str
    memory_mb: float
    processes: int


def _scheme(service: str) -> str:
    return "https" if service == "endpoint" and endpoint_tls() else "http"


def _ok(service: str, path: str) -> bool:
    # Whether it is alive, on this machine: no secret is sent, and who signed does not matter.
    url = f"{_scheme(service)}://127.0.0.1:{port(service)}{path}"
    return httpx.get(url, timeout=5, verify=False).status_code == 200


def _ray_answers() -> bool:
    environment = service_environment()
    token = os.environ.get("RAY_AUTH_TOKEN") or Path(environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    answer = httpx.get(
        f"http://127.0.0.1:{port('ray_dashboard')}/nodes?view=summary",
        headers={"Authorization": f"Bearer {token}"},
        timeout=5,
    )
    return answer.status_code == 200 and '"ALIVE"' in answer.text


def _worker_answers() -> bool:
    answer = httpx.post(
        f"http://127.0.0.1:{port('prefect')}/api/work_pools/{WORK_POOL}/workers/filter",
        json={},
        timeout=5,
    )
    return answer.status_code == 200 and any(w["status"] == "ONLINE" for w in answer.json())


def _endpoint_answers() -> bool:
    prefix = load_params(project_root() / "params.yaml").serve.route_prefix.rstrip("/")
    return _ok("endpoint", f"{prefix}/healthz")


SERVICES = (
    Service("mlflow", ("mlflow",), lambda: _ok("mlflow", "/health")),
    Service("prefect", ("prefect",), lambda: _ok("prefect", "/api/health")),
    Service("ray", ("ray_dashboard", "ray", "ray_client"), _ray_answers),
    Service("prefect-worker", (), _worker_answers, needs=("prefect",)),
    Service("endpoint", ("endpoint",), _endpoint_answers, needs=("mlflow", "ray")),
)


def up(names: Sequence[str] = (), say: Callable[[str], None] = print) -> None:
    """Start what is not running, wait until all of it answers, deploy the flows.

    Args:
        names: services to start, with those they need; none means all.
        say: gets a line for each service that is ready.

    Raises:
        ServiceError: a port is taken, or a service does not come up; names the port or the log.
    """
    wanted = _with_needs(names or [s.name for s in SERVICES])
    with _lock():
        _prepare()
        if _supervisor_states() is None:
            _end(_ours())  # what a supervisord that was killed has left
            _check_ports(wanted)
            _start_supervisord()
        _start(wanted, say)
        if any(s.name == "prefect-worker" for s in wanted):
            _deploy_flows(say)


def down(say: Callable[[str], None] = print) -> None:
    """Stop everything in order; afterwards no process and no temporary folder of ours is left.

    Raises:
        ServiceError: a process does not end.
    """
    if not state_dir().exists():
        return
    with _lock():
        states = _supervisor_states()
        if states is not None:
            supervisor = _supervisor()
            for service in reversed(SERVICES):
                if states.get(service.name, ("STOPPED", 0))[0] != "STOPPED":
                    with contextlib.suppress(xmlrpc.client.Fault):  # it ended by itself
                        supervisor.stopProcess(service.name)
                    _end(_ours(service.name))
                    say(f"{service.name} stopped")
            daemon = supervisor.getPID()
            supervisor.shutdown()
            with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                psutil.Process(daemon).wait(STOP_S)
        _end(_ours())
        shutil.rmtree(ray_temp_dir(), ignore_errors=True)
    if left := _ours():
        raise ServiceError(
            "processes do not end",
            got=", ".join(str(p.pid) for p, _ in left),
            remedy="look at them with ps, then kill -9 them",
        )


def status(say: Callable[[str], None] = print) -> list[Status]:
    """Say and return what each service does."""
    rows = _statuses()
    say(f"{'service':15} {'state':9} {'pid':>8} {'MB':>6} {'processes':>9}  address")
    for r in rows:
        say(
            f"{r.name:15} {r.state:9} {r.pid or '-':>8} {r.memory_mb:6.0f} {r.processes:9}  {r.url}"
        )
    return rows


def _statuses() -> list[Status]:
    states = _supervisor_states()
    memory: dict[str, list[float]] = {}
    for process, name in _ours():
        with contextlib.suppress(psutil.Error):
            memory.setdefault(name, []).append(process.memory_full_info().pss / 2**20)
    rows = []
    for service in SERVICES:
        used = memory.get(service.name, [])
        state, pid = (states or {}).get(service.name, ("STOPPED", 0))
        if state == "RUNNING":
            state = "ready" if _answers(service) else "starting"
        elif states is None and used:
            state = "orphan"  # supervisord was killed: `mm up` or `mm down` ends these first
        rows.append(
            Status(service.name, state.lower(), pid or None, service.url, sum(used), len(used))
        )
    return rows


# ------------------------------------------------------------------------------------- starting


def _with_needs(names: Sequence[str]) -> list[Service]:
    by_name = {s.name: s for s in SERVICES}
    if unknown := [n for n in names if n not in by_name]:
        raise ServiceError("no such service", got=unknown, allowed=list(by_name))
    wanted = set(names) | {need for n in names for need in by_name[n].needs}
    return [s for s in SERVICES if s.name in wanted]


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """One `up` or `down` at a time."""
    state_dir().mkdir(parents=True, exist_ok=True)
    with (state_dir() / "services.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _prepare() -> None:
    for name in ("log", "mlartifacts", "prefect"):
        (state_dir() / name).mkdir(parents=True, exist_ok=True)
    run = ray_temp_dir()
    run.mkdir(mode=0o700, exist_ok=True)
    if run.is_symlink() or run.stat().st_uid != os.getuid():
        raise ServiceError(f"{run} belongs to someone else", remedy="have it removed")
    token = state_dir() / "ray_token"
    if not token.exists():
        descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))


def _check_ports(wanted: Sequence[Service]) -> None:
    for service in wanted:
        for key in service.ports:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port(key)))
                except OSError as error:
                    raise ServiceError(
                        f"port {port(key)} for {service.name} cannot be used",
                        got=error.strerror,
                        remedy=f"end what listens there, or set MM_{key.upper()}_PORT to another",
                    ) from None


def _start_supervisord() -> None:
    bin_dir = Path(sys.executable).parent
    environment = {
        **os.environ,
        **service_environment(),
        MARK: str(project_root()),
        "MM_STATE": str(state_dir()),
        "MM_RUN": str(ray_temp_dir()),
        "MM_PYTHON": sys.executable,
        "MM_RAY_CPUS": str(RAY_CPUS),
        **{f"MM_{k.upper()}_PORT": str(port(k)) for s in SERVICES for k in s.ports},
        # Stages are called `python …` in dvc.yaml: that has to be this environment's.
        "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    config = project_root() / "infra" / "local" / "supervisord.conf"
    made = subprocess.run(
        [sys.executable, "-m", "supervisor.supervisord", "-c", str(config)],
        env=environment,
        cwd=project_root(),
        capture_output=True,
        text=True,
    )
    deadline = time.monotonic() + STOP_S
    while _supervisor_states() is None:
        if made.returncode or time.monotonic() > deadline:
            raise ServiceError(
                "supervisord does not start", got=(made.stdout + made.stderr).strip()[-500:]
            )
        time.sleep(0.1)


def _start(wanted: Sequence[Service], say: Callable[[str], None]) -> None:
    """Start each as soon as what it needs is ready; they come up side by side."""
    supervisor = _supervisor()
    began = time.monotonic()
    ready: set[str] = set()
    told: set[str] = set()
    while len(ready) < len(wanted):
        states = _supervisor_states() or {}
        for service in wanted:
            if service.name in ready or not ready.issuperset(service.needs):
                continue
            state = states.get(service.name, ("STOPPED", 0))[0]
            if state not in ("RUNNING", "STARTING", "BACKOFF"):
                if service.name in told:
                    raise _failure(service, f"{service.name} ended while it started")
                told.add(service.name)
                try:
                    supervisor.startProcess(service.name, False)
                except xmlrpc.client.Fault as fault:
                    if fault.faultCode != Faults.ALREADY_STARTED:  # by supervisord, after a crash
                        raise
            elif state == "RUNNING" and _answers(service):
                ready.add(service.name)
                say(f"{service.name:15} ready  {time.monotonic() - began:4.0f} s  {service.url}")
            elif time.monotonic() - began > START_S:
                raise _failure(service, f"{service.name} does not answer after {START_S:.0f} s")
        time.sleep(0.3)


def _failure(service: Service, what: str) -> ServiceError:
    lines = service.log.read_text(errors="replace").splitlines() if service.log.exists() else []
    last = next((line for line in reversed(lines) if line.strip()), "nothing")
    return ServiceError(what, got=last[:300], remedy=f"read {service.log}")


def _deploy_flows(say: Callable[[str], None]) -> None:
    """Register prefect.yaml with the server when it or a flow has changed.

    Not every time: a schedule that someone has switched on would be paused again.
    """
    root = project_root()
    sources = [root / "prefect.yaml", *sorted((root / "flows").glob("*.py"))]
    wanted = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()
    record = state_dir() / "prefect" / "deployed"
    if record.exists() and record.read_text() == wanted:
        return
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
        cwd=root,
        env={**os.environ, **service_environment()},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ServiceError(
            "the flows cannot be deployed",
            got=(done.stdout + done.stderr).strip()[-500:],
            remedy="mend prefect.yaml or the flow, then `mm up` again",
        )
    record.write_text(wanted)
    say("flows deployed")


# -------------------------------------------------------------------------- looking and stopping


def _answers(service: Service) -> bool:
    try:
        return service.answers()
    except (httpx.HTTPError, OSError):
        return False


def _supervisor() -> Any:
    """The remote object of our supervisord; its methods raise OSError if it does not run."""
    transport = SupervisorTransport(None, None, f"unix://{ray_temp_dir()}/supervisor.sock")
    return xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor


def _supervisor_states() -> dict[str, tuple[str, int]] | None:
    """State and pid of each program; None if our supervisord does not run."""
    try:
        rows = _supervisor().getAllProcessInfo()
    except (OSError, xmlrpc.client.Error):
        return None
    return {row["name"]: (row["statename"], row["pid"]) for row in rows}


def _ours(name: str | None = None) -> list[tuple[psutil.Process, str]]:
    """Processes below our supervisord, now or once, each with its service.

    The caller and its parents are left out, so that a flow may call `up`.
    """
    kin = {os.getpid(), *(p.pid for p in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if environment.get(MARK) != str(project_root()) or process.pid in kin:
                continue
            service = environment.get("SUPERVISOR_PROCESS_NAME", "supervisord")
            if name in (None, service) and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process, service))
    return found


def _end(processes: Sequence[tuple[psutil.Process, str]]) -> None:
    """SIGTERM, then SIGKILL."""
    alive = [p for p, _ in processes]
    for signal_name in ("terminate", "kill"):
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, signal_name)()
        _, alive = psutil.wait_procs(alive, timeout=STOP_S / 2)
