"""Follows the alias `champion`: polls MLflow, loads in the background, swaps one reference.

The one who serves goes on with what it has until a new version has been loaded and has answered. A
version that cannot be loaded, or whose gate did not pass, changes nothing but the report.
"""

from __future__ import annotations

import logging
import shutil
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from mm_model.adapters import mlflow_registry
from mm_model.adapters.mlflow_registry import Champion
from mm_model.api import ModelIdentity, Refusal
from mm_model.data.files import write_atomically
from mm_model.errors import BundleError, GateError, MMError, RegistryError, StorageError
from mm_model.serving.batching import Served
from mm_model.serving.generator import Generator

_LOG = logging.getLogger("ray.serve")
_LAST_GOOD = "last-good.json"
_KEPT_VERSIONS = 3


class ChampionFollower:
    """A `ModelSource` that serves what the alias names, or the last version that could be loaded.

    Args:
        model: the registered model's name.
        cache: folder for bundles; a restart without MLflow serves from here.
        load: makes a generator of a bundle's folder, and has it answer once; whatever it raises
            refuses the version.
    """

    ALIAS: ClassVar[str] = mlflow_registry.CHAMPION

    def __init__(self, model: str, cache: Path, load: Callable[[Path], Generator]) -> None:
        self._model = model
        self._cache = cache
        self._load = load
        self._served: Served | None = None
        self._refused: dict[str, str] = {}
        self._settled: tuple[str, str | None] | None = None  # version and verdict already judged
        self._registry_error: str | None = None
        self._thread: threading.Thread | None = None
        self._looked = threading.Event()

    @property
    def served(self) -> Served | None:
        return self._served

    @property
    def refused(self) -> tuple[Refusal, ...]:
        refused = dict(self._refused)
        return tuple(Refusal(version=v, reason=r) for v, r in refused.items())

    @property
    def registry_error(self) -> str | None:
        return self._registry_error

    @property
    def alive(self) -> bool:
        """Whether the alias is being followed."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, poll_s: float, wait_s: float = 0.0) -> None:
        """Poll for ever, in a thread that ends with the process.

        Returns after the first look, when what can be served is served, or after `wait_s`.
        """

        def follow() -> None:
            while True:
                self.poll()
                self._looked.set()
                pause.wait(poll_s)

        pause = threading.Event()
        self._thread = threading.Thread(target=follow, name=self.ALIAS, daemon=True)
        self._thread.start()
        self._looked.wait(wait_s)

    def poll(self) -> None:
        """Look at the alias once, and follow it if it moved; never raises."""
        try:
            champion = self._look()
        except Exception as error:  # MLflow away, in whatever way: serve what there is
            self._registry_error = str(error)
            if self._served is None:
                self._serve_last_good()
            return
        self._registry_error = None
        if champion is None:
            return
        key = str(champion.version), champion.tags.get(mlflow_registry.VERDICT)
        serves_it = self._served is not None and self._served.identity.version == key[0]
        if serves_it or key == self._settled:
            self._settled = key
            if serves_it:  # whatever was refused before, the alias does not name it any more
                self._refused.clear()
            return
        try:
            self._take_up(champion)
        except (RegistryError, StorageError, OSError) as error:
            # The next poll tries again: the registry comes back, and so does room on the disk.
            self._refuse(key[0], error)
        except Exception as error:  # a broken bundle can break in any way
            self._refuse(key[0], error)
            self._settled = key
        else:
            self._refused.pop(key[0], None)
            self._settled = key
        if self._served is None:  # a replica that has just begun: the old one goes on
            self._serve_last_good()

    def _look(self) -> Champion | None:
        return mlflow_registry.champion(self._model)

    def _take_up(self, champion: Champion) -> None:
        tags = champion.tags
        if tags.get(mlflow_registry.VERDICT) != mlflow_registry.PASSED:
            raise GateError(
                "its gate did not pass",
                got=tags.get(mlflow_registry.REASONS, "no verdict"),
                remedy="move the alias to a version that passed",
            )
        version = str(champion.version)
        identity = ModelIdentity(name=self._model, version=version, run_id=champion.run_id)
        try:
            generator = self._load(self._fetch(champion.version))
        except (BundleError, OSError):
            # What lies in the cache may be damaged: once more from the registry.
            shutil.rmtree(self._cache / version, ignore_errors=True)
            generator = self._load(self._fetch(champion.version))
        write_atomically(self._cache / _LAST_GOOD, identity.model_dump_json().encode())
        self._served = Served(generator, identity)
        _LOG.info("%s of %s: version %s", self.ALIAS, self._model, version)
        self._prune()

    def _fetch(self, version: int) -> Path:
        """The bundle's folder in the cache; replicas of one machine share it."""
        final = self._cache / str(version)
        if not final.exists():
            fresh = self._cache / f".{version}-{uuid.uuid4().hex}"
            fresh.mkdir(parents=True)
            try:
                mlflow_registry.fetch_bundle(self._model, version, fresh / "bundle").rename(
                    fresh / "whole"
                )
                try:
                    (fresh / "whole").rename(final)
                except OSError:
                    if not final.exists():
                        raise
                    # Another replica was faster, with the same bytes.
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
        return final

    def _serve_last_good(self) -> None:
        try:
            record = (self._cache / _LAST_GOOD).read_bytes()
            identity = ModelIdentity.model_validate_json(record)
            self._served = Served(self._load(self._cache / identity.version), identity)
            _LOG.warning("serving the last good version %s", identity.version)
        except Exception as error:  # a damaged cache can break in any way
            _LOG.warning("there is no last good version: %r", error)

    def _refuse(self, version: str, error: Exception) -> None:
        reason = str(error) if isinstance(error, MMError) else repr(error)
        if self._refused.get(version) != reason:
            _LOG.error("refused %s version %s: %s", self._model, version, reason)
        self._refused[version] = reason

    def _prune(self) -> None:
        versions = [p for p in self._cache.iterdir() if p.is_dir() and p.name.isdecimal()]
        for old in sorted(versions, key=lambda p: p.stat().st_mtime)[:-_KEPT_VERSIONS]:
            if self._served is None or old.name != self._served.identity.version:
                shutil.rmtree(old, ignore_errors=True)
