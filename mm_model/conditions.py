"""Conditions: what is known of a scene besides its images, each part optional.

A model gets them as features in which 0 everywhere means that nothing is known, so that any part
may be left out in training and in use.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from mm_model.errors import RequestError

GROUPS: Mapping[str, slice] = MappingProxyType(
    {"gsd": slice(0, 2), "date": slice(2, 5), "sun": slice(5, 9), "latitude": slice(9, 12)}
)
"""Which features belong to which part; the first of each says that the part is known."""

FEATURES = 12
"""K: width of the features."""

OWNERS = [i for i, s in enumerate(GROUPS.values()) for _ in range(s.stop - s.start)]
"""Number of the part that each feature belongs to."""

RANGES: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "gsd_m": (0.01, 10_000.0),
        "sun_elevation_deg": (-90.0, 90.0),
        "sun_azimuth_deg": (-360.0, 360.0),
        "latitude_deg": (-90.0, 90.0),
    }
)
"""Least and greatest value of what is a number."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}", re.ASCII)


@dataclass(frozen=True)
class Conditions:
    """Circumstances of one scene; None is unknown.

    Attributes:
        gsd_m: ground sampling distance, in metres.
        date: of the pictures; the model sees the season, not the year.
        sun_elevation_deg: above the horizon.
        sun_azimuth_deg: clockwise from north; known if and only if the elevation is.
        latitude_deg: north positive.

    Raises:
        RequestError: a value that no scene on Earth has, or half of the sun's position.
    """

    gsd_m: float | None = None
    date: dt.date | None = None
    sun_elevation_deg: float | None = None
    sun_azimuth_deg: float | None = None
    latitude_deg: float | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN, too
                raise RequestError(name, got=value, allowed=f"{low:g} to {high:g}")
        if (self.sun_elevation_deg is None) != (self.sun_azimuth_deg is None):
            raise RequestError(
                "sun_elevation_deg and sun_azimuth_deg",
                got=f"{self.sun_elevation_deg} and {self.sun_azimuth_deg}",
                allowed="both, or neither",
            )

    def texts(self) -> dict[str, str]:
        """Each known part by its name, as `parse_conditions` reads it; exact."""
        known = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: str(value) for name, value in known.items() if value is not None}

    def features(self) -> NDArray[np.float32]:
        """[K], all within −4 and 4 for distances of 0.2 m to 500 m."""
        found = np.zeros(FEATURES, np.float32)
        if self.gsd_m is not None:
            found[GROUPS["gsd"]] = 1, math.log2(self.gsd_m / 10) / 1.5
        if self.date is not None:
            phase = 2 * math.pi * self.date.timetuple().tm_yday / 365.25
            found[GROUPS["date"]] = 1, math.cos(phase), math.sin(phase)
        if self.sun_elevation_deg is not None and self.sun_azimuth_deg is not None:
            up, turn = math.radians(self.sun_elevation_deg), math.radians(self.sun_azimuth_deg)
            flat = math.cos(up)
            found[GROUPS["sun"]] = (
                1,
                2 * math.sin(up),
                2 * flat * math.sin(turn),
                2 * flat * math.cos(turn),
            )
        if self.latitude_deg is not None:
            north = math.radians(self.latitude_deg)
            found[GROUPS["latitude"]] = 1, 2 * math.sin(north), 2 * math.cos(north)
        return found


NOTHING = Conditions()
"""Nothing is known."""


def parse_conditions(texts: Mapping[str, str]) -> Conditions:
    """Conditions from texts by name: a date as YYYY-MM-DD, numbers as decimals.

    Raises:
        RequestError: a text is no date or number, or `Conditions` refuses it.
    """
    known: dict[str, float] = {}
    for name, (low, high) in RANGES.items():
        text = texts.get(name)
        if text is None:
            continue
        if not _NUMBER.fullmatch(text):
            allowed = f"a number from {low:g} to {high:g}"
            raise RequestError(name, got=repr(text[:40]), allowed=allowed)
        known[name] = float(text)
    return Conditions(date=_date(texts["date"]) if "date" in texts else None, **known)


def _date(text: str) -> dt.date:
    try:
        # Alone, fromisoformat takes weeks and days without dashes, too.
        return dt.date.fromisoformat(text if _DATE.fullmatch(text) else "")
    except ValueError:
        raise RequestError(
            "date", got=repr(text[:40]), allowed="a day of the calendar, as YYYY-MM-DD"
        ) from None


def stack_features(conditions: Sequence[Conditions]) -> NDArray[np.float32]:
    """[B, K] of B scenes."""
    return np.stack([c.features() for c in conditions])
