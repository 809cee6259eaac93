from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from threadpoolctl import threadpool_limits

from mm_model.config import AlignmentConfig
from mm_model.data.alignment import align
from mm_model.data.coregistration import features, find_shift
from mm_model.data.patch import Layer, Patch
from mm_model.data.prepare import prepare
from mm_model.data.sources.synthetic.sensors import Acquisition
from mm_model.data.sources.synthetic.source import CRS, render
from mm_model.data.store import PatchStore
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES, Quantity

SENSORS = tuple(
    m
    for m in MODALITIES.values()
    if m.quantity in (Quantity.REFLECTANCE, Quantity.BACKSCATTER, Quantity.LAND_COVER)
    and m.gsd_m == 10
)
MAP = next(m for m in SENSORS if m.is_categorical)
RADAR = next(m for m in SENSORS if m.quantity is Quantity.BACKSCATTER)
HEIGHT, WIDTH, MARGIN = 96, 80, 8
CORNER = (325_000.0, 7_450_000.0)  # a part of the synthetic Earth with structure in every layer


@pytest.fixture(scope="module")
def wide():
    grid = Grid(
        CRS, (10.0, 0.0, CORNER[0], 0.0, -10.0, CORNER[1]), HEIGHT + 2 * MARGIN, WIDTH + 2 * MARGIN
    )
    return grid, render(7, grid, SENSORS, Acquisition.draw(3, 48.0))


def patch_of(wide, moves=()):
    """The middle; content of the layers named in `moves` lies (rows, cols) farther."""
    grid, layers = wide
    cut = {}
    for name, layer in layers.items():
        rows, cols = dict(moves).get(name, (0, 0))
        window = (
            slice(MARGIN - rows, MARGIN - rows + HEIGHT),
            slice(MARGIN - cols, MARGIN - cols + WIDTH),
        )
        cut[name] = replace(layer, values=layer.values[:, *window], valid=layer.valid[window])
    return Patch("p", "place", "test", grid.window(MARGIN, MARGIN, HEIGHT, WIDTH), 10.0, cut)


def shifts(patch, action="keep", max_shift_px=1.5):
    return align(patch, SENSORS, AlignmentConfig(action=action, max_shift_px=max_shift_px))


@pytest.mark.parametrize("modality", SENSORS[1:], ids=lambda m: m.name)
@pytest.mark.parametrize("made", [(3, -2), (-3, 1)])
def test_a_known_shift_between_any_sensors_is_found(wide, modality, made):
    before = shifts(patch_of(wide))[1][modality.name]
    after = shifts(patch_of(wide, {modality.name: made}))[1][modality.name]
    assert after["shift_row_px"] - before["shift_row_px"] == pytest.approx(made[0], abs=0.3)
    assert after["shift_col_px"] - before["shift_col_px"] == pytest.approx(made[1], abs=0.3)


def test_a_fraction_of_a_pixel_is_found(wide):
    patch = patch_of(wide)
    optical = SENSORS[0]
    layer = patch.layers[optical.name]
    rows, cols = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)
    turn = np.exp(-2j * np.pi * (rows * 0.4 - cols * 1.3))
    moved = np.fft.irfft2(np.fft.rfft2(layer.values) * turn, s=(HEIGHT, WIDTH)).astype(np.float32)
    first, second = (features(Layer(v, layer.valid), optical, 10.0) for v in (layer.values, moved))
    shift = find_shift(first, second)
    assert (shift.row_px, shift.col_px) == pytest.approx((0.4, -1.3), abs=0.05)


def test_exchanging_the_layers_turns_the_shift_round(wide):
    patch = patch_of(wide, {MAP.name: (2, -3)})
    first, second = (features(patch.layers[m.name], m, 10.0) for m in (SENSORS[0], MAP))
    there, back = find_shift(first, second), find_shift(second, first)
    assert (there.row_px, there.col_px) == pytest.approx((-back.row_px, -back.col_px), abs=0.3)


def test_gaps_of_both_layers_do_not_pull_the_shift(wide):
    patch = patch_of(wide, {MAP.name: (2, -3)})
    whole = shifts(patch)[1][MAP.name]
    valid = np.ones((HEIGHT, WIDTH), bool)
    valid[:30, 25:60] = valid[70:, :20] = False
    layers = {
        n: Layer(np.where(valid, y.values, 77).astype(y.values.dtype), valid)
        for n, y in patch.layers.items()
    }
    gappy = shifts(replace(patch, layers=layers))[1][MAP.name]
    for axis in ("shift_row_px", "shift_col_px"):
        assert gappy[axis] == pytest.approx(whole[axis], abs=0.3)


def test_where_nothing_is_shared_the_shift_is_unknown_and_nothing_is_done(wide):
    patch = patch_of(wide)
    rng = np.random.default_rng(0)
    layer = patch.layers[RADAR.name]
    noise = Layer(rng.normal(-12, 3, layer.values.shape).astype(np.float32), layer.valid)
    flat = Layer(np.full_like(layer.values, -12), layer.valid)
    hidden = Layer(layer.values, np.zeros_like(layer.valid))
    for other in (noise, flat, hidden):
        given = replace(patch, layers={**patch.layers, RADAR.name: other})
        kept, columns = shifts(given, "exclude", 0.1)
        assert np.isnan(columns[RADAR.name]["shift_row_px"])
        assert RADAR.name in kept.layers


def test_correcting_brings_the_content_back_and_records_by_how_much(wide):
    right, made = patch_of(wide), (3, -2)
    wrong = patch_of(wide, {MAP.name: made})
    dated = replace(wrong.layers[MAP.name], acquired_at="2020-06-01", native_gsd_m=20.0)
    wrong = replace(wrong, layers={**wrong.layers, MAP.name: dated})
    mended, columns = shifts(wrong, "correct")
    row = columns[MAP.name]
    assert (row["moved_rows_px"], row["moved_cols_px"]) == (-3, 2)
    assert np.hypot(row["shift_row_px"], row["shift_col_px"]) < 1
    layer = mended.layers[MAP.name]
    assert (layer.acquired_at, layer.native_gsd_m) == ("2020-06-01", 20.0)
    assert layer.valid.sum() == (HEIGHT - 3) * (WIDTH - 2)
    assert (layer.values == right.layers[MAP.name].values)[:, layer.valid].all()


def test_excluding_leaves_the_layer_out_and_the_others_say_so(wide):
    kept, columns = shifts(patch_of(wide, {MAP.name: (3, -2)}), "exclude")
    assert MAP.name not in kept.layers
    assert len(kept.layers) == len(SENSORS) - 1 == len(columns)
    assert all(c["excluded_layers"].startswith(f"{MAP.name} +") for c in columns.values())


def test_within_the_limit_nothing_changes(wide):
    patch = patch_of(wide, {MAP.name: (3, -2)})
    for action in ("correct", "exclude"):
        kept, columns = shifts(patch, action, max_shift_px=5)
        assert kept.layers == patch.layers
        assert columns[MAP.name]["moved_rows_px"] == 0


class OnePatch:
    def __init__(self, patch):
        self.patch = patch

    def units(self):
        from mm_model.data.patch import Unit

        return [Unit("one", "1")]

    def read(self, unit):
        yield self.patch


def test_what_is_measured_does_not_depend_on_the_number_of_threads(wide, tmp_path):
    found = []
    for threads in (1, 2):
        out = tmp_path / str(threads)
        with threadpool_limits(threads, "blas"):
            prepare(
                OnePatch(patch_of(wide)),
                out,
                SENSORS,
                shard_patches=4,
                min_valid_fraction=0.5,
                alignment=AlignmentConfig(action="keep", max_shift_px=1.5),
            )
        found.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert found[0] == found[1]


def test_the_index_holds_what_was_measured_and_done(wide, tmp_path):
    prepare(
        OnePatch(patch_of(wide, {MAP.name: (3, -2)})),
        tmp_path / "patches",
        SENSORS,
        shard_patches=4,
        min_valid_fraction=0.5,
        alignment=AlignmentConfig(action="correct", max_shift_px=1.5),
    )
    index = PatchStore(tmp_path / "patches").index.set_index("modality")
    assert pd.isna(index.loc[SENSORS[0].name, "shift_reference"])
    assert (index.loc[[m.name for m in SENSORS[1:]], "shift_reference"] == SENSORS[0].name).all()
    assert index.loc[MAP.name, "moved_rows_px"] == -3
    assert index.loc[MAP.name, "valid_fraction"] < 1
    assert index.loc[MAP.name, "shift_confidence"] > 8
