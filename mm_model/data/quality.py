"""What the index tells of the data beyond one row: dates, copies, displacements.

Pure functions of the index; `validate` judges what they derive and shows it.
"""

from __future__ import annotations

import re
from datetime import date
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

NEAR_BITS = 3
"""Looks that differ in so many of their 128 bits, or fewer, are those of copies."""
# A look is cut into 6 parts. 3 bits that differ leave 3 parts or more as they are, so near looks
# have one of the 20 triples of parts in common, and only looks that have are compared.
_BITS, _PARTS = 128, 6
# Numbers that are held while looks are compared: 32 MB.
_BLOCK = 1 << 22
_DATE = re.compile(r"^(\d{4})(?:-(\d{2}))?(?:-(\d{2}))?")


def derive(frame: pd.DataFrame) -> pd.DataFrame:
    """The index with `shift_px`, `days_apart` and `near_duplicate_of`.

    `shift_px` is the length of a layer's known shift; `days_apart` the least number of days between
    a layer and the first dated one of its patch (a month or a year may be any of its days);
    `near_duplicate_of` a patch of another place whose layer of the same modality is the same or
    differs in at most `NEAR_BITS` bits of its look. Null where nothing is known or found.
    """
    out = frame.copy()
    out["shift_px"] = np.hypot(frame["shift_row_px"], frame["shift_col_px"])
    spans = frame["acquired_at"].map(day_span, na_action="ignore")
    first = spans.groupby(frame["patch_id"]).transform("first")
    out["days_apart"] = [
        max(a[0] - b[1], b[0] - a[1], 0)
        if isinstance(a, tuple) and isinstance(b, tuple)
        else np.nan
        for a, b in zip(spans, first, strict=True)
    ]
    copies = _near_duplicates(frame)
    out["near_duplicate_of"] = [copies.get(row) for row in frame.index]
    return out


def alignment_table(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Shifts of each source and pair of layer and reference, as `align` left them, JSON-ready."""
    against = frame[frame["shift_reference"].notna()]
    shift = (against["shift_row_px"] ** 2 + against["shift_col_px"] ** 2) ** 0.5
    moved = (against["moved_rows_px"] != 0) | (against["moved_cols_px"] != 0)
    table = []
    for key, rows in against.groupby(["source", "shift_reference", "modality"]):
        known = shift[rows.index].dropna()
        table.append(
            {
                **dict(zip(("source", "reference", "modality"), map(str, key), strict=True)),
                "layers": len(rows),
                "known": len(known),
                "median_px": round(float(known.median()), 2) if len(known) else None,
                "p95_px": round(float(known.quantile(0.95)), 2) if len(known) else None,
                "moved": int(moved[rows.index].sum()),
            }
        )
    return table


def excluded_layers(frame: pd.DataFrame) -> dict[str, str]:
    """Patch → the layers that were left out of it, with their shifts."""
    rows = frame[frame["excluded_layers"].notna()].drop_duplicates("patch_id")
    return dict(zip(rows["patch_id"], rows["excluded_layers"], strict=True))


def day_span(text: str) -> tuple[int, int] | None:
    """First and last day that a date, a month or a year may mean, as ordinals."""
    found = _DATE.match(text)
    if not found:
        return None  # another expectation names it
    year, month, day = (int(g) if g else None for g in found.groups())
    assert year is not None
    try:
        start = date(year, month or 1, day or 1)
    except ValueError:
        return None
    if day:
        return start.toordinal(), start.toordinal()
    after = date(year + 1, 1, 1) if month in (None, 12) else date(year, (month or 0) + 1, 1)
    return start.toordinal(), after.toordinal() - 1


def _near_duplicates(frame: pd.DataFrame) -> dict[int, str]:
    """Row of the index → a patch of another place that equals it, or else nearly does.

    No pair is left out. The cost is sorting the looks 21 times, and comparing those that share half
    of their bits with one another, quadratic in their number: 7 s of a core for a million looks
    that share nothing, 0.6 s for 20,000 that all share one half.
    """
    found: dict[int, str] = {}
    looks = frame[frame["look"].notna()]
    for _, rows in looks.groupby("modality"):
        # Rows of a place with one look have one answer.
        one = rows.drop_duplicates(["look", "place_id"])
        partner = _partners(
            np.frombuffer(bytes.fromhex("".join(one["look"])), ">u8").astype("u8").reshape(-1, 2),
            pd.factorize(one["place_id"])[0],
        )
        patches = one["patch_id"].to_numpy()
        answers = {
            (look, place): str(patches[other])
            for look, place, other in zip(one["look"], one["place_id"], partner, strict=True)
            if other >= 0
        }
        keys = zip(rows["look"], rows["place_id"], strict=True)
        found |= {row: answers[k] for row, k in zip(rows.index, keys, strict=True) if k in answers}
    return found


def _partners(looks: NDArray[np.uint64], places: NDArray[np.intp]) -> NDArray[np.intp]:
    """For each look [N, 2] the position of one of another place that is near, or -1."""
    partner = np.full(len(looks), -1)
    for group in _sharing(looks, places):  # copies, of which there may be many
        partner[group] = group[0]
        partner[group[0]] = group[1]
    cuts = [round(i * _BITS / _PARTS) for i in range(_PARTS + 1)]
    parts = [(1 << end) - (1 << start) for start, end in pairwise(cuts)]
    for kept in combinations(parts, _PARTS - NEAR_BITS):
        mask = sum(kept)
        halves = np.array([mask >> 64, mask & (1 << 64) - 1], np.uint64)
        for group in _sharing(looks & halves, places):
            alone = group[partner[group] < 0]
            for block in np.array_split(alone, -(-len(alone) * len(group) // _BLOCK) or 1):
                differing = np.bitwise_count(looks[block, None, 0] ^ looks[group, 0])
                differing += np.bitwise_count(looks[block, None, 1] ^ looks[group, 1])
                near = (differing <= NEAR_BITS) & (places[block, None] != places[group])
                has = near.any(axis=1)
                partner[block[has]] = group[near[has].argmax(axis=1)]
    return partner


def _sharing(keys: NDArray[np.uint64], places: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Positions of equal keys [N, 2], a group each, in order; only groups of several places."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    starts = np.flatnonzero((ordered[1:] != ordered[:-1]).any(axis=1)) + 1
    starts = np.concatenate([[0], starts])
    least = np.minimum.reduceat(places[order], starts)
    several = np.flatnonzero(least != np.maximum.reduceat(places[order], starts))
    ends = np.append(starts, len(order))
    return [order[ends[i] : ends[i + 1]] for i in several]
