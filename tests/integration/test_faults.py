"""Faults of the platform as `mm up` runs it: real processes are killed, stopped and starved.

One platform for all: MLflow, Ray and the endpoint below supervisord, in a project of its own.
"""

from __future__ import annotations

import dataclasses
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import mlflow
import psutil
import pytest
import yaml

from mm_model.adapters import environment, services
from mm_model.adapters import mlflow_registry as registry
from mm_model.adapters.environment import DEFAULT_PORTS
from mm_model.api import JobInfo, JobState
from mm_model.bundle import save_bundle
from mm_model.client import Client
from mm_model.data.raster import read_raster
from mm_model.errors import MMError, NotReadyError, RequestError, StorageError
from mm_model.nn.model import Size

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "unit/serving"), str(TESTS / "integration")]
from serving_fixtures import GRID, SIZE, geotiff, make_bundle, serve_config  # noqa: E402
from test_mlflow_registry import config_of, make_reports  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
MODEL = "faulted"
SERVE = serve_config(alias_poll_s=0.5, deadline_s=120)
VERDICTS = {"first": registry.PASSED, "second": registry.PASSED, "broken": registry.PASSED}
VERDICTS |= {"failed": registry.FAILED, "ungated": None, "slow": registry.PASSED}
LARGE = Size(64, 64, 384, 2, 4, 2, 8, 4)
PATIENCE_S = 300.0  # the machine may be busy; nothing here takes a minute on one that is not
JOBS_BYTES = 8 * 2**20  # of the disk that jobs have for themselves


@dataclass
class Platform:
    """What `mm up` started, and the registered versions."""

    root: Path
    url: str
    versions: dict[str, int] = field(default_factory=dict)
    has_small_disk: bool = False

    @property
    def jobs(self) -> Path:
        return self.root / "var/jobs" / MODEL

    def point_alias(self, version: int) -> None:
        """As a person does in MLflow's UI, past all our code."""
        client = mlflow.MlflowClient(environment.mlflow_url())
        client.set_registered_model_alias(MODEL, registry.CHAMPION, str(version))

    def serve(self, name: str) -> None:
        """Have a version served, whatever the test before has left."""
        services.up(["endpoint"])
        self.point_alias(self.versions[name])
        with Client(self.url) as client:
            client.wait_ready(PATIENCE_S, self.versions[name])

    def log(self, name: str) -> str:
        return (self.root / f"var/log/{name}.log").read_text()[-3000:]


@pytest.fixture(scope="module")
def platform(tmp_path_factory) -> Iterator[Platform]:
    """MLflow with versions of which none is champion; neither Ray nor the endpoint runs yet."""
    root = tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "infra/local", root / "infra/local")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["serve"] = SERVE.model_dump(mode="json")
    params["register"]["model"] = MODEL
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MM_PROJECT", str(root))
        patch.delenv("RAY_ADDRESS", raising=False)
        for name in DEFAULT_PORTS:
            patch.setenv(f"MM_{name.upper()}_PORT", str(free_port()))
        patch.delenv("RAY_DASHBOARD_ADDRESS", raising=False)
        patch.delenv("RAY_AUTH_TOKEN")  # `mm up` makes one
        try:
            services.up(["mlflow"])
            it = Platform(root, environment.endpoint_url())
            register_versions(it)
            it.jobs.mkdir(parents=True)
            it.has_small_disk = mount(it.jobs)
            yield it
        finally:
            services.down()
            if it.has_small_disk:
                subprocess.run(["umount", it.jobs], check=True)


def mount(folder: Path) -> bool:
    """Put a small disk there, where this is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={JOBS_BYTES}", "tmpfs", str(folder)]
    with suppress(FileNotFoundError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def register_versions(platform: Platform) -> None:
    """Two that are good; others that are broken, not gated, failed, or large."""
    store = mlflow.MlflowClient(environment.mlflow_url())
    for seed, (name, verdict) in enumerate(VERDICTS.items()):
        bundle = make_bundle(seed=seed, size=LARGE if name == "slow" else SIZE)
        folder = platform.root / name
        save_bundle(folder, bundle.model, bundle.manifest)
        reports = make_reports(platform.root / f"{name}-reports", folder)
        version = registry.register(folder, reports, config_of(MODEL), run_id=None, lineage={})
        platform.versions[name] = version
        if verdict is not None:
            store.set_model_version_tag(MODEL, str(version), registry.VERDICT, verdict)
    weights = (platform.root / "broken/weights.safetensors").read_bytes()
    (stored,) = (
        path
        for path in (platform.root / "var/mlartifacts").rglob("weights.safetensors")
        if path.read_bytes() == weights
    )
    stored.write_bytes(weights[:-8] + bytes(8))


def wait_until(is_so: Callable[[], object], seconds: float = PATIENCE_S, why: str = "") -> None:
    give_up = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up, why
        time.sleep(0.1)


def processes(word: str) -> list[psutil.Process]:
    """Processes of this platform with a word in their title or command line."""
    found = []
    for process, _ in services._ours():
        with suppress(psutil.Error):
            if word in " ".join(process.cmdline()) or word in process.name():
                found.append(process)
    return found


@dataclass
class Load:
    """What callers without a pause have got."""

    answers: list[str] = field(default_factory=list)
    errors: list[MMError] = field(default_factory=list)

    def more(self, count: int, seconds: float = PATIENCE_S) -> None:
        """Wait for so many more answers."""
        seen = len(self.answers)
        wait_until(lambda: len(self.answers) >= seen + count, seconds, str(self.errors))


@contextmanager
def load(url: str, callers: int = 2) -> Iterator[Load]:
    """Callers that use the client as it is; yields what they have got so far."""
    got, over, sar = Load(), threading.Event(), geotiff("sar")

    def ask() -> None:
        with Client(url) as client:
            while not over.is_set():
                try:
                    made = client.generate({"sar": sar}, ["dem"], steps=1)
                    got.answers.append(made.provenance.model_version)
                except MMError as error:
                    got.errors.append(error)
                over.wait(0.05)

    threads = [threading.Thread(target=ask) for _ in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield got
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_without_mlflow_the_endpoint_says_so_and_comes_up_with_it(platform):
    supervisor = services._supervisor()
    supervisor.stopProcess("mlflow")
    services.up(["ray"])
    supervisor.startProcess("endpoint", False)
    wait_until(lambda: is_alive(platform.url), why=platform.log("endpoint"))
    with Client(platform.url, patience_s=0) as client:
        with pytest.raises(NotReadyError, match="MLflow does not answer"):
            client.ready()
        with pytest.raises(NotReadyError, match="MLflow does not answer"):
            client.generate({"sar": geotiff("sar")}, ["dem"])
        assert "MLflow" in client.model().registry_error
        supervisor.startProcess("mlflow", False)
        wait_until(lambda: client.model().registry_error is None)
        with pytest.raises(NotReadyError, match="promote a version"):
            client.ready()
        platform.point_alias(platform.versions["first"])
        client.wait_ready(PATIENCE_S, platform.versions["first"])


def is_alive(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/healthz", timeout=2).is_success
    return False


def test_mlflow_dies_and_hangs_and_the_loaded_model_goes_on_answering(platform):
    platform.serve("first")
    with Client(platform.url) as client, load(platform.url) as got:
        for number, since in ((signal.SIGSTOP, "hangs"), (signal.SIGKILL, "dies")):
            for process in processes("mlflow"):
                process.send_signal(number)
            wait_until(lambda: client.model().registry_error, why=since)
            got.more(6)
            for process in processes("mlflow"):
                process.send_signal(signal.SIGCONT)
            # Who killed it does nothing more: supervisord starts it again.
            wait_until(lambda: client.model().registry_error is None, why=platform.log("mlflow"))
        platform.point_alias(platform.versions["second"])
        client.wait_ready(PATIENCE_S, platform.versions["second"])
        got.more(3)
    assert got.errors == []
    assert got.answers[0] == str(platform.versions["first"])
    assert got.answers[-1] == str(platform.versions["second"])


def test_clients_lose_no_request_when_the_proxy_is_killed(platform):
    platform.serve("first")
    (proxy,) = processes("ProxyActor")
    with load(platform.url) as got:
        got.more(6)
        proxy.kill()
        got.more(12)
        (another,) = processes("ProxyActor")
    assert got.errors == []
    assert another.pid != proxy.pid


@pytest.mark.parametrize(
    ("name", "why"), [("broken", "weights_sha256"), ("failed", "gate"), ("ungated", "no verdict")]
)
def test_a_version_that_cannot_be_served_changes_nothing(platform, name, why):
    platform.serve("first")
    version = str(platform.versions[name])
    with Client(platform.url) as client, load(platform.url) as got:
        platform.point_alias(platform.versions[name])
        wait_until(lambda: version in {r.version for r in client.model().refused})
        got.more(3)
        (reason,) = (r.reason for r in client.model().refused if r.version == version)
    assert why in reason
    assert got.errors == []
    assert set(got.answers) == {str(platform.versions["first"])}


def test_while_a_large_version_is_loaded_the_old_one_answers(platform):
    platform.serve("first")
    with Client(platform.url) as client, load(platform.url) as got:
        platform.point_alias(platform.versions["slow"])
        got.more(1)
        client.wait_ready(PATIENCE_S, platform.versions["slow"])
        got.more(3)
    assert got.errors == []
    assert got.answers[0] == str(platform.versions["first"])
    assert got.answers[-1] == str(platform.versions["slow"])


def start_job(url: str, seed: int, width: int = 600) -> str:
    """A job that invents a place; its result is a function of seed and width."""
    asked = {"target": "dem", "width": width, "height": 400, "steps": 4, "seed": seed}
    form = {name: (None, str(value)) for name, value in asked.items()}
    answer = httpx.post(f"{url}/v1/jobs", files=form, timeout=60)
    assert answer.status_code == 201, answer.text
    return JobInfo.model_validate_json(answer.content).id


def begun(client: Client, job: str) -> None:
    wait_until(lambda: client.job(job).progress > 0, why=f"{client.job(job)}")


def ended(client: Client, job: str) -> JobInfo:
    """The job once it is done or has failed, whatever happens to the endpoint meanwhile."""

    def is_over() -> bool:
        with suppress(MMError):  # the endpoint is being replaced
            return client.job(job).state in (JobState.DONE, JobState.FAILED)
        return False

    wait_until(is_over, why=job)
    return client.job(job)


def result(client: Client, job: str, folder: Path) -> bytes:
    return client.save_result(job, folder).read_bytes()


def test_a_job_outlives_the_replica_that_works_on_it(platform, tmp_path):
    platform.serve("first")
    with Client(platform.url) as client:
        job = start_job(platform.url, seed=9)
        begun(client, job)
        (replica,) = processes("ServeReplica")
        replica.kill()
        found = ended(client, job)
        assert (found.state, found.attempt) == (JobState.DONE, 2), found
        undisturbed = start_job(platform.url, seed=9)
        assert ended(client, undisturbed).attempt == 1
        assert result(client, job, tmp_path) == result(client, undisturbed, tmp_path)
        # What the first attempt had begun to write is gone, too.
        assert len(list((platform.jobs / job).iterdir())) == 1
        for done in (job, undisturbed):
            client.delete_job(done)


def test_jobs_outlive_the_head_of_ray(platform, tmp_path):
    platform.serve("first")
    with Client(platform.url) as client:
        running, waiting = (start_job(platform.url, seed) for seed in (1, 2))
        begun(client, running)
        assert client.job(waiting).state is JobState.QUEUED
        for head in (*processes("gcs_server"), *processes("raylet/raylet")):
            head.kill()
        services.up(["endpoint"])  # supervisord has begun already; this waits for it
        for job in (running, waiting):
            assert ended(client, job).state is JobState.DONE
        again = start_job(platform.url, seed=1)
        assert ended(client, again).attempt == 1
        assert result(client, running, tmp_path) == result(client, again, tmp_path)
        for job in (running, waiting, again):
            client.delete_job(job)


@contextmanager
def removed(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def test_a_full_disk_is_said_and_over_when_there_is_room(platform, tmp_path):
    if not platform.has_small_disk:
        pytest.skip("a small disk cannot be mounted here: needs root")
    platform.serve("first")
    sar = tmp_path / "sar.tif"
    sar.write_bytes(geotiff("sar", dataclasses.replace(GRID, height=200, width=300)))
    filler = platform.jobs / "filler"

    def leave(free_bytes: int) -> None:
        filler.unlink(missing_ok=True)
        filler.write_bytes(bytes(shutil.disk_usage(platform.jobs).free - free_bytes))

    with Client(platform.url, patience_s=0) as client, removed(filler):
        leave(sar.stat().st_size // 2)  # for half of what is sent
        with pytest.raises(StorageError, match="what was sent"):
            client.start_job({"sar": sar}, ["dem"], steps=1)
        assert client.generate({"sar": sar}, ["dem"], steps=1).files  # needs no disk
        assert not [path for path in platform.jobs.iterdir() if path.is_dir()]
        leave(sar.stat().st_size * 2)  # for what is sent, and not for what is made
        job = client.start_job({"sar": sar}, ["dem"], steps=1).id
        failed = ended(client, job)
        assert failed.state is JobState.FAILED
        assert failed.problem.code == StorageError.code
        with pytest.raises(RequestError, match="has no result"):
            client.save_result(job, tmp_path)
        filler.unlink()
        made = client.start_job({"sar": sar}, ["dem"], steps=1).id
        assert ended(client, made).state is JobState.DONE
        assert read_raster(client.save_result(made, tmp_path)).grid.shape == (200, 300)


def test_a_full_spool_is_said_and_over_when_there_is_room(platform, tmp_path):
    """What a replica may write to one file stands for what its disk can hold."""
    platform.serve("first")
    sar = tmp_path / "sar.tif"
    sar.write_bytes(geotiff("sar", dataclasses.replace(GRID, height=500, width=700)))
    (replica,) = processes("ServeReplica")
    before = replica.rlimit(psutil.RLIMIT_FSIZE)
    with Client(platform.url, patience_s=0) as client:
        replica.rlimit(psutil.RLIMIT_FSIZE, (sar.stat().st_size // 2, before[1]))
        try:
            with pytest.raises(StorageError, match="what was sent"):
                client.generate({"sar": sar}, ["dem"], steps=1)
        finally:
            replica.rlimit(psutil.RLIMIT_FSIZE, before)
        assert client.generate({"sar": sar}, ["dem"], steps=1).files
