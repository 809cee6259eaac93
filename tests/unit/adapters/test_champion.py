"""Which version a replica takes up; the registry's answers are given here, real ones in
tests/integration/test_ray_serve.py.
"""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from mm_model.adapters import champion as module
from mm_model.adapters import mlflow_registry
from mm_model.adapters.champion import ChampionFollower
from mm_model.errors import RegistryError


@pytest.fixture
def registry(monkeypatch):
    """What the alias says: a version and its verdict; None stands for a registry that is away."""
    answer: dict[str, tuple[int, str] | None] = {"champion": (1, "passed")}

    def champion(_: str) -> mlflow_registry.Champion:
        if answer["champion"] is None:
            raise RegistryError("MLflow does not answer")
        version, verdict = answer["champion"]
        return mlflow_registry.Champion(version, "run", {mlflow_registry.VERDICT: verdict})

    def fetch(_: str, version: int, into: Path) -> Path:
        into.mkdir(parents=True)
        (into / "version").write_text(str(version))
        return into

    monkeypatch.setattr(module.mlflow_registry, "champion", champion)
    monkeypatch.setattr(module.mlflow_registry, "fetch_bundle", fetch)
    return answer


def load(folder: Path) -> str:
    version = (folder / "version").read_text()
    if version == "3":
        raise RuntimeError("it does not answer")
    return f"generator {version}"


def test_what_was_refused_is_over_once_the_alias_is_back(registry, tmp_path):
    follower = ChampionFollower("m", tmp_path, load)
    follower.poll()
    registry["champion"] = (2, "failed")
    follower.poll()
    assert [r.version for r in follower.refused] == ["2"]
    registry["champion"] = (1, "passed")
    follower.poll()
    assert follower.refused == ()
    assert follower.served.identity.version == "1"


@pytest.mark.parametrize("refused", [(2, "failed"), (3, "passed"), None])
def test_a_new_replica_goes_on_with_the_last_good_version(registry, tmp_path, refused):
    ChampionFollower("m", tmp_path, load).poll()
    registry["champion"] = refused
    follower = ChampionFollower("m", tmp_path, load)
    follower.poll()
    assert follower.served.generator == "generator 1"
    assert follower.served.identity.version == "1"
    assert [r.version for r in follower.refused] == ([str(refused[0])] if refused else [])


def test_a_version_that_passes_later_is_taken_up(registry, tmp_path):
    follower = ChampionFollower("m", tmp_path, load)
    registry["champion"] = (2, "failed")
    follower.poll()
    assert follower.served is None
    registry["champion"] = (2, "passed")
    follower.poll()
    assert follower.served.identity.version == "2"
    assert follower.refused == ()


def test_a_damaged_cache_ends_no_poll(registry, tmp_path):
    ChampionFollower("m", tmp_path, load).poll()
    (tmp_path / "1/version").write_text("3")
    registry["champion"] = None
    follower = ChampionFollower("m", tmp_path, load)
    follower.poll()
    assert follower.served is None
    assert "MLflow" in follower.registry_error


def test_it_begins_with_what_there_is_or_after_a_while_without(registry, tmp_path):
    go_on = threading.Event()

    def slow(folder: Path) -> str:
        assert go_on.wait(60)
        return load(folder)

    follower = ChampionFollower("m", tmp_path, slow)
    follower.start(poll_s=60, wait_s=0.05)
    assert follower.served is None
    another = ChampionFollower("m", tmp_path / "other", slow)
    threading.Timer(0.3, go_on.set).start()
    another.start(poll_s=60, wait_s=60)
    assert another.served.identity.version == "1"


def test_a_version_that_found_no_room_is_fetched_again(registry, tmp_path, monkeypatch):
    follower = ChampionFollower("m", tmp_path, load)
    follower.poll()
    registry["champion"] = (2, "passed")
    with monkeypatch.context() as full:

        def fetch(*_: object) -> Path:
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr(module.mlflow_registry, "fetch_bundle", fetch)
        follower.poll()
        follower.poll()
    assert follower.served.identity.version == "1"
    assert "No space" in follower.refused[0].reason
    follower.poll()
    assert follower.served.identity.version == "2"
    assert follower.refused == ()
