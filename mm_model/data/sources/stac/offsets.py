"""Whether an item's numbers have the offset of its processing baseline, and how that is known."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mm_model.data.remote import Patience, fetch, read_overview
from mm_model.data.sources.stac.request import BaselineOffset, Collection, Product

Sign = Callable[[str, bool], str]
_BASELINES = ("s2:processing_baseline", "processing:version")

# Of a scene of 110 km some ground is always nearly black in red. Its numbers lie just above the
# offset where it is in them, with noise a little below, and just above 0 where it is not.
_OVERVIEW_PX = 512
_NOISE = 0.01  # reflectance
_DARK_SHARE = 0.01
_NO_SHARE = 1e-4
_DARK_END = 0.025  # reflectance that the darkest hundredth of a scene stays below


def baseline_of(item: Mapping[str, Any]) -> str | None:
    """The processing baseline, as "05.09"."""
    for name in _BASELINES:
        match = re.fullmatch(r"(\d\d?)\.(\d\d?)", str(item["properties"].get(name, "")))
        if match:
            return f"{int(match.group(1)):02d}.{int(match.group(2)):02d}"
    return None


def find_offset(
    item: Mapping[str, Any],
    hrefs: Mapping[str, str],
    product: Product,
    collection: Collection,
    sign: Sign,
    patience: Patience,
) -> tuple[float, str] | None:
    """The offset of an item's numbers and what told it; None if nothing could.

    Args:
        item: STAC item.
        hrefs: band or asset → address.
        product: with a `baseline_offset`.
        collection: whose rules are asked, in their order.
        sign: signs an address.
        patience: with the server.
    """
    wanted = product.baseline_offset
    assert wanted is not None
    measured = [b for bands in product.layers.values() for b in bands if b in hrefs]
    for rule in collection.offset:
        found: tuple[float, str] | None = None
        if rule == "declared":
            found = _declared(item, [collection.assets[b] for b in measured])
        elif rule == "baseline":
            found = _by_baseline(baseline_of(item), wanted)
        elif rule == "product_metadata" and (collection.metadata or "") in hrefs:
            assert collection.metadata is not None
            text = fetch(sign(hrefs[collection.metadata], False), patience).text
            found = by_product_metadata(text, product, wanted)
        elif rule == "applied_flag":
            found = _by_flag(item, collection.applied_flag, wanted)
        elif rule == "darkest_pixels":
            href, _ = split_band(hrefs[measured[0]])
            pixels = read_overview(href, sign, _OVERVIEW_PX, patience)
            known = pixels[~np.isin(pixels, product.nodata)]
            found = by_darkest_pixels(known, product, wanted)
        if found is not None:
            return found
    return None


def split_band(href: str) -> tuple[str, int]:
    """Address and number of the band of "address#number"; 1 if there is none."""
    address, _, number = href.partition("#")
    return address, int(number or 1)


def by_product_metadata(
    text: str, product: Product, wanted: BaselineOffset
) -> tuple[float, str] | None:
    """Of the product's own XML (MTD_MSIL2A.xml)."""
    told = {int(v) for v in re.findall(r"<BOA_ADD_OFFSET[^>]*>\s*(-?\d+)\s*<", text)}
    if len(told) == 1:
        return told.pop() * product.scale, "BOA_ADD_OFFSET of the product"
    match = re.search(r"<PROCESSING_BASELINE>\s*(\d\d\.\d\d)\s*<", text)
    # Products before 04.00 have no such element; later ones without it are not understood.
    if not told and match and match.group(1) < wanted.from_:
        return 0.0, f"processing baseline {match.group(1)} of the product"
    return None


def by_darkest_pixels(
    known: np.ndarray[Any, Any], product: Product, wanted: BaselineOffset
) -> tuple[float, str] | None:
    """Of stored numbers [n] of a whole scene in a visible band; None where both can be."""
    if not known.size:
        return None
    reflectance = known * product.scale + wanted.offset  # as if it were in them
    below = float((reflectance < -_NOISE).mean())
    if below > _DARK_SHARE:
        return 0.0, f"darkest pixels ({below:.0%} would be below nothing)"
    darkest = float(np.percentile(reflectance, 1))
    if below < _NO_SHARE and darkest < _DARK_END:
        return wanted.offset, f"darkest pixels (reflectance {darkest:.3f})"
    return None


def _declared(item: Mapping[str, Any], assets: Sequence[str]) -> tuple[float, str] | None:
    """`raster:bands` of STAC 1.0, or `raster:offset` of 1.1; None if bands disagree."""
    told = set()
    for name in assets:
        asset = item["assets"][name.partition("#")[0]]
        band: Mapping[str, Any] = next(
            iter([*asset.get("raster:bands", []), *asset.get("bands", [])]), {}
        )
        scale = band.get("scale", band.get("raster:scale", asset.get("raster:scale")))
        offset = band.get("offset", band.get("raster:offset", asset.get("raster:offset")))
        told.add(None if scale is None and offset is None else float(offset or 0.0))
    if len(told) != 1 or None in told:
        return None
    return float(told.pop() or 0.0), "raster:bands of the item"


def _by_baseline(baseline: str | None, wanted: BaselineOffset) -> tuple[float, str] | None:
    if baseline is None:
        return None
    return (wanted.offset if baseline >= wanted.from_ else 0.0), f"processing baseline {baseline}"


def _by_flag(
    item: Mapping[str, Any], flag: str | None, wanted: BaselineOffset
) -> tuple[float, str] | None:
    baseline = baseline_of(item)
    if baseline is not None and baseline < wanted.from_:
        return 0.0, f"processing baseline {baseline}"
    if flag is not None and item["properties"].get(flag) is True:
        return 0.0, flag
    return None
