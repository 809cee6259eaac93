"""The endpoint on Ray Serve: one application a registered model, following its champion.

HTTP and model live in one deployment: a request goes from Serve's proxy straight to a replica that
reads, batches and samples it. Several applications live side by side under their route prefixes.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.serve.context import _get_global_client

from mm_model.adapters import environment, traces
from mm_model.adapters.challenger import ChallengerFollower, Followed
from mm_model.adapters.champion import ChampionFollower
from mm_model.adapters.comparison import Comparison
from mm_model.bundle import load_bundle
from mm_model.config import ServeConfig, load_params, parse
from mm_model.data.files import prune
from mm_model.errors import GateError, MMError, ServiceError
from mm_model.geo.grid import Grid
from mm_model.serving.access import check_exposure, check_kept, configured_keys, parse_keys
from mm_model.serving.ahead import ReplicaEnd
from mm_model.serving.app import build_app
from mm_model.serving.generator import Generator, Request
from mm_model.serving.jobs.routes import JobsPlace
from mm_model.serving.metrics import Metrics, Snapshot
from mm_model.serving.progress import Progress

# A share of a logical CPU: replicas stand beside training on small machines, and are mostly idle.
_REPLICA_CPUS = 0.25
# Health and readiness are answered beside what is queued.
_OTHER_REQUESTS = 64
_HEALTH_TIMEOUT_S = 25.0
_FIRST_LOOK_S = 120.0  # at MLflow, which may be slow; what there is is served afterwards
_KEPT_LOG_BYTES = 2**30  # of replicas that have ended
_RAY_START_S = 180.0
_GATHER_S = 5.0
_WATCH_S = 5.0
_ANSWER_S = 20.0  # that Serve may take to say what runs
_COMPARE_POLLS = 12  # of the alias, between two looks at champion and challenger
_NO_KEYS = hashlib.sha256(b"").hexdigest()  # as a record says it
_LOG = logging.getLogger("mm_model.endpoint")


@serve.ingress()
class Endpoint:
    """A replica: the HTTP interface over the champion of one registered model."""

    def __init__(self, config: dict[str, Any], model: str, keys: str = "") -> None:
        environment.enter()
        _log_as_serve_does()
        self._keys = parse_keys(keys, "API keys")
        self._config = parse(ServeConfig, config, "serve configuration")
        if self._config.traces_url is not None:
            traces.send_to(str(self._config.traces_url))
        self._counted, self._progress = Metrics(), Progress(self._seek)
        self._place = serve.get_replica_context().replica_id
        # Ray allows one thread for less than a CPU; the replicas of a machine share all of it.
        replicas = self._config.max_replicas or self._config.replicas
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // replicas))
        # Sampling asks for the interpreter at every operation of the tensors. At ten times the
        # capacity it got a tenth more done than with Python's own 5 ms, while others are refused.
        sys.setswitchinterval(0.5e-3)
        cache = environment.state_dir() / "serving" / model
        cache.mkdir(parents=True, exist_ok=True)
        self._model = model
        self._champion = ChampionFollower(model, cache, self._load)
        challenger = None
        if self._config.challenger is not None:
            challenger = ChallengerFollower(model, cache / "challenger", self._load)
        self._followed = Followed(self._champion, challenger)
        folder = environment.jobs_folder(model)
        self._jobs = JobsPlace(folder, os.environ.get("MM_JOBS_URL", ""), model)
        # Serve asks a replica once it is made: not before it has a model, if there is one.
        self._champion.start(self._config.alias_poll_s, _FIRST_LOOK_S)
        if challenger is not None:
            challenger.start(self._config.alias_poll_s)
            threading.Thread(target=self._compare, name="comparison", daemon=True).start()

    def __serve_build_asgi_app__(self) -> Callable[..., Any]:
        app = build_app(
            self._followed,
            self._config,
            self._keys,
            self._jobs,
            counted=self._counted,
            gather=self._gather,
            progress=self._progress,
        )
        app.add_middleware(ReplicaEnd)  # not around it: Ray asks the application for its routes
        return app

    async def counted(self) -> tuple[str, Snapshot]:
        """This replica's name, and what it has counted."""
        return self._place.unique_id, self._counted.snapshot(self._followed)

    async def _gather(self) -> dict[str, Snapshot]:
        """What all replicas have counted; this one's alone if one of them does not answer."""
        of = self._place.deployment_id
        asked = serve.get_deployment_handle(of.name, of.app_name).broadcast("counted")
        try:
            return dict(await asked.results_async(timeout_s=_GATHER_S))
        except (TimeoutError, RuntimeError, ray.exceptions.RayError) as error:
            _LOG.warning("not all replicas say what they have counted: %r", error)
            return dict([await self.counted()])

    async def share_of(self, holder: str, request_id: str) -> float | None:
        """How far a request is, if it is being answered here."""
        return self._progress.share(holder, request_id)

    async def _seek(self, holder: str, request_id: str) -> float | None:
        of = self._place.deployment_id
        handle = serve.get_deployment_handle(of.name, of.app_name)
        asked = handle.broadcast("share_of", holder, request_id)
        try:
            found = await asked.results_async(timeout_s=_GATHER_S)
        except (TimeoutError, RuntimeError, ray.exceptions.RayError):
            return None  # it is asked again
        return next((share for share in found if share is not None), None)

    def _compare(self) -> None:
        """Bring both versions' figures to MLflow, now and then; for ever, in a thread."""
        comparison, of = Comparison(self._model), self._place.deployment_id
        while True:
            time.sleep(_COMPARE_POLLS * self._config.alias_poll_s)
            served, challenger = self._followed.served, self._followed.challenger
            if served is None or challenger is None:
                continue
            try:
                asked = serve.get_deployment_handle(of.name, of.app_name).broadcast("counted")
                replicas = dict(asked.results(timeout_s=_GATHER_S))
                pair = served.identity.version, challenger.identity.version
                fresh = comparison.take(*pair, replicas)
                if min(replicas) == self._place.unique_id:  # one writes for all
                    comparison.write(fresh)
            except (MMError, TimeoutError, RuntimeError, ray.exceptions.RayError) as error:
                _LOG.warning("champion and challenger are not compared: %s", error)

    async def check_health(self) -> None:
        """Ray Serve replaces a replica whose health check raises."""
        if not self._champion.alive:
            raise RuntimeError("the alias is no longer followed")
        served = self._champion.served
        if served is not None:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                await asyncio.to_thread(_probe, served.generator)

    def _load(self, folder: Path) -> Generator:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generator = Generator(
            load_bundle(folder, device),
            max_side_px=self._config.max_side_px,
            max_samples=self._config.max_samples,
            max_batch=self._config.max_batch,
        )
        began = time.monotonic()
        _probe(generator)
        if (took_s := time.monotonic() - began) > _HEALTH_TIMEOUT_S:
            raise GateError(
                "its smallest answer takes too long",
                got=f"{took_s:.1f} s",
                allowed=f"{_HEALTH_TIMEOUT_S:g} s, or its replicas would be replaced for ever",
                remedy="move the alias to a smaller model",
            )
        return generator


def _log_as_serve_does() -> None:
    """What this package logs goes into the replica's own log, as JSON with the request's id."""
    ours, serves = logging.getLogger("mm_model"), logging.getLogger("ray.serve")
    ours.handlers, ours.propagate = serves.handlers, False
    ours.setLevel(logging.INFO)
    prune(_replica_logs(), _KEPT_LOG_BYTES)


def _replica_logs() -> Path:
    return environment.log_dir() / "replicas"


def _probe(generator: Generator) -> None:
    """The smallest answer that runs through all of the model."""
    side = generator.manifest.patch_px
    grid = Grid("", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), side, side)
    generator.generate([Request(grid=grid, steps=1)])


def application(config: ServeConfig, model: str) -> serve.Application:
    """The Serve application of a registered model.

    Raises:
        ConfigError: it would listen to others without an API key.
    """
    keys = configured_keys(os.environ)
    check_exposure(environment.endpoint_host(), parse_keys(keys, "API keys"))
    deployment = serve.deployment(
        Endpoint,
        name="endpoint",
        **_scale(config),
        ray_actor_options={
            "num_cpus": _REPLICA_CPUS,
            "runtime_env": {"env_vars": environment.replica_environment()},
        },
        # The application itself bounds its queue, and answers with a problem; this is the second
        # line, for what the proxy holds.
        max_ongoing_requests=config.max_queued + _OTHER_REQUESTS,
        max_queued_requests=config.max_queued + _OTHER_REQUESTS,
        backpressure_config={"status_code": 429, "retry_after_s": 1},
        health_check_timeout_s=_HEALTH_TIMEOUT_S + 5,
        graceful_shutdown_timeout_s=config.deadline_s,
        graceful_shutdown_wait_loop_s=0.5,
        logging_config={"encoding": "JSON", "logs_dir": str(_replica_logs())},
        max_surge_percent=100,  # the new replica is ready before the old one stops
    )
    return deployment.bind(config.model_dump(mode="json"), model, keys)


def _scale(config: ServeConfig) -> dict[str, Any]:
    """How many replicas there are: as many as declared, or more with the load.

    Each has work for one batch while the one before it is sampled: beyond that, more help.
    """
    if config.max_replicas is None:
        return {"num_replicas": config.replicas}
    return {
        "num_replicas": None,
        "autoscaling_config": {
            "min_replicas": config.replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": 2 * config.max_batch,
        },
    }


def build(arguments: dict[str, str]) -> serve.Application:
    """The application for Serve's own configuration files: `params` names a params.yaml."""
    params = load_params(Path(arguments.get("params", "params.yaml")))
    return application(params.serve, params.register_.model)


def deploy(config: ServeConfig, model: str) -> None:
    """Deploy a model's application on the running Ray; does nothing if it runs unchanged.

    Raises:
        ConfigError: it would answer others, or who had to have a key, without one.
        ServiceError: Ray does not answer, or the application does not start.
    """
    with _connected():
        _deploy(config, model)


def undeploy(model: str) -> None:
    """End a model's application, and do not bring it back; raises ServiceError without Ray."""
    with _connected():
        serve.delete(model)
    _record_file(model).unlink(missing_ok=True)


def serve_forever(config: ServeConfig, model: str) -> None:
    """Deploy this application and those deployed before, and stay until SIGINT or SIGTERM.

    Raises:
        ConfigError: as for `deploy`.
        ServiceError: Ray does not answer, or went away.
    """
    # Children of a shell that is not interactive ignore SIGINT; either signal ends this in order.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with _connected(wait_s=_RAY_START_S):
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has set its own
            try:
                # Routes are unique: what held this one before goes when this application comes.
                for former, former_config in _recorded().items():
                    if former != model and former_config.route_prefix != config.route_prefix:
                        _deploy(former_config, former)
                _deploy(config, model)
                while True:
                    time.sleep(_WATCH_S)
                    if model not in _statuses_within(_ANSWER_S):
                        # Another `mm serve` on this Ray that ends takes all of Serve with it.
                        raise ServiceError(
                            f"the application of {model} was taken down", remedy="start it again"
                        )
            except KeyboardInterrupt:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                serve.shutdown()
    except KeyboardInterrupt:
        return


def _deploy(config: ServeConfig, model: str) -> None:
    text = configured_keys(os.environ)
    keys, digest = parse_keys(text, "API keys"), hashlib.sha256(text.encode()).hexdigest()
    check_kept(_locked(), keys)
    wanted = application(config, model)
    record = {"code": _code_digest(), "serve": config.model_dump(mode="json"), "keys": digest}
    file = _record_file(model)
    try:
        check_exposure(
            _listening(), keys, "set the keys as where Serve was started, or `mm down` first"
        )
        if _statuses().get(model) in ("RUNNING", "DEPLOYING") and _read(file) == record:
            return
        for former, former_config in _recorded().items():
            # A model that was renamed: Serve would refuse a second application on its route.
            if former != model and former_config.route_prefix == config.route_prefix:
                serve.delete(former)
                _record_file(former).unlink(missing_ok=True)
        serve.run(wanted, name=model, route_prefix=config.route_prefix)
    except (RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
        raise ServiceError(
            f"the endpoint of {model} does not start",
            got=" ".join(str(error).split())[:300],
            remedy="look into Ray's dashboard",
        ) from error
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _listening() -> str:
    """The host that Serve listens on. One that runs keeps its own, whatever is asked of it now."""
    options = {
        "host": environment.endpoint_host(),
        "port": environment.port("endpoint"),
        **environment.endpoint_tls(),
    }
    serve.start(http_options=options)
    return str(_get_global_client().http_config.host)  # public only through its dashboard


@contextmanager
def _connected(wait_s: float = 0.0) -> Iterator[None]:
    """A connection to the running Ray; one that stands already is used, and left as it is."""
    if ray.is_initialized():
        yield
        return
    environment.enter()
    address, give_up = environment.ray_address(), time.monotonic() + wait_s
    while True:
        try:
            ray.init(address=address, namespace="mm-model", log_to_driver=False)
            break
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            if time.monotonic() >= give_up:
                raise ServiceError(
                    f"Ray does not answer at {address}",
                    got=" ".join(str(error).split())[:300],
                    remedy="start it with `mm up`",
                ) from error
            time.sleep(2)
    try:
        yield
    finally:
        ray.shutdown()


def _statuses() -> dict[str, str]:
    """Application name → status; raises ServiceError if Ray has gone."""
    try:
        return {name: app.status.value for name, app in serve.status().applications.items()}
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise ServiceError("Ray went away", got=error, remedy="start it with `mm up`") from error


def _statuses_within(seconds: float) -> dict[str, str]:
    """As `_statuses`, which waits for ever where another Ray stands at the address of ours."""
    answers: queue.SimpleQueue[dict[str, str] | ServiceError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(_statuses())
        except ServiceError as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        found = answers.get(timeout=seconds)
    except queue.Empty:
        raise ServiceError(
            "Ray does not answer any more", allowed=f"{seconds:g} s", remedy="start it with `mm up`"
        ) from None
    if isinstance(found, ServiceError):
        raise found
    return found


def _code_digest() -> str:
    """SHA-256 of this package's code: replicas go on with what they have loaded."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _recorded() -> dict[str, ServeConfig]:
    """The applications that were deployed and not taken down."""
    found = {}
    for file in sorted(_record_file("").parent.glob("*.json")):
        record = _read(file)
        try:
            found[file.stem] = parse(ServeConfig, (record or {}).get("serve"), str(file))
        except MMError as error:
            raise ServiceError(f"{file} cannot be read", got=error, remedy="remove it") from error
    return found


def _locked() -> list[Path]:
    """Records of what was deployed with API keys."""
    files = sorted(_record_file("").parent.glob("*.json"))
    return [file for file in files if (_read(file) or {}).get("keys", _NO_KEYS) != _NO_KEYS]


def _record_file(model: str) -> Path:
    return environment.state_dir() / "endpoints" / f"{model}.json"


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content
