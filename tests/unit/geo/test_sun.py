"""The sun's position: what every almanac says."""

import datetime as dt

import pytest

from mm_model.geo.sun import sun_position

MARCH, JUNE, DECEMBER = dt.date(2024, 3, 20), dt.date(2024, 6, 20), dt.date(2024, 12, 20)


@pytest.mark.parametrize(("date", "declination_deg"), [(MARCH, 0), (JUNE, 23.4), (DECEMBER, -23.4)])
@pytest.mark.parametrize("latitude_deg", [-60, -5, 38, 52])
def test_noon_is_as_high_as_latitude_and_declination_say(date, declination_deg, latitude_deg):
    elevation, azimuth = sun_position(date, latitude_deg, hour=12)
    assert elevation == pytest.approx(90 - abs(latitude_deg - declination_deg), abs=1)
    south = latitude_deg > declination_deg
    assert (azimuth - (180 if south else 0) + 180) % 360 - 180 == pytest.approx(0, abs=1e-6)


def test_mornings_mirror_afternoons():
    before, after = (sun_position(JUNE, 47, hour) for hour in (9.25, 14.75))
    assert before[0] == pytest.approx(after[0])
    assert before[1] + after[1] == pytest.approx(360)
    assert before[1] < 180  # in the east


def test_an_hour_is_fifteen_degrees_on_the_equator_at_the_equinox():
    elevation, azimuth = sun_position(MARCH, 0)
    assert elevation == pytest.approx(67.5, abs=0.5)
    assert azimuth == pytest.approx(90, abs=3)


def test_beyond_the_polar_circle_there_are_days_and_nights_of_weeks():
    assert sun_position(JUNE, 70, hour=0)[0] > 0
    assert sun_position(DECEMBER, 70, hour=12)[0] < 0
    assert sun_position(DECEMBER, -70, hour=0)[0] > 0
