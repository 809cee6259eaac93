"""Places into train, validation and test, with a margin between training and the others.

The rule. Each place gets a number in [0, 1) from a hash of (seed, place id). In order of it, the
shares of `params.yaml` decide; so a place's split does not depend on other places or on the order
of rows. Two repairs, needed only when places are few: a split that is left without a place takes
one, and test takes a place that is as rich in modalities as any, so that every translation can be
evaluated. Last, training patches within the margin of a validation or test patch become `margin`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mm_model.config import SplitConfig
from mm_model.data.georeference import to_lonlat
from mm_model.errors import DataError
from mm_model.geo.grid import Grid

TRAIN, VALIDATION, TEST, MARGIN = SPLITS = ("train", "validation", "test", "margin")
_EARTH_RADIUS_M = 6_371_008.8


def make_splits(index: pd.DataFrame, config: SplitConfig) -> pd.DataFrame:
    """Columns patch_id, place_id, split; one row a patch, in the order of first appearance.

    Raises:
        DataError: a split would be empty; the message says what to change.
    """
    patches = index.drop_duplicates("patch_id").reset_index(drop=True)
    if patches.empty:
        raise DataError("split of an empty store", remedy="run the stage prepare")
    assigned = _assign_places(_richness(index), config)
    split = patches["place_id"].map(assigned).to_numpy(dtype=object)
    held_out = split != TRAIN
    centres, radii = _discs(patches)
    near = _within(
        centres[~held_out], radii[~held_out], centres[held_out], radii[held_out], config.margin_m
    )
    split[np.flatnonzero(~held_out)[near]] = MARGIN
    if not (split == TRAIN).any():
        raise DataError(
            "split train",
            got=f"no patch farther than {config.margin_m:g} m from those of validation and test",
            remedy="lower split.margin_m, or add places that lie apart",
        )
    return pd.DataFrame(
        {"patch_id": patches["patch_id"], "place_id": patches["place_id"], "split": split}
    )


def load_split(path: Path, patch_ids: Sequence[str] | None = None) -> dict[str, list[int]]:
    """Positions in the store, by split name; every name of `SPLITS` is there.

    Args:
        path: splits.parquet.
        patch_ids: `PatchStore.patch_ids`, if it shall be checked that the two belong together.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist", remedy="run the stage split")
    table = pd.read_parquet(path)
    if patch_ids is not None and list(table["patch_id"]) != list(patch_ids):
        raise DataError(f"{path} does not belong to the store", remedy="run the stage split again")
    return {s: np.flatnonzero(table["split"] == s).tolist() for s in SPLITS}


def _richness(index: pd.DataFrame) -> dict[str, int]:
    """Place → most modalities that one of its patches has."""
    counts = index.groupby(["place_id", "patch_id"])["modality"].nunique()
    return {str(k): int(v) for k, v in counts.groupby("place_id").max().sort_index().items()}


def _assign_places(richness: dict[str, int], config: SplitConfig) -> dict[str, str]:
    """Place → train, validation or test, by the rule of this module."""
    if len(richness) < 3:
        raise DataError(
            "places to split", got=len(richness), allowed="three or more", remedy="add places"
        )
    drawn = {place: _draw(config.seed, place) for place in richness}
    assigned = {}
    for place, number in drawn.items():
        if number < config.train:
            assigned[place] = TRAIN
        else:
            assigned[place] = VALIDATION if number < config.train + config.validation else TEST

    # One rich place for testing, where another is left to learn from.
    second_best = sorted(richness.values())[-2]
    rich = [p for p in richness if richness[p] >= second_best]
    if not any(assigned[p] == TEST for p in rich):
        assigned[max(rich, key=drawn.__getitem__)] = TEST

    for split, wanted in ((TRAIN, True), (VALIDATION, config.validation > 0)):
        if wanted and split not in assigned.values():
            members = {s: [p for p in assigned if assigned[p] == s] for s in SPLITS}
            crowd = max(members.values(), key=len)
            pick = min if split == TRAIN else max
            assigned[pick(crowd, key=drawn.__getitem__)] = split
    return assigned


def _draw(seed: int, place_id: str) -> float:
    """A number in [0, 1) that belongs to the place."""
    digest = hashlib.sha256(f"{seed}:{place_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _discs(patches: pd.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Centres [n, 2] (longitude, latitude) and radii [n] (m) of discs that hold the patches."""
    centres = np.zeros((len(patches), 2))
    radii = np.zeros(len(patches))
    for crs, group in patches.groupby("crs"):
        grids = [
            Grid(str(crs), tuple(row[:6]), int(row[6]), int(row[7]))
            for row in group[[*"abcdef", "height", "width"]].to_numpy(dtype=float).tolist()
        ]
        middle = [g.xy(g.height / 2, g.width / 2) for g in grids]
        corner = [g.xy(0, 0) for g in grids]
        at = group.index.to_numpy()
        centres[at] = to_lonlat(str(crs), *zip(*middle, strict=True))
        radii[at] = _distance_m(centres[at], to_lonlat(str(crs), *zip(*corner, strict=True)))
    return centres, radii


def _distance_m(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Great-circle distances of points (longitude, latitude in degrees), broadcast (haversine)."""
    (lon, lat), (other_lon, other_lat) = np.radians(first).T, np.radians(second).T
    chord = (
        np.sin((other_lat - lat) / 2) ** 2
        + np.cos(lat) * np.cos(other_lat) * np.sin((other_lon - lon) / 2) ** 2
    )
    distance: NDArray[np.float64] = 2 * _EARTH_RADIUS_M * np.arcsin(np.sqrt(np.clip(chord, 0, 1)))
    return distance


def _within(
    centres: NDArray[np.float64],
    radii: NDArray[np.float64],
    others: NDArray[np.float64],
    other_radii: NDArray[np.float64],
    margin_m: float,
) -> NDArray[np.bool_]:
    """Which discs come nearer than the margin to any of the others."""
    near = np.zeros(len(centres), dtype=np.bool_)
    if not len(others):
        return near
    # What lies farther north or south than this is farther off: of many places few are compared.
    order = np.argsort(others[:, 1])
    others, other_radii = others[order], other_radii[order]
    reach_deg = np.degrees((margin_m + radii + other_radii.max()) / _EARTH_RADIUS_M) + 1e-9
    first = np.searchsorted(others[:, 1], centres[:, 1] - reach_deg)
    last = np.searchsorted(others[:, 1], centres[:, 1] + reach_deg, side="right")
    for i in np.flatnonzero(last > first):
        some = slice(first[i], last[i])
        gap = _distance_m(centres[i], others[some]) - radii[i] - other_radii[some]
        near[i] = gap.min() < margin_m
    return near
