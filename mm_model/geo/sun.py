"""Where the sun stands."""

from __future__ import annotations

import datetime as dt
import math

_OBLIQUITY_DEG = 23.4
_SOLSTICE = 172  # day of the year


def sun_position(date: dt.date, latitude_deg: float, hour: float = 10.5) -> tuple[float, float]:
    """Elevation above the horizon (negative below it) and azimuth (clockwise from north), in °.

    Right to a degree: the orbit counts as a circle, and air does not bend light.

    Args:
        date: the day.
        latitude_deg: south is negative.
        hour: local solar time; most optical satellites pass at about half past ten.
    """
    day = date.timetuple().tm_yday
    season = math.cos(2 * math.pi * (day - _SOLSTICE) / 365.25)
    declination = math.radians(_OBLIQUITY_DEG) * season
    latitude, angle = math.radians(latitude_deg), math.radians(15 * (hour - 12))
    east = -math.cos(declination) * math.sin(angle)
    meridian = math.cos(declination) * math.cos(angle)
    north = math.cos(latitude) * math.sin(declination) - math.sin(latitude) * meridian
    up = math.sin(latitude) * math.sin(declination) + math.cos(latitude) * meridian
    elevation = math.atan2(up, math.hypot(east, north))
    return math.degrees(elevation), math.degrees(math.atan2(east, north)) % 360
