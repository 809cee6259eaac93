"""Which modalities a regime hides, and that nothing else changes."""

import itertools
from collections import Counter

import numpy as np
from bench_fixtures import NAMES, TRAIN, make_regime, make_store

from benchmarks.model.regimes import UNSEEN, make_view, show_pair


def test_exactly_two_are_shown_and_never_the_unseen_pair():
    show = show_pair(NAMES, UNSEEN)
    shown = Counter(frozenset(show(f"patch-{i}", NAMES)) for i in range(600))
    every = {frozenset(p) for p in itertools.combinations(NAMES, 2)}
    assert set(shown) == every - {UNSEEN}
    assert min(shown.values()) > 600 / len(shown) / 2


def test_the_control_shows_every_pair():
    shown = {frozenset(show_pair(NAMES)(f"patch-{i}", NAMES)) for i in range(600)}
    assert shown == {frozenset(p) for p in itertools.combinations(NAMES, 2)}


def test_a_patch_shows_the_same_whenever_it_is_asked_and_only_what_it_has():
    show = show_pair(NAMES, UNSEEN)
    assert show("p1", NAMES) == show("p1", NAMES)
    assert set(show("p1", ("rgb", "sar"))) == {"rgb", "sar"}
    assert not show("p1", UNSEEN)
    assert not show("p1", ("rgb",))


def test_a_view_hides_layers_and_keeps_the_pixels_of_the_others(tmp_path):
    whole = make_store(tmp_path / "whole", 0, TRAIN, lambda i: NAMES if i % 9 else ("rgb",))
    view = make_view(whole, show_pair(NAMES, UNSEEN), tmp_path / "view")
    at = {patch_id: i for i, patch_id in enumerate(whole.patch_ids)}
    assert len(view) == TRAIN - TRAIN // 9
    for position, patch_id in enumerate(view.patch_ids):
        layers = view.read(position).layers
        assert len(layers) == 2
        assert set(layers) != UNSEEN
        for name, layer in layers.items():
            original = whole.read(at[patch_id]).layers[name]
            np.testing.assert_array_equal(layer.values, original.values)
            np.testing.assert_array_equal(layer.valid, original.valid)


def test_a_regime_of_a_view_has_no_patch_and_no_set_with_the_unseen_pair(tmp_path):
    whole = make_store(tmp_path / "whole", 0, TRAIN)
    view = make_view(whole, show_pair(NAMES, UNSEEN), tmp_path / "view")
    regime = make_regime(tmp_path, view)
    assert not regime.positions_with(UNSEEN)
    assert not any(s >= UNSEEN for s in regime.sets)
    assert len(regime.positions_with(("rgb", "sar"))) > 0


def test_a_view_may_be_made_again(tmp_path):
    whole = make_store(tmp_path / "whole", 0, TRAIN)
    first = make_view(whole, show_pair(NAMES), tmp_path / "view").index
    again = make_view(whole, show_pair(NAMES), tmp_path / "view").index
    assert first.equals(again)
