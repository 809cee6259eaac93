"""What a grid tells of its pictures, and what it does not."""

import datetime as dt
import weakref
from dataclasses import replace

import pytest

from mm_model.conditions import NOTHING, Conditions
from mm_model.data.circumstances import complete
from mm_model.data.georeference import ground_sampling_m, latitude_deg
from mm_model.data.patch import Patch
from mm_model.geo.grid import Grid
from mm_model.geo.sun import sun_position
from mm_model.training.dataset import conditions_of

UTM = Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_400_000.0), 24, 40)
DAY = dt.date(2024, 1, 15)
LOCAL = 'LOCAL_CS["yard",UNIT["metre",1]]'


def test_a_grid_tells_distance_and_latitude_and_no_date():
    found = complete(NOTHING, UTM)
    assert found.gsd_m == 10
    assert found.latitude_deg == pytest.approx(48.75, abs=0.05)
    assert found.date is found.sun_elevation_deg is None
    degrees = Grid("EPSG:4326", (0.001, 0, 11.0, 0, -0.001, 60.012), 24, 40)
    assert complete(NOTHING, degrees).gsd_m == pytest.approx(111.3 * 0.5**0.5, rel=1e-3)


def test_the_metres_of_web_mercator_are_not_those_of_the_ground():
    mercator = Grid("EPSG:3857", (10, 0, 1_500_000, 0, -10, 8_399_738), 20, 30)  # 60 degrees north
    assert complete(NOTHING, mercator).gsd_m == pytest.approx(5, rel=5e-3)
    assert complete(NOTHING, UTM).gsd_m == 10


def test_a_date_and_a_latitude_tell_the_sun():
    found = complete(Conditions(date=DAY), UTM)
    assert (found.sun_elevation_deg, found.sun_azimuth_deg) == sun_position(DAY, found.latitude_deg)
    nowhere = replace(UTM, crs="")
    assert complete(Conditions(date=DAY), nowhere) == Conditions(date=DAY)
    told = complete(Conditions(date=DAY, latitude_deg=-30), nowhere)
    assert (told.sun_elevation_deg, told.sun_azimuth_deg) == sun_position(DAY, -30)


def test_what_is_known_stays():
    known = Conditions(3, DAY, 5, 6, -7)
    assert complete(known, UTM) == known
    assert complete(replace(known, gsd_m=None), UTM) == replace(known, gsd_m=10)


@pytest.mark.parametrize(
    "grid",
    [
        replace(UTM, crs=""),
        replace(UTM, crs=LOCAL),  # a plane of its own
        replace(UTM, transform=(10, 0, 1e9, 0, -10, 0)),  # beyond what its system can express
        Grid("EPSG:4326", (1, 0, 0, 0, -1, 400), 24, 40),
    ],
)
def test_a_grid_that_lies_nowhere_tells_nothing(grid):
    assert complete(NOTHING, grid) == NOTHING


def test_a_distance_that_conditions_do_not_know_is_not_told():
    world = Grid("EPSG:4326", (3.6, 0, -180, 0, -3.6, 90), 50, 100)
    assert complete(NOTHING, world).gsd_m is None
    assert complete(NOTHING, world).latitude_deg == 0


def test_training_goes_by_the_same_rule():
    patch = Patch("p", "place", "source", UTM, 10, {})
    assert conditions_of(patch) == complete(NOTHING, UTM)


def test_grids_that_were_told_of_are_not_held_for_ever():
    """Callers name as many as they like, in systems of as many characters as they like."""
    named = 'GEOGCS["{}",DATUM["d",SPHEROID["s",6378137,298.25]],UNIT["degree",0.0174532925199433]]'
    lasting = Grid("EPSG:4326", (0.001, 0, 9.0, 0, -0.001, 60.0), 24, 40)
    assert ground_sampling_m(lasting) is ground_sampling_m(replace(lasting))  # it is kept
    seen = []
    for k in range(12_000):
        grid = replace(UTM, crs="EPSG:4326", transform=(1e-4, 0, k * 1e-3, 0, -1e-4, 50.0))
        assert latitude_deg(grid) is not None
        seen.append(weakref.ref(grid))
    assert sum(grid() is not None for grid in seen) <= 10_000
    for k in range(5):
        grid = replace(lasting, crs=named.format(f"{k} " + "x" * 30_000))
        assert complete(NOTHING, grid).gsd_m == pytest.approx(ground_sampling_m(lasting), rel=1e-3)
        long = weakref.ref(grid)
        del grid
        assert long() is None
