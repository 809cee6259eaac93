"""Reflectance of materials and leaves, and radar backscatter, of the synthetic Earth."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from mm_model.data.sources.synthetic.cover import Cover
from mm_model.data.sources.synthetic.noise import F32
from mm_model.modalities import Band

_NM = (443, 492, 560, 620, 665, 704, 740, 783, 865, 945, 1380, 1614, 2202)


class Material(IntEnum):
    """What lies under, or instead of, plants (order of `_MATERIALS`)."""

    BROWN_SOIL = 0
    PALE_SAND = 1
    RED_SOIL = 2
    ROCK = 3
    CLEAR_WATER = 4
    TURBID_WATER = 5
    ASPHALT = 6
    RED_ROOF = 7
    GREY_ROOF = 8
    WHITE_ROOF = 9
    CONCRETE = 10
    ICE = 11
    LICHEN = 12
    BROAD_LEAF = 13
    NEEDLE = 14
    GRASS_LEAF = 15
    STRAW = 16
    FLOWER = 17
    SNOW = 18


# Typical reflectances in the manner of public spectral libraries, rounded; one row a material.
_MATERIALS = np.array(
    [
        [0.055, 0.075, 0.105, 0.135, 0.15, 0.17, 0.19, 0.21, 0.24, 0.27, 0.33, 0.36, 0.32],
        [0.15, 0.19, 0.26, 0.32, 0.35, 0.37, 0.39, 0.41, 0.44, 0.46, 0.53, 0.57, 0.53],
        [0.05, 0.065, 0.095, 0.15, 0.185, 0.205, 0.22, 0.235, 0.29, 0.31, 0.37, 0.41, 0.36],
        [0.11, 0.13, 0.15, 0.17, 0.18, 0.19, 0.20, 0.21, 0.22, 0.23, 0.26, 0.28, 0.26],
        [0.06, 0.055, 0.042, 0.022, 0.015, 0.012, 0.009, 0.007, 0.004, 0.003, 0.001, 0.001, 0.001],
        [0.07, 0.10, 0.14, 0.12, 0.10, 0.085, 0.045, 0.04, 0.03, 0.015, 0.004, 0.004, 0.003],
        [0.07, 0.08, 0.09, 0.10, 0.105, 0.11, 0.115, 0.12, 0.13, 0.135, 0.15, 0.16, 0.16],
        [0.06, 0.075, 0.11, 0.21, 0.26, 0.28, 0.29, 0.30, 0.32, 0.33, 0.36, 0.38, 0.34],
        [0.13, 0.145, 0.16, 0.17, 0.17, 0.18, 0.18, 0.19, 0.20, 0.20, 0.22, 0.23, 0.23],
        [0.40, 0.44, 0.47, 0.48, 0.49, 0.49, 0.49, 0.49, 0.48, 0.47, 0.42, 0.40, 0.36],
        [0.15, 0.18, 0.21, 0.24, 0.25, 0.26, 0.27, 0.28, 0.29, 0.30, 0.32, 0.33, 0.31],
        [0.80, 0.80, 0.78, 0.74, 0.70, 0.66, 0.61, 0.56, 0.44, 0.30, 0.06, 0.03, 0.02],
        [0.10, 0.13, 0.17, 0.19, 0.20, 0.23, 0.27, 0.30, 0.34, 0.35, 0.36, 0.36, 0.26],
        [0.015, 0.02, 0.045, 0.028, 0.02, 0.075, 0.25, 0.36, 0.42, 0.41, 0.25, 0.19, 0.08],
        [0.012, 0.015, 0.028, 0.02, 0.016, 0.042, 0.14, 0.20, 0.235, 0.23, 0.14, 0.10, 0.045],
        [0.03, 0.035, 0.085, 0.05, 0.038, 0.13, 0.34, 0.45, 0.50, 0.48, 0.30, 0.22, 0.11],
        [0.07, 0.10, 0.16, 0.22, 0.25, 0.27, 0.29, 0.31, 0.35, 0.37, 0.40, 0.40, 0.30],
        [0.05, 0.06, 0.24, 0.26, 0.24, 0.29, 0.40, 0.46, 0.50, 0.48, 0.30, 0.22, 0.11],
        [0.92, 0.91, 0.90, 0.88, 0.87, 0.85, 0.83, 0.81, 0.77, 0.62, 0.20, 0.07, 0.05],
    ],
    np.float32,
)

# Backscatter of a cover, VV and VH in dB, at 35° on level ground.
_SIGMA_DB = np.array(
    [
        [-19.5, -27.5],  # water
        [-8.0, -13.5],  # broadleaf
        [-9.0, -14.8],  # conifer
        [-11.3, -17.3],  # shrub
        [-13.0, -20.0],  # grass
        [-11.2, -18.2],  # crop
        [-3.5, -11.5],  # roof
        [-15.5, -23.0],  # paved
        [-8.5, -15.5],  # yard
        [-15.0, -23.5],  # bare
        [-10.5, -17.0],  # ice
        [-9.5, -18.5],  # wetland
        [-7.0, -13.0],  # mangrove
        [-13.5, -19.3],  # moss
    ],
    np.float32,
)


def spectrum(band: Band) -> F32:
    """Reflectance [materials] of every `Material`, averaged over a band's width."""
    assert band.center_nm is not None
    half = 0.5 * (band.width_nm or 0)
    nm = np.linspace(band.center_nm - half, band.center_nm + half, 9)
    return np.array([np.interp(nm, _NM, row).mean() for row in _MATERIALS], np.float32)


def canopy_opacity(band: Band) -> float:
    """How fast a canopy hides its ground as leaves are added, for the light of a band.

    Leaves absorb visible light at once and pass half of the near infrared on, so that near
    infrared tells dense canopies apart where red no longer does.
    """
    assert band.center_nm is not None
    return 0.9 if band.center_nm < 690 else 0.5


def backscatter(polarisation: str) -> F32:
    """Mean backscatter [covers] in dB of every `Cover`; VV and HH alike, VH and HV alike."""
    crossed = polarisation[0] != polarisation[-1]
    return _SIGMA_DB[: len(Cover), 1 if crossed else 0]
