"""Pictures: what a colour means, and that sheets come out whole and the same."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread

from mm_model.errors import LayerError
from mm_model.modalities import MODALITIES, Band, Modality, Quantity
from mm_model.pictures import Panel, caption, robust_limits, save_sheet, to_rgb

H, W = 9, 14
RNG = np.random.default_rng(5)


def layer(modality, shape=(H, W)):
    if modality.is_categorical:
        return RNG.choice(modality.class_codes, (1, *shape)).astype(np.uint8)
    low, high = modality.display_range
    return RNG.uniform(low, high, (len(modality.bands), *shape)).astype(np.float32)


@pytest.mark.parametrize("modality", MODALITIES.values(), ids=str)
def test_every_modality_becomes_colours(modality):
    values = layer(modality)
    colors = to_rgb(values, np.ones((H, W), bool), modality)
    assert colors.shape == (H, W, 3)
    assert colors.dtype == np.uint8
    assert np.ptp(colors.astype(int)) > 100


@pytest.mark.parametrize("modality", MODALITIES.values(), ids=str)
def test_an_invalid_pixel_is_hatched_whatever_it_holds(modality):
    values, valid = layer(modality), RNG.random((H, W)) > 0.5
    filled = values.copy()
    filled[:, ~valid] = 0 if modality.is_categorical else np.nan
    colors = to_rgb(values, valid, modality)
    assert (to_rgb(filled, valid, modality) == colors).all()
    assert {tuple(c) for c in colors[~valid]} == {(96, 96, 96), (208, 208, 208)}


def test_classes_have_their_colours():
    modality = next(m for m in MODALITIES.values() if m.is_categorical)
    codes = np.array([modality.class_codes], np.uint8)[None]
    colors = to_rgb(codes, np.ones(codes.shape[1:], bool), modality)
    assert [f"#{bytes(c).hex()}" for c in colors[0]] == [c.color for c in modality.classes]


def test_an_unknown_class_is_named():
    modality = next(m for m in MODALITIES.values() if m.is_categorical)
    with pytest.raises(LayerError, match="77"):
        to_rgb(np.full((1, 2, 3), 77, np.uint8), np.ones((2, 3), bool), modality)


def test_wrong_bands_are_refused():
    with pytest.raises(LayerError, match="values"):
        to_rgb(np.zeros((2, H, W)), np.ones((H, W), bool), MODALITIES["rgb"])


def test_gray_is_linear_and_clipped():
    modality = Modality("x", "X", Quantity.TEMPERATURE, (Band("x"),), 10, (200.0, 300.0))
    values = np.array([[[100.0, 200, 250, 300, 400]]])
    colors = to_rgb(values, np.ones((1, 5), bool), modality)
    assert colors[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    narrower = to_rgb(values, np.ones((1, 5), bool), modality, (240.0, 250.0))
    assert narrower[0, :, 0].tolist() == [0, 0, 255, 255, 255]


def test_a_radar_composite_is_what_its_caption_says():
    sar = next(m for m in MODALITIES.values() if m.quantity is Quantity.BACKSCATTER)
    assert caption(sar) == (
        "red = VV -25 to 0 dB, green = VH -31 to -6 dB, blue = VV − VH 0 to 15 dB"
    )
    values = np.array([0.0, -31])[:, None, None]
    assert to_rgb(values, np.ones((1, 1), bool), sar)[0, 0].tolist() == [255, 0, 255]


def test_of_many_bands_three_are_shown_and_named():
    many = next(m for m in MODALITIES.values() if len(m.bands) > 3)
    values = np.zeros((len(many.bands), 1, 1))
    values[many.band_names.index("B12")] = 1
    assert "red = B12" in caption(many)
    assert to_rgb(values, np.ones((1, 1), bool), many)[0, 0].tolist() == [255, 0, 0]


def test_robust_limits():
    values = np.arange(1000.0).reshape(1, 20, 50)
    low, high = robust_limits([(values, np.ones((20, 50), bool))])
    assert (low, high) == pytest.approx((9.99, 989.01))
    assert robust_limits([(values, np.zeros((20, 50), bool))]) is None
    assert robust_limits([(np.full((1, 2, 2), 7.0), np.ones((2, 2), bool))]) == (6.5, 7.5)


def sheet_rows():
    rng = np.random.default_rng(9)
    rows = []
    for _ in range(2):
        row = [
            Panel(layer(m), rng.random((H, W)) > 0.1, m, "observed") for m in MODALITIES.values()
        ]
        rows.append([*row[:3], None, *row[3:]])
    return rows


def test_a_sheet_is_the_same_twice_and_shows_its_panels(tmp_path):
    rows = sheet_rows()
    save_sheet(tmp_path / "deep" / "a.png", rows, "Title")
    save_sheet(tmp_path / "b.png", rows, "Title")
    first = tmp_path / "deep" / "a.png"
    assert first.read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"Software" not in first.read_bytes()
    drawn = {tuple(c) for c in (imread(first)[..., :3] * 255).round().astype(int).reshape(-1, 3)}
    shown = to_rgb(rows[0][0].values, rows[0][0].valid, rows[0][0].modality)
    assert {tuple(map(int, c)) for c in shown.reshape(-1, 3)} <= drawn


def test_a_sheet_survives_layers_without_any_valid_pixel(tmp_path):
    nothing = np.zeros((H, W), bool)
    row = [Panel(layer(m), nothing, m) for m in MODALITIES.values()]
    save_sheet(tmp_path / "a.png", [row], "Nothing")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_a_sheet_without_panels_is_refused(tmp_path):
    with pytest.raises(LayerError, match="no panel"):
        save_sheet(tmp_path / "a.png", [[None]], "Nothing")


def test_importing_pictures_is_light():
    code = "import sys, mm_model.pictures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
