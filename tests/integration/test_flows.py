"""The flows on a real Prefect server and worker, with a toy pipeline in a project of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from mm_model.adapters import services
from mm_model.adapters.environment import DEFAULT_PORTS, prefect_api_url
from mm_model.adapters.prefect_worker import FLOW_RUN

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/unit/data"))
from data_fixtures import PAIR  # noqa: E402

pytestmark = pytest.mark.integration

DVC = """
stages:
  prepare: {cmd: python prepare.py, params: [darkness], outs: [data/patches]}
  split:
    cmd: [echo $MM_FLOW_RUN_ID > split, python split.py]
    params: [seconds]
    deps: [data/patches]
    outs: [data/splits.parquet]
  catalogue: {cmd: mkdir -p data/catalogue; echo x > data/catalogue/map.png, always_changed: true}
  validate: {cmd: echo validated, always_changed: true}
  stats: {cmd: python stats.py, params: [seconds], outs: [data/stats.json]}
"""
PREPARE = """
import sys, yaml
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, "%s")
from data_fixtures import PAIR, place_patches
from mm_model.data.store import ShardWriter

darkness = yaml.safe_load(open("params.yaml"))["darkness"]
with ShardWriter(Path("data/patches"), PAIR, 8) as writer:
    for place in range(6):
        for patch in place_patches(place, PAIR, shape=(16, 24)):
            name = PAIR[0].name
            layer = patch.layers[name]
            layer = replace(layer, values=layer.values / darkness)
            writer.add(replace(patch, layers={**patch.layers, name: layer}))
""" % (ROOT / "tests/unit/data")
SPLIT = """
import pandas as pd
index = pd.read_parquet("data/patches/index.parquet")
index[["patch_id"]].drop_duplicates().to_parquet("data/splits.parquet")
"""
STATS = """
import json, subprocess, sys, yaml
from pathlib import Path
sys.path.insert(0, "%s")
from data_fixtures import PAIR
from mm_model.data.stats import compute_statistics
from mm_model.data.store import PatchStore

seconds = yaml.safe_load(open("params.yaml"))["seconds"]
if seconds < 0:
    sys.exit("error: patch 12 is broken; mend it")
child = subprocess.Popen(["sleep", str(seconds)])
open("pid", "w").write(str(child.pid))
child.wait()
store = PatchStore(Path("data/patches"))
statistics = compute_statistics(store, range(len(store)), PAIR)
Path("data/stats.json").write_text(json.dumps(statistics))
""" % (ROOT / "tests/unit/data")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("project")
    for name in ("flows", "infra/local"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prefect.yaml", root)
    (root / "data").mkdir()
    (root / "prepare.py").write_text(PREPARE)
    (root / "split.py").write_text(SPLIT)
    (root / "dvc.yaml").write_text(DVC)
    (root / "stats.py").write_text(STATS)
    (root / "params.yaml").write_text("{seconds: 0, darkness: 1}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MM_PROJECT", str(root))
        for name, number in zip(DEFAULT_PORTS, free_ports(len(DEFAULT_PORTS)), strict=True):
            patch.setenv(f"MM_{name.upper()}_PORT", str(number))
        url = (ROOT / "prefect.toml").read_text()
        (root / "prefect.toml").write_text(
            url.replace("http://127.0.0.1:4200/api", prefect_api_url())
        )
        subprocess.run(
            [sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=root, check=True
        )
        try:
            services.up(["prefect-worker"])
            yield root
        finally:
            services.down()


def api(path: str, body: object = None) -> Any:
    # SQLite may be locked for a moment: the server then says 503, and Prefect's own client tries
    # again as well.
    for _ in range(10):
        answer = httpx.request(
            "GET" if body is None else "POST", f"{prefect_api_url()}{path}", json=body, timeout=30
        )
        if answer.status_code != 503:
            break
        time.sleep(1)
    answer.raise_for_status()
    return answer.json()


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return found


def start(project: Path, seconds: float, darkness: float = 1) -> str:
    (project / "params.yaml").write_text(f"{{seconds: {seconds}, darkness: {darkness}}}")
    (project / "pid").unlink(missing_ok=True)
    deployment = api("/deployments/name/data-refresh/synthetic")["id"]
    return str(
        api(f"/deployments/{deployment}/create_flow_run", {"state": {"type": "SCHEDULED"}})["id"]
    )


def end_of(run: str) -> tuple[str, str]:
    def final() -> dict[str, Any] | None:
        found = api(f"/flow_runs/{run}")
        done = found["state_type"] in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED")
        return found if done else None

    state = wait_for(final)["state"]
    return state["type"], state["message"] or ""


def stage_process(project: Path) -> psutil.Process:
    """What a stage has started: the deepest process there is."""
    pid = wait_for(lambda: (project / "pid").exists() and (project / "pid").read_text())
    return psutil.Process(int(pid))


def processes_of(run: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(FLOW_RUN) == run and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_deployment_run_in_the_project_folder_needs_no_environment(project: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "MM_"))}
    command = ["deployment", "run", "data-refresh/synthetic", "--watch"]
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *command],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Completed" in done.stdout
    run = (project / "split").read_text().strip()
    assert api(f"/flow_runs/{run}")["name"] == "data-refresh of ."
    data = page("data")
    assert "Training split: 18 patches of 6 places." in data
    assert "data/catalogue/index.html" in data
    assert "![map](data:image/png;base64,eAo=)" in data
    assert "Drift was not judged: 18 new patches" in page("drift")


def page(key: str) -> str:
    return str(api("/artifacts/latest/filter", {"artifacts": {"key": {"any_": [key]}}})[0]["data"])


def warnings_of(run: str) -> list[str]:
    wanted = {"logs": {"flow_run_id": {"any_": [run]}, "level": {"ge_": 30}}}
    return [line["message"] for line in api("/logs/filter", wanted)]


def test_drift_of_what_came_in_is_loud_and_stops_nothing(project: Path) -> None:
    assert end_of(start(project, 0))[0] == "COMPLETED"
    calm = start(project, 0.05)
    assert end_of(calm)[0] == "COMPLETED"
    assert page("drift") == "**No drift: no patch is new.**"
    assert not warnings_of(calm)

    run = start(project, 0.05, darkness=3)
    assert end_of(run)[0] == "COMPLETED"
    name, *others = (m.name for m in PAIR)
    verdict, table = page("drift").split("\n\n")
    assert verdict.startswith(f"**DRIFT in 18 new patches: {name} ")
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert {(row[0], row[-1]) for row in rows} == {(name, "drifted"), (others[0], "alike")}
    assert verdict.strip("*") in page("data")
    wait_for(lambda: any(verdict.strip("*") in line for line in warnings_of(run)))

    assert end_of(start(project, 0.1, darkness=3))[0] == "COMPLETED"
    assert page("drift") == "**No drift: no patch is new.**"  # it is the training set now


def test_a_failing_stage_ends_the_flow_with_its_own_message(project: Path) -> None:
    kind, message = end_of(start(project, -1))
    assert kind == "FAILED"
    assert "patch 12 is broken; mend it" in message


def test_cancelling_leaves_no_process_and_the_flow_runs_again(project: Path) -> None:
    run = start(project, 300)
    child = stage_process(project)
    api(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    assert end_of(run)[0] == "CANCELLED"
    wait_for(lambda: not child.is_running())
    wait_for(lambda: not processes_of(run))
    assert end_of(start(project, 0.1))[0] == "COMPLETED"


def test_a_killed_flow_leaves_no_process_and_blocks_nobody(project: Path) -> None:
    run = start(project, 300)
    child = stage_process(project)
    guard = next(p for p in child.parents() if "dvc.py" in " ".join(p.cmdline()))
    flow = guard.parent()
    assert flow is not None
    flow.kill()
    wait_for(lambda: not child.is_running())
    wait_for(lambda: not processes_of(run))
    assert end_of(run)[0] == "CRASHED"
    assert end_of(start(project, 0.2))[0] == "COMPLETED"


def test_a_killed_worker_comes_back_and_closes_what_it_left(project: Path) -> None:
    run = start(project, 300)
    child = stage_process(project)
    worker = services._supervisor_states()["prefect-worker"][1]  # type: ignore[index]
    os.kill(worker, signal.SIGKILL)
    assert end_of(run)[0] == "CRASHED"
    wait_for(lambda: not child.is_running())
    assert end_of(start(project, 0.3))[0] == "COMPLETED"


def test_schedules_are_shown_but_paused(project: Path) -> None:
    found = {
        (api(f"/flows/{d['flow_id']}")["name"], d["name"]): [s["active"] for s in d["schedules"]]
        for d in api("/deployments/filter", {})
    }
    assert set(found) == {
        ("release", "synthetic"),
        ("release", "real"),
        ("data-refresh", "synthetic"),
        ("train-and-evaluate", "synthetic"),
        ("register-and-gate", "synthetic"),
        ("deploy", "synthetic"),
    }
    assert all(active == [False] for active in found.values())
