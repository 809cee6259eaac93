import json
import re

import numpy as np
import pandas as pd
import pytest
from data_fixtures import make_store

from mm_model.config import SplitConfig, ValidateConfig
from mm_model.data.split import TRAIN, VALIDATION, make_splits
from mm_model.data.validate import validate
from mm_model.errors import DataError
from mm_model.modalities import MODALITIES

# Four are enough, and quicker: an expectation costs the same for each.
ALL = tuple(m for m in MODALITIES.values() if m.is_categorical or len(m.bands) < 3)[:4]
SIDE = 16


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    path = tmp_path_factory.mktemp("validate") / "store"
    index = make_store(path, 12, ALL, shape=(SIDE, SIDE)).index
    splits = make_splits(index, SplitConfig(seed=0, train=0.6, validation=0.2, margin_m=0))
    return index, splits


def judge(index, splits, folder, tolerated=0.0):
    return validate(
        index,
        splits,
        ALL,
        patch_px=SIDE,
        min_valid_fraction=0.3,
        max_shift_px=1.5,
        limits=ValidateConfig(
            max_white_share=0.8,
            max_saturated_share=0.5,
            max_days_apart=31,
            tolerated_share=tolerated,
        ),
        report=folder / "validation.json",
        docs=folder / "docs",
    )


def test_a_sound_index_passes_and_equal_data_give_an_equal_report(tables, tmp_path):
    assert judge(*tables, tmp_path) > 2 * len(ALL)
    first = (tmp_path / "validation.json").read_bytes()
    judge(*tables, tmp_path)
    assert (tmp_path / "validation.json").read_bytes() == first
    assert json.loads(first)["success"] is True


@pytest.mark.filterwarnings("error:.*match groups")
@pytest.mark.parametrize(
    ("date", "sound"),
    [
        *((d, True) for d in ("2020", "2020-06", "2020-06-01", "2020-06-01T10:20:30.5Z")),
        *((d, True) for d in ("2020-06-01T10:20", "2020-06-01T10:20:30+02:00")),
        *(
            (d, False)
            for d in ("20", "2020-6", "2020-06-01T", "2020-06-01Z", "2020T10:20", "x2020")
        ),
    ],
)
def test_dates_are_iso_8601_to_the_year_or_finer(tables, tmp_path, date, sound):
    index, splits = (pd.DataFrame(t).copy() for t in tables)
    index["acquired_at"] = date
    if sound:
        judge(index, splits, tmp_path)
    else:
        with pytest.raises(DataError, match="acquired_at"):
            judge(index, splits, tmp_path)


def test_the_page_needs_no_network(tables, tmp_path):
    judge(*tables, tmp_path)
    page = (tmp_path / "docs/index.html").read_text()
    assert not re.findall(r"""(?:src|href)=["']http|url\(["']?http|<script""", page)
    assert "must never be null" in page
    for modality in ALL:
        assert modality.name in page


def set_cell(column, value, modality=None):
    """Plant a value in one row; returns the row's key."""

    def plant(index, splits):
        rows = index.index if modality is None else index.index[index["modality"] == modality]
        row = rows[len(rows) // 2]
        index[column] = index[column].astype(object)
        index.loc[row, column] = value
        index[column] = index[column].infer_objects()
        return index.loc[row, "patch_id"]

    return plant


def move(places, to):
    def plant(index, splits):
        chosen = places(splits)
        splits.loc[chosen, "split"] = to
        return None

    return plant


def duplicate(index, splits):
    index.loc[len(index)] = index.iloc[4]
    return index.iloc[4]["patch_id"]


def drop_from_train(index, splits):
    train = splits.loc[splits["split"] == TRAIN, "patch_id"]
    gone = index["patch_id"].isin(train) & (index["modality"] == ALL[3].name)
    index.drop(index.index[gone], inplace=True)


def half_a_place(splits):
    place = splits.loc[splits["split"] == TRAIN, "place_id"].iloc[0]
    return splits.index[splits["place_id"] == place][:1]


def unsplit(index, splits):
    row = splits.index[splits["split"] == VALIDATION][0]
    patch = splits.loc[row, "patch_id"]
    splits.drop(row, inplace=True)
    return patch


def copy_of_another_place(index, splits):
    rows = index.index[index["look"].notna() & (index["modality"] == ALL[0].name)]
    other = next(r for r in rows if index.at[r, "place_id"] != index.at[rows[0], "place_id"])
    # Two of 128 bits differ, as after a change of some grey values.
    index.at[other, "look"] = f"{int(index.at[rows[0], 'look'], 16) ^ (1 | 1 << 77):032x}"
    return index.at[other, "patch_id"]


def far_date(index, splits):
    row = index.index[index["patch_id"].duplicated()][0]
    index.at[row, "acquired_at"] = "2020-08"
    return index.at[row, "patch_id"]


def shifted_content(index, splits):
    index.loc[7, ["shift_row_px", "shift_col_px"]] = 1.2, -1.3
    return index.loc[7, "patch_id"]


NUMBER, CLASS = ALL[2], next(m for m in ALL if m.is_categorical)
FAULTS = {
    "twice": (duplicate, {("compound_columns_to_be_unique", "")}),
    "low": (set_cell("min", NUMBER.valid_range[0] - 1, NUMBER.name), {("between", "min")}),
    "high": (set_cell("max", NUMBER.valid_range[1] + 1, NUMBER.name), {("between", "max")}),
    "class": (set_cell("min", 11, CLASS.name), {("in_set", "min")}),
    "thin": (set_cell("valid_fraction", 0.1), {("between", "valid_fraction")}),
    "height": (
        set_cell("height", SIDE + 1, ALL[0].name),
        {("in_set", "height"), ("between", "grids_of_patch")},
    ),
    "shifted": (set_cell("c", 0.0, ALL[0].name), {("between", "grids_of_patch")}),
    "gsd": (set_cell("gsd_m", 20.0), {("between", "pixels_per_gsd")}),
    "digest": (set_cell("sha256", "abc"), {("regex", "sha256")}),
    "date": (set_cell("acquired_at", "June"), {("regex", "acquired_at")}),
    "transform": (
        set_cell("f", np.nan),
        {("null", "pixels_per_gsd"), ("between", "grids_of_patch")},
    ),
    "mean": (set_cell("mean", np.nan), {("null", "mean")}),
    "clouds": (set_cell("white_share", 0.97), {("between", "white_share")}),
    "constant": (set_cell("saturated_share", 1.0), {("between", "saturated_share")}),
    "dates": (far_date, {("between", "days_apart")}),
    "copy": (copy_of_another_place, {("null", "near_duplicate_of")}),
    "displaced": (shifted_content, {("between", "shift_px")}),
    "unit": (
        set_cell("median", NUMBER.quantity.traits.plausible_median[1] + 1, NUMBER.name),
        {("between", "median")},
    ),
    "no split": (unsplit, {("null", "split")}),
    "torn place": (move(half_a_place, "test"), {("between", "splits_of_place")}),
    "no test": (
        move(lambda s: s.index[s["split"] == "test"], VALIDATION),
        {("contain_set", "split")},
    ),
    "odd split": (
        move(lambda s: s.index[s["split"] == VALIDATION], "holdout"),
        {("in_set", "split")},
    ),
    "unlearnable": (drop_from_train, {("contain_set", "modality")}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_fails_its_expectation_alone_and_is_named(fault, tables, tmp_path):
    plant, expected = FAULTS[fault]
    index, splits = (pd.DataFrame(t).copy() for t in tables)
    patch = plant(index, splits)
    with pytest.raises(DataError) as raised:
        judge(index, splits, tmp_path)
    report = json.loads((tmp_path / "validation.json").read_text())
    failed = [e for e in report["expectations"] if not e["success"]]
    found = {(e["expectation"], e["arguments"].get("column", "")) for e in failed}
    assert len(failed) == len(expected)
    for name, column in expected:
        assert any(name in f[0] and f[1] == column for f in found), found
    if patch:
        assert patch in str(raised.value)
    assert (tmp_path / "docs/index.html").is_file()


def test_what_is_tolerated_is_still_counted_and_named(tables, tmp_path):
    index, splits = (pd.DataFrame(t).copy() for t in tables)
    patch = far_date(index, splits)
    judge(index, splits, tmp_path, tolerated=0.2)
    report = json.loads((tmp_path / "validation.json").read_text())
    (found,) = [e for e in report["expectations"] if e["arguments"].get("column") == "days_apart"]
    assert found["success"]
    assert found["unexpected"] == 1
    assert found["rows"][0]["patch_id"] == patch


def test_shifts_are_on_the_page_by_source_and_pair(tables, tmp_path):
    index, splits = (pd.DataFrame(t).copy() for t in tables)
    rows = index.index[index["modality"] == NUMBER.name][:4]
    index.loc[rows, "shift_reference"] = CLASS.name
    index.loc[rows[:3], "shift_row_px"] = [0.3, 0.4, 0.5]
    index.loc[rows[:3], "shift_col_px"] = 0.0
    index.loc[rows[0], "moved_rows_px"] = -2
    judge(index, splits, tmp_path)
    (row,) = json.loads((tmp_path / "validation.json").read_text())["alignment"]
    assert (row["layers"], row["known"], row["median_px"], row["moved"]) == (4, 3, 0.4, 1)
    assert "<h2>Alignment</h2>" in (tmp_path / "docs/index.html").read_text()
