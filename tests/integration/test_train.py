"""The stage train with real Ray workers and a real MLflow server."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch
import yaml

from mm_model.adapters.mlflow_reporter import flush_backlog, read_journal
from mm_model.bundle import load_bundle

pytestmark = pytest.mark.integration
ROOT = Path(__file__).parents[2]
SIZE = {
    "encoder_width": 8,
    "decoder_width": 8,
    "dim": 16,
    "encoder_depth": 1,
    "flow_depth": 1,
    "decoder_depth": 1,
    "heads": 2,
    "scene_channels": 4,
}


def start(stage: str, folder: Path, **environment: str) -> subprocess.Popen:
    settings = {**os.environ, "MM_PROJECT": str(folder), "OMP_NUM_THREADS": "1", **environment}
    with (folder / f"{stage}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", f"mm_model.stages.{stage}"],
            cwd=folder,
            env=settings,
            stdout=log,
            stderr=log,
        )


def finish(process: subprocess.Popen, folder: Path, limit_s: float = 240) -> None:
    try:
        code = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert code == 0, "\n".join(f.read_text()[-2000:] for f in folder.glob("*.log"))


def prepare(folder: Path, **train: object) -> Path:
    """A pipeline folder whose data stand, for a model of a few thousand parameters."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["prepare"]["patch_px"] = 16
    params["prepare"]["synthetic"].update(places=4, patches_per_place=4, complete_share=0.5)
    params["split"]["margin_m"] = 0
    params["model"] = {"size": "least", "sizes": {"least": SIZE}}
    few = {"start": "scratch", "batch": 4, "checkpoint_every": 20, "precision": "fp32"}
    params["train"].update(few, **train)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    for stage in ("prepare", "split", "stats"):
        finish(start(stage, folder), folder)
    return folder


@pytest.fixture
def away(free_tcp_port_factory) -> dict[str, str]:
    """Addresses at which neither MLflow nor Ray answers."""
    return {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_tcp_port_factory()}",
        "RAY_ADDRESS": f"127.0.0.1:{free_tcp_port_factory()}",
    }


def reached(folder: Path) -> int:
    """The last step that the journal knows; 0 before the first."""
    journals = list(folder.glob("models/runs/*/journal.jsonl"))
    records = read_journal(journals[0].parent)[0] if journals else []
    return max((r["step"] for r in records if r["kind"] == "metrics"), default=0)


def wait_for(happened, limit_s: float, process: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        assert process is None or process.poll() is None, "the stage has ended"
        time.sleep(0.05)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_killed_worker_and_a_killed_driver_are_survived(tmp_path, away):
    steps = 600
    folder = prepare(tmp_path, steps=steps, workers=2, max_failures=1, picture_every=10**6)
    first = start("train", folder, **away)
    wait_for(lambda: reached(folder) >= 40, 180, first)
    everyone = family(first)
    (worker, *_) = [p for p in everyone if "RayTrainWorker" in " ".join(p.cmdline())]
    # Ray trains in a thread: it, and those that it starts, let replicas go first.
    levels = [os.getpriority(os.PRIO_PROCESS, thread.id) for thread in worker.threads()]
    assert levels.count(psutil.Process().nice() + 10) >= 1
    worker.kill()
    before = reached(folder)
    wait_for(lambda: reached(folder) >= before + 60, 180, first)

    everyone += family(first)
    first.kill()
    first.wait()
    workers = [p for p in alive(everyone) if "RayTrainWorker" in " ".join(p.cmdline())]
    wait_for(lambda: not alive(workers), 90)

    second = start("train", folder, **away)
    finish(second, folder)
    summary = json.loads((folder / "models/train.json").read_text())
    assert summary["steps"] == steps
    assert summary["samples"] == steps * 4
    assert summary["run_id"] is None
    records = read_journal(Path(summary["run_dir"]))[0]
    seen = [r["step"] for r in records if r["kind"] == "metrics"]
    assert seen == list(range(10, steps + 1, 10))
    bundle = load_bundle(folder / "models/bundle")
    assert bundle.manifest.bundle_id == summary["bundle_id"]
    assert bundle.manifest.provenance["training"]["steps"] == steps


def test_workers_begin_with_a_bundle_that_they_load_themselves(tmp_path, away):
    folder = prepare(tmp_path, steps=20, workers=0, picture_every=10**6)
    finish(start("train", folder, **away), folder)
    (folder / "models/bundle").rename(folder / "older")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["train"].update(start="older", workers=2, steps=2, learning_rate=1e-9)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    finish(start("train", folder, **away), folder)
    older, newer = (load_bundle(folder / name) for name in ("older", "models/bundle"))
    assert newer.manifest.provenance["start"]["bundle_id"] == older.manifest.bundle_id
    assert newer.manifest.effort["steps"] == 22
    tensors = newer.model.state_dict()
    for name, tensor in older.model.state_dict().items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=1e-6)


def test_mlflow_may_be_away_and_gets_everything_later(tmp_path, away, monkeypatch):
    folder = prepare(tmp_path, steps=30, workers=0, picture_every=20)
    finish(start("train", folder, **away), folder)
    summary = json.loads((folder / "models/train.json").read_text())
    run = Path(summary["run_dir"])
    assert summary["run_id"] is None

    url = away["MLFLOW_TRACKING_URI"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    server = [sys.executable, "-m", "mlflow", "server", "--port", url.rpartition(":")[2]]
    server += ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--workers", "1"]
    server += ["--artifacts-destination", str(tmp_path / "artifacts")]
    with (tmp_path / "mlflow.log").open("w") as log:
        mlflow_server = subprocess.Popen(
            server, stdout=log, stderr=log, cwd=tmp_path, start_new_session=True
        )
    try:

        def answers() -> bool:
            try:
                return httpx.get(f"{url}/health", timeout=1).status_code == 200
            except httpx.HTTPError:
                return False

        wait_for(answers, 90, mlflow_server)
        run_id = flush_backlog(run)
        assert run_id is not None
        assert flush_backlog(run) == run_id  # nothing is left, nothing is sent again
        (run / "journal.sent").write_text("0")
        assert flush_backlog(run) == run_id  # sent twice changes nothing
        check(url, run_id)
    finally:
        os.killpg(mlflow_server.pid, signal.SIGKILL)
        mlflow_server.wait()


def check(url: str, run_id: str) -> None:
    """What MLflow knows of the run of 30 steps."""
    from mlflow import MlflowClient

    client = MlflowClient(url)
    found = client.get_run(run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params["train.steps"] == "30"
    assert found.data.tags["data_source"] == "synthetic"
    history = client.get_metric_history(run_id, "loss")
    assert [m.step for m in history] == [10, 20, 30]
    assert {"loss_flow", "samples_per_s", "system/cpu_utilization_percentage"} <= set(
        found.data.metrics
    )
    sheets = [f.path for f in client.list_artifacts(run_id, "sheets")]
    assert sheets == ["sheets/step-0000020.png", "sheets/step-0000030.png"]
    assert len(client.search_runs([found.info.experiment_id])) == 1
