"""What a training that begins with a bundle takes over from it, and which bundles it refuses."""

import dataclasses
from pathlib import Path

import pytest
import torch
from training_fixtures import MAP, RGB, SAR, SELECTED, SETS, SIZE, make_model, statistics

from mm_model.bundle import Bundle, Manifest
from mm_model.errors import BundleError, ConfigError
from mm_model.modalities import MODALITIES
from mm_model.training.start import check_start, continued, join_correlations, merge_sets

PATH = Path("older/bundle")
TRAINED = {"steps": 30, "samples": 480, "seconds": 2.5}


def manifest(**provenance) -> Manifest:
    return Manifest(make_model().config, [10.0], statistics(), provenance or {"training": TRAINED})


def check(modalities=SELECTED, about=None, **size) -> None:
    check_start(about or manifest(), PATH, modalities, {**dataclasses.asdict(SIZE), **size})


@pytest.mark.parametrize("modalities", [SELECTED, (RGB, MAP), (SAR,)])
def test_its_modalities_or_some_of_them_will_do(modalities):
    check(modalities)


def test_a_modality_that_it_lacks_is_named_with_what_to_do():
    with pytest.raises(ConfigError, match=r"got dem; allowed: rgb, sar, map; .*--add dem"):
        check((RGB, SAR, MODALITIES["dem"], MAP))


def test_another_order_is_refused():
    with pytest.raises(ConfigError, match=r"order .*\['map', 'rgb'\].*\['rgb', 'map'\]"):
        check((MAP, RGB))


@pytest.mark.parametrize(
    "change",
    [{"bands": RGB.bands[::-1]}, {"quantity": MODALITIES["tir"].quantity}],
    ids=lambda c: next(iter(c)),
)
def test_a_modality_that_means_something_else_now_is_refused(change):
    with pytest.raises(ConfigError, match=r"otherwise .*got rgb"):
        check((dataclasses.replace(RGB, **change), SAR))


def test_how_a_modality_is_called_or_shown_may_change():
    check((dataclasses.replace(RGB, title="Colours", display_range=(0.0, 0.5)), SAR))


def test_another_size_is_refused():
    with pytest.raises(ConfigError, match=r"model\.size.*'dim': 32.*'dim': 16.*older/bundle"):
        check(dim=32)


def test_a_bundle_of_unknown_history_is_refused():
    with pytest.raises(BundleError, match="how long"):
        check(about=manifest(source="made by hand"))


def test_it_goes_on_with_weights_and_codec_and_learns():
    older = make_model()
    with torch.no_grad():
        for parameter in older.parameters():
            parameter.add_(torch.randn_like(parameter))
    kept = {n: t.clone() for n, t in older.state_dict().items()}
    bundle = Bundle(older.eval().requires_grad_(False), manifest())
    sets = [*SETS, {"modalities": ["rgb"], "patches": 2}]
    model = continued(bundle, sets, patch_px=40)
    assert all(torch.equal(t, kept[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert (model.patch_px, model.modalities) == (40, SELECTED)
    assert dict(model.seen_sets) == {frozenset({"rgb", "sar", "map"}): 5, frozenset({"rgb"}): 2}
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert all(torch.equal(t, kept[n]) for n, t in older.state_dict().items())


def test_equal_sets_add_up_whatever_their_order():
    a = [{"modalities": ["rgb", "sar"], "patches": 3}, {"modalities": ["map"], "patches": 1}]
    b = [{"modalities": ["sar", "rgb"], "patches": 4}, {"modalities": ["sar"], "patches": 2}]
    assert merge_sets(a, b) == [
        {"modalities": ["rgb", "sar"], "patches": 7},
        {"modalities": ["map"], "patches": 1},
        {"modalities": ["sar"], "patches": 2},
    ]
    assert merge_sets([], b)[0] == {"modalities": ["rgb", "sar"], "patches": 4}


def test_correlations_that_an_older_bundle_lacks_are_those_of_the_new_data():
    older = {"patches": 3, "modalities": {"sar": {"pixels": 1}, "rgb": {"correlation": "older"}}}
    both = {"pixels": 2, "correlation": "newer"}
    joined = join_correlations(older, {"modalities": {"sar": both, "rgb": both}})
    assert joined["modalities"] == {
        "sar": {"pixels": 1, "correlation": "newer"},
        "rgb": {"correlation": "older"},
    }
    assert joined["patches"] == 3
    assert join_correlations(older, {"modalities": {}}) == older
