"""What the index tells of the data beyond one row: dates, copies, displacements.

Pure functions of the index; `validate` judges what they derive and shows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

# Of the 128 bits of a look. Each of the 4 parts of 32 bits is one key: with 3 bits that differ, at
# least one part is equal, so that no pair is missed.
NEAR_BITS = 3
_PARTS = 4
# More looks than this with one equal part are not compared pair by pair: a common part says little.
_MOST_ALIKE = 200
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
    spans = frame["acquired_at"].map(_days, na_action="ignore")
    first = spans.groupby(frame["patch_id"]).transform("first")
    out["days_apart"] = [
        max(a[0] - b[1], b[0] - a[1], 0)
        if isinstance(a, tuple) and isinstance(b, tuple)
        else np.nan
        for a, b in zip(spans, first, strict=True)
    ]
    copies = dict(_near_duplicates(frame))
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


def _days(text: str) -> tuple[int, int] | None:
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


def _near_duplicates(frame: pd.DataFrame) -> Iterator[tuple[int, str]]:
    """Row of the index → a patch of another place that nearly equals it."""
    looks = frame[frame["look"].notna()]
    for _, rows in looks.groupby("modality"):
        place = rows["place_id"].to_dict()
        number = {row: int(look, 16) for row, look in rows["look"].items()}
        keys = pd.Series(
            [
                (part, look >> (32 * part) & 0xFFFFFFFF)
                for look in number.values()
                for part in range(_PARTS)
            ],
            index=np.repeat(rows.index, _PARTS),
        )
        for alike in keys.groupby(keys).groups.values():
            if len(alike) > _MOST_ALIKE:
                alike = alike[:_MOST_ALIKE]
            for a, b in combinations(alike, 2):
                elsewhere = place[a] != place[b]
                if elsewhere and (number[a] ^ number[b]).bit_count() <= NEAR_BITS:
                    yield a, str(rows.at[b, "patch_id"])
                    yield b, str(rows.at[a, "patch_id"])
