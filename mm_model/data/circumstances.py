"""What a grid tells of its pictures: one rule for training, evaluation and use."""

from __future__ import annotations

from dataclasses import replace

from mm_model.conditions import RANGES, Conditions
from mm_model.data.georeference import ground_sampling_m, latitude_deg
from mm_model.geo.grid import Grid
from mm_model.geo.sun import sun_position


def complete(known: Conditions, grid: Grid) -> Conditions:
    """What is known, and what follows from it and the grid; nothing that is known is changed.

    The grid tells its ground sampling distance and its latitude. A date and a latitude tell the sun
    of that day's half past ten, when optical satellites pass. A grid that lies nowhere tells
    nothing, nor does one of a distance that conditions do not know.
    """
    gsd_m, latitude = known.gsd_m, known.latitude_deg
    if gsd_m is None:
        gsd_m = ground_sampling_m(grid)
        low, high = RANGES["gsd_m"]
        gsd_m = gsd_m if gsd_m is not None and low <= gsd_m <= high else None
    if latitude is None:
        latitude = latitude_deg(grid)
    elevation, azimuth = known.sun_elevation_deg, known.sun_azimuth_deg
    if elevation is None and known.date is not None and latitude is not None:
        elevation, azimuth = sun_position(known.date, latitude)
    return replace(
        known,
        gsd_m=gsd_m,
        latitude_deg=latitude,
        sun_elevation_deg=elevation,
        sun_azimuth_deg=azimuth,
    )
