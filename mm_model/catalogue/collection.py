"""The STAC collection: what all patches have in common, and where the rest stands."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from mm_model.catalogue.census import Census
from mm_model.catalogue.items import COLLECTION, PARQUET, STAC_VERSION, asset_of, extensions

CARD, ITEMS, MAP, PAGE = "card.md", "items.parquet", "map.png", "index.html"
_SPDX = re.compile(r"^[\w.+-]+$")


def collection(
    name: str,
    census: Census,
    licences: Mapping[str, Mapping[str, str]],
    made_of: Mapping[str, str],
) -> dict[str, Any]:
    """The content of collection.json.

    Args:
        name: its id.
        census: of the store.
        licences: data set → licence and attribution.
        made_of: file → SHA-256 of what the catalogue describes, to tell whether it is still so.
    """
    patches = census.patches
    nowhere = int(patches["xmin"].isna().sum())
    return {
        "type": "Collection",
        "stac_version": STAC_VERSION,
        "stac_extensions": extensions(census),
        "id": name,
        "title": f"Patches of {name}",
        "description": (
            f"{len(patches):,} co-registered patches of {len(census.places):,} places, in physical"
            f" units, each with any of: {', '.join(m.name for m in census.modalities)}."
            " One item a patch, one asset a layer: `mm:row` is its row in the Arrow IPC file."
            + (f" {nowhere:,} patches that lie nowhere are no items." if nowhere else "")
        ),
        "license": _licence(licences),
        "providers": [
            {"name": source, "description": _terms(terms), "roles": ["licensor"]}
            for source, terms in licences.items()
        ],
        "extent": {
            "spatial": {"bbox": [_box(census)]},
            "temporal": {"interval": [_interval(census)]},
        },
        "summaries": {
            "gsd": sorted({float(g) for g in patches["gsd_m"]}),
            "proj:code": sorted({c for c in patches["crs"] if re.match(r"^[A-Z]+:\d+$", c)}),
            "mm:source": sorted(set(patches["source"])),
            "mm:split": sorted(set(patches["split"].dropna())),
            "mm:modalities": [m.name for m in census.modalities],
        },
        "item_assets": {m.name: asset_of(m) for m in census.modalities},
        "links": [
            {"rel": "root", "href": f"./{COLLECTION}", "type": "application/json"},
            {"rel": "items", "href": f"./{ITEMS}", "type": PARQUET},
            {"rel": "license", "href": f"./{CARD}", "type": "text/markdown"},
        ],
        "assets": {
            "items": _asset(ITEMS, PARQUET, "All items, as stac-geoparquet", "collection-mirror"),
            "card": _asset(CARD, "text/markdown", "Data card", "metadata"),
            "page": _asset(PAGE, "text/html", "Data card with patches", "metadata"),
            "overview": _asset(MAP, "image/png", "Where the places lie", "overview"),
        },
        "mm:made_of": dict(made_of),
    }


def _licence(licences: Mapping[str, Mapping[str, str]]) -> str:
    """The one licence, if it is named as SPDX names licences; else `other`, as STAC wants it."""
    names = {terms["licence"] for terms in licences.values()}
    only = names.pop() if len(names) == 1 else ""
    return only if _SPDX.match(only) else "other"


def _terms(terms: Mapping[str, str]) -> str:
    return "; ".join(text for text in (terms["licence"], terms.get("attribution")) if text)


def _box(census: Census) -> list[float]:
    """Of all patches; the whole Earth where none lies anywhere, since STAC wants one."""
    located = census.patches[["xmin", "ymin", "xmax", "ymax"]].dropna()
    if located.empty:
        return [-180.0, -90.0, 180.0, 90.0]
    low, high = located.min(), located.max()
    return [float(low["xmin"]), float(low["ymin"]), float(high["xmax"]), float(high["ymax"])]


def _interval(census: Census) -> list[str | None]:
    """First and last instant of the days that are known; open where none is."""
    first, last = census.patches["first_day"].min(), census.patches["last_day"].max()
    if np.isnan(first):
        return [None, None]
    begin, end = (datetime.fromordinal(int(day)).replace(tzinfo=UTC) for day in (first, last))
    return [f"{begin:%Y-%m-%d}T00:00:00Z", f"{end:%Y-%m-%d}T23:59:59Z"]


def _asset(file: str, kind: str, title: str, role: str) -> dict[str, Any]:
    return {"href": f"./{file}", "type": kind, "title": title, "roles": [role]}
