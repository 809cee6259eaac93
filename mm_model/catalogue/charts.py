"""Pictures of a census: where places lie, what values occur, which classes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mm_model.catalogue.census import Census, Values
from mm_model.data.stats import BandSummary
from mm_model.modalities import Modality

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 120
_INK, _PALE = "#222222", "#dddddd"
_WIDTH_IN = 10.0
_BOX_IN = (8.8, 4.4)  # of the map, width twice the height as the whole Earth's
# Qualitative colours that the colour-blind can tell apart (Okabe and Ito 2008), then darker ones.
_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#444444")
# Each shape with each colour: so many sets can be told apart.
_STYLES = tuple((color, shape) for shape in "osD^" for color in _COLORS)
_OTHER = ("#b0b0b0", "o")
_MARGIN = 0.08  # of the map's extent, on each side
_LEAST_SPAN_DEG = 0.2
_LINE_IN = 0.24  # of the legend
_BINS = 96
_SHOWN = (0.001, 0.999)  # quantiles where a histogram's axis ends
_BAND_COLORS = ("#c0392b", "#27903f", "#2c6fbb", "#b07aa1", "#e08a1e", "#555555")


def save_map(path: Path, census: Census) -> None:
    """Where places lie, in degrees of WGS 84, coloured by the modalities present there.

    Lines of longitude and latitude instead of coasts: nothing is fetched. The commonest sets have a
    colour of their own, all others share one; the rarest are drawn on top.
    """
    places = census.places
    located = places[places["lon"].notna()]
    counts = Counter(int(m) for m in places["members"])
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    most = len(_STYLES) if len(ranked) <= len(_STYLES) else len(_STYLES) - 1
    own, rest = ranked[:most], ranked[most:]
    styles = {members: style for (members, _), style in zip(own, _STYLES, strict=False)}
    entries = [(styles[m], f"{', '.join(census.names(m))}: {_places(n)}") for m, n in own]
    if rest:
        others = sum(n for _, n in rest)
        entries.append((_OTHER, f"{len(rest)} other sets: {_places(others)}"))
    nowhere = len(places) - len(located)
    half = -(-len(entries) // 2)
    top, gap = 0.5, 0.6  # above the map, and between its lower edge and the legend, inches
    height = top + _BOX_IN[1] + gap + _LINE_IN * (half + bool(nowhere))
    figure = _figure(height)
    left, width = (_WIDTH_IN - _BOX_IN[0]) / 2 + 0.2, _BOX_IN[0] / _WIDTH_IN
    axes = figure.add_axes(
        (left / _WIDTH_IN, 1 - (top + _BOX_IN[1]) / height, width, _BOX_IN[1] / height)
    )
    _graticule(axes, located["lon"].to_numpy(), located["lat"].to_numpy())
    size = float(np.clip(9 - np.log10(max(len(located), 1)) * 1.5, 2.5, 8))
    for members, _ in ranked:  # the rarest come last, and lie on top
        mine = located[located["members"] == members]
        color, shape = styles.get(members, _OTHER)
        axes.plot(mine["lon"], mine["lat"], shape, ms=size, mfc=color, mec="white", mew=0.4)
    axes.set_title(f"{_places(len(located))}, by the modalities present", fontsize=11)
    legend = figure.add_axes(
        (left / _WIDTH_IN, 0, width, (height - top - _BOX_IN[1] - 0.4) / height)
    )
    legend.set(xlim=(0, _BOX_IN[0]), ylim=(0, height - top - _BOX_IN[1] - 0.4))
    legend.set_axis_off()
    for i, ((color, shape), text) in enumerate(entries):
        column, line = divmod(i, half)
        x, y = column * _BOX_IN[0] / 2 + 0.1, height - top - _BOX_IN[1] - gap - _LINE_IN * line
        legend.plot([x], [y], shape, ms=7, mfc=color, mec="white", mew=0.4)
        legend.text(x + 0.15, y, text, fontsize=8, color=_INK, va="center")
    if nowhere:
        legend.text(0, 0.12, f"{_places(nowhere)} without a position", fontsize=8, va="center")
    _save(figure, path)


def save_histograms(path: Path, census: Census) -> None:
    """How often values occur, a panel for each modality of numbers, its bands in one panel."""
    panels = [m for m in census.modalities if census.values[m.name].bands and _seen(census, m)]
    rows = -(-len(panels) // 2)
    figure = _figure(0.2 + 2.6 * max(rows, 1))
    for i, modality in enumerate(panels):
        axes = figure.add_subplot(max(rows, 1), 2, i + 1)
        _draw_histogram(axes, modality, census.values[modality.name])
    if not panels:
        figure.text(0.5, 0.5, "no values", ha="center")
    figure.tight_layout()
    _save(figure, path)


def save_classes(path: Path, census: Census) -> None:
    """The share of each class among the valid pixels, a panel for each modality of classes."""
    panels = [m for m in census.modalities if m.is_categorical]
    heights = [0.9 + 0.26 * len(m.classes) for m in panels]
    figure = _figure(sum(heights))
    grid = figure.add_gridspec(len(panels), 1, height_ratios=heights)
    for i, modality in enumerate(panels):
        axes, counted = figure.add_subplot(grid[i]), census.values[modality.name]
        percent = [100 * counted.classes[c] / max(counted.pixels, 1) for c in modality.class_codes]
        at = np.arange(len(percent))
        fills = [c.color for c in modality.classes]
        axes.barh(at, percent, color=fills, edgecolor="#888888", linewidth=0.5)
        for y, share in zip(at, percent, strict=True):
            axes.text(
                share, float(y), f" {share:.2g} %" if share else " none", va="center", fontsize=8
            )
        axes.set_yticks(at, [f"{c.name} ({c.code})" for c in modality.classes], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, max(percent) * 1.12 or 1)
        axes.set_xlabel("percent of valid pixels", fontsize=8)
        _finish(axes, modality, counted)
    figure.tight_layout()
    _save(figure, path)


def _seen(census: Census, modality: Modality) -> bool:
    return census.values[modality.name].pixels > 0


def _draw_histogram(axes: Axes, modality: Modality, values: Values) -> None:
    bands = values.bands
    low = min(b.quantile(_SHOWN[0]) for b in bands)
    high = max(b.quantile(_SHOWN[1]) for b in bands)
    for i, (name, band) in enumerate(zip(modality.band_names, bands, strict=True)):
        edges, shares = rebinned(band, low, high)
        color = _BAND_COLORS[i % len(_BAND_COLORS)] if len(bands) > 1 else _INK
        axes.stairs(100 * shares, edges, color=color, label=name, linewidth=1.1)
    unit = "" if modality.unit == "1" else f" ({modality.unit})"
    axes.set_xlabel(f"{modality.quantity.value.replace('_', ' ')}{unit}", fontsize=8)
    axes.set_ylabel("percent of valid pixels", fontsize=8)
    axes.set_ylim(bottom=0)
    if len(bands) > 1:
        axes.legend(fontsize=7, frameon=False)
    _finish(axes, modality, values)


def rebinned(
    band: BandSummary, low: float, high: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Edges, in physical units, and shares of all pixels, in bins that cover low to high.

    Bins are whole multiples of the summary's own, so that none is filled by a fraction.
    """
    fine, (least, greatest) = len(band.histogram), band.valid_range
    width = (greatest - least) / fine
    first = int(np.clip((low - least) / width, 0, fine - 1))
    last = int(np.clip(np.ceil((high - least) / width), first + 1, fine))
    step = max(1, (last - first) // _BINS)
    starts = np.arange(first, last, step)
    ends = np.minimum(starts + step, fine)
    running = np.concatenate([[0], np.cumsum(band.histogram)])
    shares = (running[ends] - running[starts]) / max(int(running[-1]), 1)
    return least + np.append(starts, ends[-1]) * width, shares


def _finish(axes: Axes, modality: Modality, values: Values) -> None:
    head = f"{modality.name}: {modality.title}"
    axes.set_title(f"{head}\n{values.layers:,} layers", fontsize=8, loc="left")
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def _graticule(axes: Axes, lon: NDArray[np.float64], lat: NDArray[np.float64]) -> None:
    """Limits around the places, at the scale of their middle latitude, and lines of degrees."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    west, east, south, north = view(lon, lat)
    axes.set(xlim=(west, east), ylim=(south, north))
    for axis, ends in ((axes.xaxis, "EW"), (axes.yaxis, "NS")):
        axis.set_major_locator(MaxNLocator(8, steps=[1, 1.5, 2, 3, 5, 6, 9, 10]))
        axis.set_major_formatter(FuncFormatter(lambda v, _, ends=ends: _degrees(v, ends)))
    axes.grid(color=_PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=0)
    for spine in axes.spines.values():
        spine.set(color="#999999", linewidth=0.6)


def view(lon: NDArray[np.float64], lat: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """West, east, south and north of a map that shows all places without distorting their middle.

    Degrees; within the Earth's. The whole Earth where there is no place.
    """
    if not len(lon):
        return -180.0, 180.0, -90.0, 90.0
    middle_lon, middle_lat = (float((v.min() + v.max()) / 2) for v in (lon, lat))
    shrink = max(float(np.cos(np.radians(middle_lat))), 0.1)
    ratio = _BOX_IN[0] / _BOX_IN[1]
    tall = max(float(np.ptp(lat)), _LEAST_SPAN_DEG, float(np.ptp(lon)) * shrink / ratio)
    tall *= 1 + 2 * _MARGIN
    wide = tall * ratio / shrink
    if wide >= 360 or tall >= 180:
        return -180.0, 180.0, -90.0, 90.0
    west = float(np.clip(middle_lon - wide / 2, -180, 180 - wide))
    south = float(np.clip(middle_lat - tall / 2, -90, 90 - tall))
    return west, west + wide, south, south + tall


def _degrees(value: float, ends: str) -> str:
    side = "" if abs(value) < 1e-9 else ends[int(value < 0)]
    return f"{abs(value):.6g}°{side}"


def _places(count: int) -> str:
    return f"{count:,} place{'s' * (count != 1)}"


def _figure(height_in: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH_IN, height_in), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    # The version of matplotlib must not decide the bytes.
    figure.savefig(path, format="png", metadata={"Software": None})
