"""The bundle in the box as a method: judged by its own normalisation, and by days of a place."""

import numpy as np
import pytest
import torch

from benchmarks.model.methods import Box, applies, factories
from benchmarks.model.regimes import BOX, NAMES, Scale, open_regime
from benchmarks.model.season import evaluate_season

LITTLE = Scale(train_places=2, test_places=2, reference_places=2, joint=4)


@pytest.fixture(scope="module")
def regime(tmp_path_factory):
    return open_regime(BOX, LITTLE, tmp_path_factory.mktemp("data"))


def test_it_is_judged_by_its_own_normalisation_and_untrained(regime):
    method = Box(regime)
    assert method.model.codec.modalities == regime.codec.modalities
    for name, buffer in regime.codec.named_buffers():
        assert torch.equal(buffer, method.model.codec.get_buffer(name)), name
    before = [p.clone() for p in method.model.parameters()]
    effort = method.train(regime, seed=0, budget_s=1.0, label="")
    assert effort.samples > 100_000
    assert all(torch.equal(a, b) for a, b in zip(before, method.model.parameters(), strict=True))


def test_it_meets_no_regime_but_its_own():
    assert {r for r in NAMES if applies(BOX, r)} == {BOX}
    assert [m for m in factories() if applies(m, BOX)] == [BOX, "nearest_colour", "mean"]


def test_season_is_measured_against_days_of_the_same_places(regime):
    method = Box(regime)
    one, again, other = (evaluate_season(method, regime, places=2, seed=s) for s in (0, 0, 1))
    assert one == again
    # What is real does not depend on the seed of the samples.
    for name in ("real_spread", "mean_real_spread", "real_moved"):
        assert one[name] == other[name] > 0
    assert one["spread"] != other["spread"]
    assert one["moved"] > 0.01  # the dates reach the model
    assert one["spread_share"] == pytest.approx(one["spread"] / one["real_spread"])


def test_what_hears_no_date_is_not_moved_by_it(regime, monkeypatch):
    method = Box(regime)
    estimate, decode = method.model.estimate_scene, method.model.understand
    monkeypatch.setattr(
        method.model, "estimate_scene", lambda *a: estimate(*a[:-1], torch.zeros_like(a[-1]))
    )
    monkeypatch.setattr(
        method.model, "understand", lambda *a: decode(*a[:-1], torch.zeros_like(a[-1]))
    )
    found = evaluate_season(method, regime, places=2, seed=0)
    assert found["moved"] == pytest.approx(0, abs=1e-6)
    assert found["real_moved"] > 0.01
    assert np.isfinite(found["spread_share"])
