"""The endpoint on a real Ray Serve, following the alias of a real MLflow."""

from __future__ import annotations

import datetime as dt
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import mlflow
import psutil
import pytest

from mm_model.adapters import mlflow_registry as registry
from mm_model.adapters.comparison import RUN_TAG
from mm_model.bundle import save_bundle
from mm_model.client import Client
from mm_model.conditions import Conditions
from mm_model.errors import NotReadyError, RequestError

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "unit/serving"), str(TESTS / "integration")]
from serving_fixtures import geotiff, make_bundle, serve_config  # noqa: E402
from test_mlflow_registry import config_of, make_reports  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

MODEL = "served"
CONFIG = serve_config(alias_poll_s=0.5, deadline_s=30, challenger={"mode": "share", "share": 0.5})
SERVE_FOREVER = """
from mm_model.adapters import environment
environment.enter()
from mm_model.adapters.ray_serve import serve_forever
from mm_model.config import ServeConfig
serve_forever(ServeConfig.model_validate_json({config!r}), {model!r})
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Platform:
    """MLflow, Ray and `serve_forever`, each a process of its own."""

    folder: Path
    env: dict[str, str]
    mlflow_port: int
    url: str
    mlflow: subprocess.Popen | None = None
    serving: subprocess.Popen | None = None
    versions: dict[str, int] = field(default_factory=dict)

    def start_mlflow(self) -> None:
        command = ["-m", "mlflow", "server", "--workers", "1", "--port", str(self.mlflow_port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        self.mlflow = self.start(command, "mlflow")
        wait_for(f"{self.env['MLFLOW_TRACKING_URI']}/health", self.mlflow)

    def start(self, command: list[str], name: str) -> subprocess.Popen:
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *command],
                cwd=self.folder, env=self.env, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    @property
    def store(self) -> mlflow.MlflowClient:
        return mlflow.MlflowClient(self.env["MLFLOW_TRACKING_URI"])

    def point_alias(self, version: int, alias: str = registry.CHAMPION) -> None:
        """As a person does in MLflow's UI, past all our code."""
        self.store.set_registered_model_alias(MODEL, alias, str(version))


def wait_for(url: str, process: subprocess.Popen, seconds: float = 120) -> httpx.Response:
    give_up = time.monotonic() + seconds
    while True:
        assert process.poll() is None
        with suppress(httpx.HTTPError):  # nobody there; a proxy without application says 404
            response = httpx.get(url, timeout=2)
            if response.is_success:
                return response
        assert time.monotonic() < give_up, url
        time.sleep(0.2)


def stop(process: subprocess.Popen | None, number: int = signal.SIGTERM) -> int | None:
    if process is None or process.poll() is not None:
        return process and process.returncode
    os.killpg(process.pid, number)
    try:
        return process.wait(60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


@pytest.fixture(scope="module")
def platform(tmp_path_factory):
    import ray

    folder = tmp_path_factory.mktemp("platform")
    ray_dir = Path(f"/tmp/mm-t{os.getpid()}")  # short: Ray puts sockets below it
    mlflow_port, endpoint_port = free_port(), free_port()
    ours = {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{mlflow_port}",
        "MM_PROJECT": str(folder),
        "MM_ENDPOINT_PORT": str(endpoint_port),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ours.items():
            patch.setenv(name, value)
        it = Platform(folder, dict(os.environ), mlflow_port, f"http://127.0.0.1:{endpoint_port}")
        context = ray.init(
            address="local", num_cpus=4, include_dashboard=False, dashboard_port=free_port(),
            _temp_dir=str(ray_dir), log_to_driver=False,
        )  # fmt: skip
        it.env["RAY_ADDRESS"] = context.address_info["gcs_address"]
        try:
            it.start_mlflow()
            code = SERVE_FOREVER.format(config=CONFIG.model_dump_json(), model=MODEL)
            it.serving = it.start(["-c", code], "serve")
            yield it
        finally:
            stop(it.serving)
            stop(it.mlflow)
            ray.shutdown()
            shutil.rmtree(ray_dir, ignore_errors=True)


@pytest.fixture(scope="module")
def versions(platform) -> dict[str, int]:
    """Two that are good, one that is broken in the store, and one whose gate failed."""
    store = mlflow.MlflowClient(platform.env["MLFLOW_TRACKING_URI"])
    found = {}
    for seed, name in enumerate(("first", "second", "broken", "failed")):
        bundle = make_bundle(seed=seed)
        save_bundle(platform.folder / name, bundle.model, bundle.manifest)
        reports = make_reports(platform.folder / f"{name}-reports", platform.folder / name)
        found[name] = registry.register(
            platform.folder / name, reports, config_of(MODEL), run_id=None, lineage={}
        )
        verdict = registry.FAILED if name == "failed" else registry.PASSED
        store.set_model_version_tag(MODEL, str(found[name]), registry.VERDICT, verdict)
    weights = (platform.folder / "broken/weights.safetensors").read_bytes()
    (stored,) = (
        path
        for path in (platform.folder / "artifacts").rglob("weights.safetensors")
        if path.read_bytes() == weights
    )
    stored.write_bytes(weights[:-8] + bytes(8))
    return found


@contextmanager
def load(url: str, callers: int = 3):
    """Requests without a pause, from several callers; yields what they got."""
    answers: list[tuple[int, str]] = []
    over = threading.Event()
    sar = geotiff("sar")

    def call(number: int) -> None:
        with httpx.Client(timeout=60) as http:
            while not over.is_set():
                form = [
                    ("sar", ("s.tif", sar)),
                    ("target", (None, b"dem")),
                    ("steps", (None, b"1")),
                ]
                got = http.post(f"{url}/v1/generate", files=form)
                answers.append((got.status_code, got.headers.get("x-model-version", got.text)))
                time.sleep(0.05)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_it_starts_without_a_champion_and_takes_the_first(platform, versions):
    with Client(platform.url) as client:
        wait_for(f"{platform.url}/healthz", platform.serving)
        with pytest.raises(NotReadyError, match="no model"):
            client.ready()
        platform.point_alias(versions["first"])
        assert client.wait_ready(30) == str(versions["first"])


def test_the_alias_moves_under_load_and_no_request_is_lost(platform, versions):
    first, second = versions["first"], versions["second"]
    with Client(platform.url) as client, load(platform.url) as answers:
        client.wait_ready(30, first)
        for version in (second, first):  # promoted, and rolled back
            platform.point_alias(version)
            client.wait_ready(30, version)
            seen = len(answers)
            while len(answers) < seen + 6:  # some that began after the change
                time.sleep(0.05)
    assert {status for status, _ in answers} == {200}
    served = [version for _, version in answers]
    assert set(served) == {str(first), str(second)}
    assert served[-1] == str(first)


def test_a_challenger_takes_its_share_and_both_have_figures(platform, versions):
    first, second = versions["first"], versions["second"]
    with Client(platform.url) as client, load(platform.url) as answers:
        client.wait_ready(30, first)
        platform.point_alias(versions["broken"], registry.CHALLENGER)
        wait_until(lambda: str(versions["broken"]) in {r.version for r in client.model().refused})
        assert {version for _, version in answers} == {str(first)}
        platform.point_alias(second, registry.CHALLENGER)
        wait_until(lambda: str(second) in {version for _, version in answers})
        figures = wait_until(lambda: compared(platform, second))
        platform.store.delete_registered_model_alias(MODEL, registry.CHALLENGER)
        wait_until(lambda: client.model().challenger is None)
        seen = len(answers)
        wait_until(lambda: len(answers) > seen + 12)
    assert {status for status, _ in answers} == {200}
    assert {version for _, version in answers[seen + 6 :]} == {str(first)}
    for role in ("champion", "challenger"):
        assert figures[f"{role}.answered"] > 0
        assert figures[f"{role}.mean_s"] > 0
    assert figures["outcomes.answered"] == figures["challenger.answered"]


def compared(platform, challenger: int) -> dict[str, float]:
    """What the run says that compares a challenger; nothing before it has answered."""
    run_id = platform.store.get_model_version(MODEL, str(challenger)).tags.get(RUN_TAG)
    found = platform.store.get_run(run_id).data.metrics if run_id else {}
    return found if found.get("challenger.answered") else {}


def wait_until(found, seconds: float = 90):
    give_up = time.monotonic() + seconds
    while not (it := found()):
        assert time.monotonic() < give_up
        time.sleep(0.1)
    return it


def test_it_embeds_and_takes_what_is_known(platform, versions):
    with Client(platform.url) as client:
        platform.point_alias(versions["first"])
        client.wait_ready(30, versions["first"])
        files, winter = {"sar": geotiff("sar")}, Conditions(date=dt.date(2024, 1, 15))
        embedded = client.embed(files, conditions=winter)
        assert embedded.vector.model_version == str(versions["first"])
        assert embedded.vector.conditions.date == winter.date
        made = client.generate(files, ["dem"], steps=2, conditions=winter)
        assert made.provenance.conditions == embedded.vector.conditions
        assert made.files != client.generate(files, ["dem"], steps=2).files
        with pytest.raises(RequestError, match="one GeoTIFF or more"):
            client.embed({})


@pytest.mark.parametrize(("name", "why"), [("broken", "weights_sha256"), ("failed", "gate")])
def test_a_broken_or_failed_version_is_refused_and_the_old_one_goes_on(
    platform, versions, name, why
):
    with Client(platform.url) as client:
        platform.point_alias(versions["first"])
        client.wait_ready(30, versions["first"])
        with load(platform.url, callers=1) as answers:
            platform.point_alias(versions[name])
            give_up = time.monotonic() + 30
            refusals: dict[str, str] = {}
            while str(versions[name]) not in refusals:
                assert time.monotonic() < give_up
                refusals = {r.version: r.reason for r in client.model().refused}
                time.sleep(0.1)
        assert why in refusals[str(versions[name])]
        assert set(answers) == {(200, str(versions["first"]))}


def test_deploying_the_same_again_changes_nothing(platform, versions):
    from mm_model.adapters.ray_serve import deploy

    before = replica_pids()
    deploy(CONFIG, MODEL)
    assert replica_pids() == before
    # They yield to nobody; Ray's own default is to yield to every other process.
    assert {psutil.Process(pid).nice() for pid in before} == {psutil.Process().nice()}


def test_other_code_is_taken_up_by_a_new_replica(platform, versions, monkeypatch):
    from mm_model.adapters import ray_serve

    before = replica_pids()
    monkeypatch.setattr(ray_serve, "_code_digest", lambda: "after git pull")
    ray_serve.deploy(CONFIG, MODEL)
    assert not set(replica_pids()) & set(before)


def test_a_renamed_model_takes_over_the_route_of_its_former_name(platform, versions):
    from mm_model.adapters.ray_serve import deploy, undeploy

    config = CONFIG.model_copy(update={"route_prefix": "/second"})
    deploy(config, "former")
    assert httpx.get(f"{platform.url}/second/healthz").is_success
    deploy(config, "renamed")
    wait_for(f"{platform.url}/second/healthz", platform.serving)
    records = {path.stem for path in (platform.folder / "var/endpoints").iterdir()}
    assert records == {MODEL, "renamed"}
    undeploy("renamed")
    with Client(platform.url) as client:  # the other route has not noticed
        assert client.ready()


def test_a_killed_replica_comes_back_without_mlflow(platform, versions):
    with Client(platform.url) as client:
        platform.point_alias(versions["second"])
        client.wait_ready(30, versions["second"])
        stop(platform.mlflow)
        (pid,) = replica_pids()
        os.kill(pid, signal.SIGKILL)
        give_up = time.monotonic() + 90
        while replica_pids() in ([], [pid]):
            assert time.monotonic() < give_up
            time.sleep(0.2)
        # Nothing but the cache can tell it what to serve.
        assert client.wait_ready(60) == str(versions["second"])
        made = client.generate({"sar": geotiff("sar")}, ["dem"], steps=1)
        assert made.provenance.model_version == str(versions["second"])
        assert "MLflow" in client.model().registry_error


def replica_pids() -> list[int]:
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()
    replicas = details["applications"][MODEL]["deployments"]["endpoint"]["replicas"]
    return [r["pid"] for r in replicas if r["state"] == "RUNNING"]


def test_a_signal_ends_it_in_order(platform):
    assert stop(platform.serving) == 0, platform.log("serve")
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{platform.url}/healthz", timeout=2)
    assert (platform.folder / "var/endpoints" / f"{MODEL}.json").exists()  # for the next start
