from __future__ import annotations

import dataclasses
import datetime as dt

import numpy as np
import pytest

from mm_model.conditions import (
    FEATURES,
    GROUPS,
    NOTHING,
    OWNERS,
    Conditions,
    parse_conditions,
    stack_features,
)
from mm_model.errors import RequestError

ALL = Conditions(10, dt.date(2024, 7, 9), 55, 140, 48.5)


def test_groups_cover_the_features_once() -> None:
    covered = [i for part in GROUPS.values() for i in range(part.start, part.stop)]
    assert covered == list(range(FEATURES))
    assert [list(GROUPS)[i] for i in OWNERS] == [
        name for name, part in GROUPS.items() for _ in range(part.stop - part.start)
    ]


def test_nothing_known_is_nothing_said() -> None:
    assert not Conditions().features().any()


@pytest.mark.parametrize(
    ("group", "known"),
    [
        ("gsd", {"gsd_m": 10}),
        ("date", {"date": dt.date(2023, 1, 1)}),
        ("sun", {"sun_elevation_deg": 0, "sun_azimuth_deg": 0}),
        ("latitude", {"latitude_deg": 0}),
    ],
)
def test_each_part_speaks_for_itself_alone(group: str, known: dict) -> None:
    """A known 0 (or 10 m) is not the same as unknown."""
    found = Conditions(**known).features()
    assert found[GROUPS[group]][0] == 1
    assert not np.delete(found, np.arange(FEATURES)[GROUPS[group]]).any()
    whole = ALL.features()
    names = {f.name for f in dataclasses.fields(Conditions)} & set(known)
    without = dataclasses.replace(ALL, **dict.fromkeys(names)).features()
    assert not without[GROUPS[group]].any()
    others = np.delete(np.arange(FEATURES), np.arange(FEATURES)[GROUPS[group]])
    assert (without[others] == whole[others]).all()


def test_season_is_a_circle_and_the_year_means_nothing() -> None:
    def of(year: int, month: int, day: int) -> np.ndarray:
        return Conditions(date=dt.date(year, month, day)).features()

    assert np.abs(of(2023, 12, 31) - of(2024, 1, 1)).max() < 0.03
    assert np.abs(of(2023, 7, 1) - of(2021, 7, 1)).max() == 0
    assert np.abs(of(2024, 1, 15) - of(2024, 7, 15)).max() > 1.5


def test_the_sun_s_azimuth_turns_all_the_way_round() -> None:
    def of(azimuth: float) -> np.ndarray:
        return Conditions(sun_elevation_deg=30, sun_azimuth_deg=azimuth).features()

    assert np.abs(of(359) - of(1)).max() < 0.07
    assert np.abs(of(-90) - of(270)).max() < 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        {"gsd_m": 0},
        {"gsd_m": float("nan")},
        {"latitude_deg": 95},
        {"sun_elevation_deg": 91, "sun_azimuth_deg": 0},
        {"sun_elevation_deg": 40},
        {"sun_azimuth_deg": 40},
    ],
)
def test_what_no_scene_on_earth_has_is_refused(wrong: dict) -> None:
    with pytest.raises(RequestError) as caught:
        Conditions(**wrong)
    assert str(next(iter(wrong.values()))) in str(caught.value)


def test_texts_are_read_back_to_the_last_digit() -> None:
    odd = Conditions(1e-1 / 3, dt.date(812, 3, 4), -1 / 3, 1e-7, 0.0)
    assert parse_conditions(odd.texts()) == odd
    assert (NOTHING.texts(), parse_conditions({})) == ({}, NOTHING)
    assert parse_conditions({"gsd_m": "1E+1", "latitude_deg": "-.5"}) == Conditions(
        10, latitude_deg=-0.5
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("gsd_m", "1_0"),
        ("gsd_m", " 10"),
        ("gsd_m", "nan"),
        ("gsd_m", "1e999"),
        ("latitude_deg", "49°"),
        ("date", "2024-02-30"),
        ("date", "20240115"),
        ("date", "2024-01-15T10:30"),
        ("date", ""),
    ],
)
def test_texts_that_are_no_number_or_day_are_refused(name: str, text: str) -> None:
    with pytest.raises(RequestError, match=name):
        parse_conditions({name: text})


def test_a_stack_is_a_row_each() -> None:
    rows = stack_features([ALL, Conditions()])
    assert rows.shape == (2, FEATURES)
    assert rows.dtype == np.float32
    assert (rows[0] == ALL.features()).all()
