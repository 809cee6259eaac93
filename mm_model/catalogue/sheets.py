"""Patches to look at, as HTML: each layer a picture in physical units, with legends below."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_model.catalogue.census import Census, spread
from mm_model.data.patch import Layer, Patch
from mm_model.data.store import PatchStore
from mm_model.modalities import Modality
from mm_model.pictures import Limits, caption, is_relative, robust_limits, to_rgb

PLACES = 36
"""Places that are shown, one patch of each, in even steps over all places in order of name."""


def sheets(store: PatchStore, census: Census) -> str:
    """A table of patches, a row each, a column each modality, a head each source; and legends."""
    names = [m.name for m in census.modalities]
    head = "".join(f"<th>{escape(n)}</th>" for n in names)
    rows, source = [], None
    classes: dict[str, set[int]] = {n: set() for n in names}
    for position in shown_positions(census):
        patch = store.read(position)
        if patch.source != source:
            source = patch.source
            rows.append(f'<tr><th colspan="{len(names) + 1}">{escape(source)}</th></tr>')
        rows.append(_row(patch, census.modalities))
        for modality in census.modalities:
            layer = patch.layers.get(modality.name)
            if layer is not None and modality.is_categorical:
                classes[modality.name] |= {int(c) for c in np.unique(layer.values[0, layer.valid])}
    legends = "".join(_legend(m, classes[m.name]) for m in census.modalities)
    modality, nothing = census.modalities[0], np.zeros((12, 36), np.bool_)
    bands = np.zeros((len(modality.bands), *nothing.shape), modality.dtype)
    gap = _image(to_rgb(bands, nothing, modality), "no valid pixel")
    return (
        f'<div class="wide"><table class="sheet"><tr><th>patch</th>{head}</tr>'
        f"{''.join(rows)}</table></div>"
        f'<dl class="legend">{legends}<dt>striped</dt><dd>{gap} no valid pixel</dd></dl>'
    )


def shown_positions(census: Census) -> list[int]:
    """A patch of each place that is shown, by source and place: the middle one of the richest."""
    patches = census.patches.assign(
        position=np.arange(len(census.patches)),
        layers=[members.bit_count() for members in census.patches["members"].tolist()],
    )
    groups = patches.groupby(["source", "place_id"])
    richest = patches[patches["layers"] == groups["layers"].transform("max")]
    middles = [
        int(at.iloc[len(at) // 2]) for _, at in richest.groupby(["source", "place_id"])["position"]
    ]
    return [int(p) for p in spread(np.array(middles, np.int64), PLACES)]


def png(colors: NDArray[np.uint8]) -> str:
    """A picture [H, W, 3] as a data URI."""
    stream = io.BytesIO()
    Image.fromarray(colors).save(stream, "png", optimize=True)
    return f"data:image/png;base64,{b64encode(stream.getvalue()).decode()}"


def _row(patch: Patch, modalities: Sequence[Modality]) -> str:
    cells = []
    for modality in modalities:
        layer = patch.layers.get(modality.name)
        cells.append(f"<td>{_picture(layer, modality) if layer else '–'}</td>")
    height, width = patch.grid.shape
    facts = f"{width} × {height} px of {patch.gsd_m:g} m"
    name = escape(patch.patch_id)
    return f"<tr><th><code>{name}</code><br>{facts}</th>{''.join(cells)}</tr>"


def _picture(layer: Layer, modality: Modality) -> str:
    limits = robust_limits([(layer.values, layer.valid)]) if is_relative(modality) else None
    notes = [_span(limits, modality)] if limits else []
    notes += [layer.acquired_at] if layer.acquired_at else []
    colors = to_rgb(layer.values, layer.valid, modality, limits)
    return f"{_image(colors, modality.title)}<br>{escape(', '.join(notes))}"


def _legend(modality: Modality, codes: set[int]) -> str:
    """What the colours mean; of classes, those that occur."""
    if modality.is_categorical:
        text = " ".join(
            f'<span class="class"><i style="background:{c.color}"></i>{escape(c.name)}</span>'
            for c in modality.classes
            if c.code in codes
        )
    elif len(modality.bands) > 1:
        text = escape(caption(modality))
    else:
        ramp = np.linspace(*modality.display_range, 256, dtype=np.float32)[None, None]
        ramp = np.repeat(ramp, 12, axis=1)
        bar = _image(to_rgb(ramp, np.ones(ramp.shape[1:], np.bool_), modality), "colour scale")
        ends = (
            "1st to 99th percentile of each patch, written below it"
            if is_relative(modality)
            else caption(modality)
        )
        text = f"{bar} {escape(ends)}"
    return f"<dt>{escape(modality.name)}</dt><dd>{escape(modality.title)}: {text}</dd>"


def _span(limits: Limits, modality: Modality) -> str:
    low, high = limits
    digits = 0 if high - low >= 10 else 1
    return f"{low:.{digits}f} to {high:.{digits}f} {modality.unit}"


def _image(colors: NDArray[np.uint8], text: str) -> str:
    height, width = colors.shape[:2]
    return f'<img src="{png(colors)}" alt="{escape(text)}" width="{width}" height="{height}">'
