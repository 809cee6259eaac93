"""Champion and challenger against a real MLflow server, in one process."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path

import pytest
from test_mlflow_registry import at_server, config_of, make_reports, mlflow_server  # noqa: F401

from mm_model.adapters import mlflow_registry as registry
from mm_model.adapters.challenger import ChallengerFollower, Followed
from mm_model.adapters.champion import ChampionFollower
from mm_model.adapters.comparison import RUN_TAG, Comparison
from mm_model.bundle import load_bundle, save_bundle
from mm_model.errors import GateError, RegistryError
from mm_model.serving.app import build_app
from mm_model.serving.generator import Generator
from mm_model.serving.metrics import Metrics

sys.path.append(str(Path(__file__).parents[1] / "unit/serving"))
from serving_fixtures import ask, form, geotiff, make_bundle, serve_config
from test_challenger import wait_for

pytestmark = pytest.mark.integration


def load(folder: Path) -> Generator:
    return Generator(load_bundle(folder, "cpu"), max_side_px=64)


def register(model: str, folder: Path, verdicts: list[str], client) -> None:
    for seed, verdict in enumerate(verdicts):
        bundle, place = make_bundle(seed=seed), folder / f"bundle-{seed}"
        save_bundle(place, bundle.model, bundle.manifest)
        reports = make_reports(folder / f"reports-{seed}", place)
        version = registry.register(place, reports, config_of(model), run_id=None, lineage={})
        client.set_model_version_tag(model, str(version), registry.VERDICT, verdict)


def test_a_challengers_life(at_server, tmp_path):  # noqa: F811
    model = f"m-{uuid.uuid4().hex[:8]}"
    register(model, tmp_path, [registry.PASSED, registry.PASSED, registry.FAILED], at_server)
    registry.promote(model, 1)
    champion = ChampionFollower(model, tmp_path / "cache", load)
    challenger = ChallengerFollower(model, tmp_path / "cache/challenger", load)
    source = Followed(champion, challenger)

    def poll() -> tuple[str | None, str | None]:
        champion.poll()
        challenger.poll()
        which = (source.served, source.challenger)
        return tuple(s and s.identity.version for s in which)

    assert poll() == ("1", None)
    with pytest.raises(GateError, match="has not passed"):
        registry.challenge(model, 3)
    with pytest.raises(RegistryError, match="is champion"):
        registry.challenge(model, 1)
    registry.challenge(model, 2)
    assert poll() == ("1", "2")

    # Its figures are written, and written on by another replica.
    counted, comparison = Metrics(), Comparison(model)
    config = serve_config(challenger={"mode": "shadow", "share": 1.0})
    app = build_app(source, config, counted=counted)
    comparison.take("1", "2", {"a": counted.snapshot(source)})  # from here on
    asked = form({"sar": geotiff("sar")}, target=["dem", "map"], steps=1)
    for number in (1, 2):
        (answer,) = ask(app, asked)
        assert answer.headers["x-model-version"] == "1"
        wait_for(app, "answered", number)
    ask(app, form({}, steps=1))
    run_id = comparison.write(comparison.take("1", "2", {"a": counted.snapshot(source)}))
    figures = at_server.get_run(run_id).data.metrics
    assert figures["champion.answered"] == figures["outcomes.answered"] == 2
    assert figures["champion.refused"] == 1
    assert figures["shadow.dem.count"] == 2
    assert figures["shadow.dem.difference_m"] > 0
    assert 0 < figures["shadow.map.differing_share"] <= 1
    assert figures["champion.mean_s"] > 0
    assert figures["shadow.mean_s"] > 0
    other = Comparison(model)
    other.take("1", "2", {"a": counted.snapshot(source)})
    assert other.write(other.take("1", "2", {"b": counted.snapshot(source)})) == run_id
    again = at_server.get_run(run_id).data.metrics
    assert again["champion.answered"] == 4
    assert again["shadow.dem.difference_m"] == pytest.approx(figures["shadow.dem.difference_m"])
    assert at_server.get_model_version(model, "2").tags[RUN_TAG] == run_id

    # A failed one by hand takes the place of nobody; no alias, no challenger.
    at_server.set_registered_model_alias(model, registry.CHALLENGER, "3")
    assert poll() == ("1", None)
    assert [r.version for r in source.refused] == ["3"]
    registry.challenge(model, 2)
    assert poll() == ("1", "2")
    registry.challenge(model, None)
    assert poll() == ("1", None)
    assert source.refused == ()

    # It wins: the alias goes with the promotion.
    registry.challenge(model, 2)
    assert poll() == ("1", "2")
    registry.promote(model, 2)
    assert poll() == ("2", None)
    assert registry.challenger(model) is None
    assert registry.rollback(model) == 1
    assert poll() == ("1", None)
