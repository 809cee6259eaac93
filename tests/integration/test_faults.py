"""Faults of the platform as `mm up` runs it: real processes are killed and stopped.

One platform for all: MLflow, Ray and the endpoint below supervisord, in a project of its own.
"""

from __future__ import annotations

import shutil
import signal
import socket
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
from mm_model.bundle import save_bundle
from mm_model.client import Client
from mm_model.errors import MMError, NotReadyError

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "unit/serving"), str(TESTS / "integration")]
from serving_fixtures import geotiff, make_bundle, serve_config  # noqa: E402
from test_mlflow_registry import config_of, make_reports  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
MODEL = "faulted"
SERVE = serve_config(alias_poll_s=0.5, deadline_s=120)
VERSIONS = ("first", "second")
PATIENCE_S = 300.0  # the machine may be busy; nothing here takes a minute on one that is not


@dataclass
class Platform:
    """What `mm up` started, and the registered versions."""

    root: Path
    url: str
    versions: dict[str, int] = field(default_factory=dict)

    def point_alias(self, version: int) -> None:
        """As a person does in MLflow's UI, past all our code."""
        client = mlflow.MlflowClient(environment.mlflow_url())
        client.set_registered_model_alias(MODEL, registry.CHAMPION, str(version))

    def serve(self, name: str) -> None:
        """Have a version served, whatever the test before has left."""
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
            yield it
        finally:
            services.down()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def register_versions(platform: Platform) -> None:
    """Two that passed their gates."""
    store = mlflow.MlflowClient(environment.mlflow_url())
    for seed, name in enumerate(VERSIONS):
        bundle = make_bundle(seed=seed)
        folder = platform.root / name
        save_bundle(folder, bundle.model, bundle.manifest)
        reports = make_reports(platform.root / f"{name}-reports", folder)
        version = registry.register(folder, reports, config_of(MODEL), run_id=None, lineage={})
        platform.versions[name] = version
        store.set_model_version_tag(MODEL, str(version), registry.VERDICT, registry.PASSED)


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
