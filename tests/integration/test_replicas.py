"""Two replicas on a real Ray Serve, seen from outside; without MLflow they serve what they have."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mm_model.adapters import environment
from mm_model.api import ModelIdentity
from mm_model.bundle import save_bundle
from mm_model.client import Client
from mm_model.data.raster import read_raster
from mm_model.errors import ConfigError, MMError
from mm_model.serving.access import KeyScope, new_key

sys.path.append(str(Path(__file__).parents[1] / "unit/serving"))
from serving_fixtures import geotiff, make_bundle, serve_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

MODEL = "twins"
CALLERS = 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project whose cache holds a last good version, and Ray with the endpoint's two replicas."""
    import ray
    from ray import serve
    from ray.serve.context import _set_global_client

    _set_global_client(None)  # of the Ray that an earlier module has shut down
    folder = tmp_path_factory.mktemp("project")
    ray_dir = Path(f"/tmp/mm-r{os.getpid()}")  # short: Ray puts sockets below it
    cache = folder / "var/serving" / MODEL
    cache.mkdir(parents=True)
    bundle = make_bundle()
    save_bundle(cache / "1", bundle.model, bundle.manifest)
    record = ModelIdentity(name=MODEL, version="1").model_dump_json()
    (cache / "last-good.json").write_text(record)
    ours = {
        "MM_PROJECT": str(folder),
        "MM_ENDPOINT_PORT": str(free_port()),
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{free_port()}",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ours.items():
            patch.setenv(name, value)
        for name, value in environment.service_environment().items():
            patch.setenv(name, value)  # Ray's own processes need some of it
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, dashboard_port=free_port(),
            _temp_dir=str(ray_dir), log_to_driver=False,
        )  # fmt: skip
        try:
            from mm_model.adapters.ray_serve import deploy

            deploy(serve_config(replicas=2, route_prefix="/twins", alias_poll_s=5), MODEL)
            with Client(url()) as client:
                client.wait_ready(120)
            wait_for_both()
            yield folder
        finally:
            serve.shutdown()
            ray.shutdown()
            shutil.rmtree(ray_dir, ignore_errors=True)


def wait_for_both() -> None:
    """A replica is asked as soon as it runs, and loads its model then; one alone says little."""
    ready, give_up = 0, time.monotonic() + 120
    with httpx.Client() as http:
        while ready < 20:
            assert time.monotonic() < give_up
            ready = ready + 1 if http.get(f"{url()}/readyz").status_code == 200 else 0
            time.sleep(0.05)


def url() -> str:
    return f"{environment.endpoint_url()}/twins"


def replica_pids() -> list[int]:
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()
    replicas = details["applications"][MODEL]["deployments"]["endpoint"]["replicas"]
    return [r["pid"] for r in replicas if r["state"] == "RUNNING"]


def answered(page: str) -> dict[str, float]:
    """Replica → requests to generate that it has answered."""
    return {
        s.labels["replica"]: s.value
        for family in text_string_to_metric_families(page)
        for s in family.samples
        if s.name == "mm_requests_total" and s.labels["operation"] == "generate"
    }


def test_replicas_are_seen_as_one_and_a_request_is_found_by_its_id(project):
    # Ray's proxy would give up at once if it took this header for an order.
    impatient = {"X-Request-Timeout-Seconds": "0.000001"}
    field = {"width": (None, b"16"), "height": (None, b"20"), "steps": (None, b"1")}
    ids = [f"asked-{k}" for k in range(30)]
    with httpx.Client(timeout=60) as http:
        for request_id in ids:
            headers = {"X-Request-ID": request_id, **impatient}
            answer = http.post(f"{url()}/v1/generate", files=field, headers=headers)
            assert answer.status_code == 200, answer.text
            assert answer.headers.get_list("x-request-id") == [request_id]
        made = http.get(f"{url()}/healthz", headers={"X-Request-ID": "two words"})
        (request_id,) = made.headers.get_list("x-request-id")
        assert len(request_id) == 32
        # What the proxy itself answers has an id, too.
        nowhere = http.get(f"{environment.endpoint_url()}/nowhere")
        assert nowhere.status_code == 404
        assert len(nowhere.headers.get_list("x-request-id")) == 1
        pages = [http.get(f"{url()}/metrics").text for _ in range(6)]
    for page in pages:  # whichever is asked
        assert len(answered(page)) == 2
        assert sum(answered(page).values()) == len(ids)
    logs = list((project / "var/log/replicas").glob(f"replica_{MODEL}_*.log"))
    assert len(logs) == 2
    lines = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
    found = [line for line in lines if line.get("request_id") == ids[7]]
    (audit,) = [line for line in found if line["message"] == "answered"]
    assert audit["path"] == "/v1/generate"
    assert audit["status"] == 200
    assert audit["replica"] in answered(pages[0])


def test_how_far_a_request_is_is_known_whichever_replica_is_asked(project):
    fields = {"width": 768, "height": 512, "steps": 16, "samples": 4}
    form = {name: (None, str(value)) for name, value in fields.items()}
    shares: list[float] = []

    def ask() -> None:
        with suppress(httpx.ReadTimeout), httpx.Client(timeout=300) as http:
            http.post(f"{url()}/v1/generate", files=form, headers={"X-Request-ID": "long"})

    asking = threading.Thread(target=ask)
    asking.start()
    with httpx.Client(timeout=60) as http:

        def share() -> float | None:
            answer = http.get(f"{url()}/v1/progress/long")
            return answer.json()["share"] if answer.is_success else None

        wait_until(lambda: share())
        while len(shares) < 12 and (found := share()) is not None:
            shares.append(found)
        assert len(shares) == 12  # of two replicas, each will have been asked
        assert shares == sorted(shares)
        asking.join()
        assert share() is None


def test_clients_lose_no_request_when_a_replica_is_killed(project):
    over, answers, errors = threading.Event(), [], []
    sar = geotiff("sar")

    def ask(seed: int) -> None:
        with Client(url()) as client:
            while not over.is_set():
                try:
                    made = client.generate({"sar": sar}, ["dem"], steps=4, seed=seed)
                    answers.append((seed, made.files["dem.tif"]))
                except MMError as error:
                    errors.append(error)

    callers = [threading.Thread(target=ask, args=(seed,)) for seed in range(CALLERS)]
    for caller in callers:
        caller.start()
    try:
        wait_until(lambda: len(answers) > 20)
        before, seen = replica_pids(), len(answers)
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: len(set(replica_pids()) - {before[0]}) == 2)
        wait_until(lambda: len(answers) > seen + 20)
    finally:
        over.set()
        for caller in callers:
            caller.join()
    assert errors == []
    # A draw is a function of its seed: what was asked again is what it would have been. (Up to how
    # a processor rounds a batch of another size: elevation of hundreds of metres, in millimetres.)
    for seed in range(CALLERS):
        first, *others = (read_raster(file).values for n, file in set(answers) if n == seed)
        for other in others:
            np.testing.assert_allclose(other, first, atol=1e-2, rtol=0)


def test_a_body_waits_outside_until_a_replica_takes_it(project):
    stopped, sent, size = replica_pids(), 0, 60 * 2**20  # what a job may be is 64 MiB
    head = (
        f"POST /twins/v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {size}\r\n"
        "Content-Type: multipart/form-data; boundary=XX\r\n\r\n"
        '--XX\r\nContent-Disposition: form-data; name="sar"; filename="s.tif"\r\n\r\n'
    )
    end = b"\r\n--XX--\r\n"
    body = head.partition("\r\n\r\n")[2].encode().ljust(size - len(end), b"\0") + end
    with socket.create_connection(("127.0.0.1", environment.port("endpoint")), 2) as line:
        line.sendall(head.partition("\r\n\r\n")[0].encode() + b"\r\n\r\n")
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            with suppress(TimeoutError):  # nobody takes any more
                while sent < size:
                    sent += line.send(body[sent : sent + 2**20])
            assert sent < size / 2  # 4 MiB, and what the kernel holds
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        line.settimeout(60)
        line.sendall(body[sent:])
        assert b"415 " in line.recv(4096)  # zeros are no GeoTIFF


def test_an_answer_is_read_from_its_file_as_its_caller_takes_it(project):
    fields = {"width": 48, "height": 32, "steps": 1, "target": "dem"}
    form = {name: (None, str(value)) for name, value in fields.items()}
    with httpx.Client(timeout=60) as http:
        job = http.post(f"{url()}/v1/jobs", files=form).json()["id"]
        wait_until(lambda: http.get(f"{url()}/v1/jobs/{job}").json()["state"] == "done")
        (made,) = environment.jobs_folder(MODEL).glob(f"{job}/**/*.tif")
        size = 200 * 2**20
        os.truncate(made, size)
        before = read_bytes()
        with http.stream("GET", f"{url()}/v1/jobs/{job}/result") as answer:
            time.sleep(3)
            assert read_bytes() - before < size / 4
            assert sum(map(len, answer.iter_raw())) == size
        assert read_bytes() - before >= size


def read_bytes() -> int:
    """What the replicas have read from files, ever."""
    return sum(psutil.Process(pid).io_counters().read_chars for pid in replica_pids())


def test_what_asked_for_keys_is_not_deployed_again_without_them(project, monkeypatch, tmp_path):
    """The last one here: it starts Serve anew, on every address of this machine."""
    from ray import serve

    from mm_model.adapters.ray_serve import deploy, serve_forever

    serve.shutdown()
    config = serve_config(replicas=1, route_prefix="/twins", alias_poll_s=5)
    key, line = new_key("somebody", frozenset({KeyScope.GENERATE}))
    with monkeypatch.context() as shell:
        shell.setenv("MM_ENDPOINT_HOST", "0.0.0.0")
        with pytest.raises(ConfigError, match="mm key new"):
            deploy(config, MODEL)
        shell.setenv("MM_API_KEYS", line)
        deploy(config, MODEL)
    before = replica_pids()
    # Another shell, without these variables. Serve would go on listening to all.
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    for again, model in ((deploy, MODEL), (deploy, "renamed"), (serve_forever, "renamed")):
        with pytest.raises(ConfigError, match=rf"(?s){MODEL}\.json.*MM_API_KEYS"):
            again(config, model)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    # Another project, whose records know of no key.
    monkeypatch.setenv("MM_PROJECT", str(tmp_path))
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0.*mm down"):
        deploy(config, "other")
    assert replica_pids() == before
    assert httpx.get(f"{url()}/v1/model").status_code == 401
    told = httpx.get(f"{url()}/v1/model", headers={"Authorization": f"Bearer {key}"})
    assert told.status_code == 200


def wait_until(is_so, seconds: float = 180) -> None:
    give_up = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up
        time.sleep(0.1)
