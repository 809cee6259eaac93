"""Layers as pictures: RGB arrays, and sheets of panels with a legend and unit for each modality.

Matplotlib is imported inside the functions, and never pyplot: the endpoint and the command line
import this module without paying for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_model.errors import LayerError
from mm_model.modalities import LandCoverClass, Modality, Quantity

Limits = tuple[float, float]

# Reflectance is shown with a gamma, as woods (0.02 to 0.05) would be black beside soil (0.3).
GAMMA = 1.6
AMOUNT_COLORS = "viridis"
"""Colour map of amounts."""

# Invalid pixels: diagonal stripes of two greys, which no colour map and no class draws.
_STRIPES = np.array([[96] * 3, [208] * 3], np.uint8)

_DPI = 120
_PANEL_IN = 1.6
_GAP_IN = 0.1
_LINE_IN = 0.24  # of the legends
_LABEL_IN = 0.7  # where legends begin, right of the modality's name
_CLASSES_A_LINE, _CLASS_IN = 4, 1.55
_INK = "#222222"


@dataclass(frozen=True)
class Amount:
    """A number for each pixel that is no layer of its own, such as a spread.

    Attributes:
        values: [H, W], 0 and more; NaN where nothing is known.
        title: what stands above it.
        unit: of the values, "1" for none.
    """

    values: NDArray[Any]
    title: str
    unit: str


@dataclass(frozen=True)
class Channel:
    """What one channel of a picture shows: a weighted sum of bands, between two limits.

    Attributes:
        name: of the band, or of what is made of several.
        weights: one a band.
        limits: physical values that are shown as black and white, or as the ends of a colour map.
    """

    name: str
    weights: tuple[float, ...]
    limits: Limits


@dataclass(frozen=True)
class Panel:
    """One picture of a sheet.

    Attributes:
        values: [bands, H, W] in physical units, or class codes.
        valid: bool [H, W].
        title: what stands above it, such as "observed" or "sample 1".
    """

    values: NDArray[Any]
    valid: NDArray[np.bool_]
    modality: Modality
    title: str = ""


def to_rgb(
    values: NDArray[Any],
    valid: NDArray[np.bool_],
    modality: Modality,
    limits: Limits | None = None,
) -> NDArray[np.uint8]:
    """A layer as colours, [H, W, 3]; `caption` says in words what they mean.

    Args:
        values: [bands, H, W] in physical units, or class codes; clipped to the limits.
        valid: bool [H, W]; elsewhere stands a grey hatch.
        modality: what the values are.
        limits: physical values of the ends of the colour scale; the modality's `display_range`
            by default. Means nothing for classes.

    Raises:
        LayerError: the shape does not fit, or a valid pixel holds a code that is no class.
    """
    if values.shape != (len(modality.bands), *valid.shape):
        raise LayerError(
            f"picture of {modality.name}",
            got=f"values {values.shape}, valid {valid.shape}",
            allowed=f"values [{len(modality.bands)}, H, W] and valid [H, W]",
        )
    if modality.is_categorical:
        colors = _class_colors(values[0], valid, modality)
    else:
        # An invalid pixel may hold NaN, which no integer can show.
        known = np.where(valid, values, 0.0).astype(np.float64)
        colors = _continuous_colors(known, modality, limits or modality.display_range)
    return np.where(valid[..., None], colors, _stripes(valid.shape))


def robust_limits(layers: Iterable[tuple[NDArray[Any], NDArray[np.bool_]]]) -> Limits | None:
    """1st and 99th percentile over the valid pixels of (values, valid) pairs; None if there are
    none. A flat layer gets limits half a unit around it.
    """
    known = [values[:, valid].ravel() for values, valid in layers]
    pixels = np.concatenate(known) if known else np.empty(0)
    if pixels.size == 0:
        return None
    low, high = (float(q) for q in np.percentile(pixels.astype(np.float64), (1, 99)))
    return (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)


def caption(modality: Modality) -> str:
    """What the colours of a continuous modality mean, on one line."""
    unit = "" if modality.unit == "1" else f" {modality.unit}"
    shown = [
        f"{channel.name} {channel.limits[0]:g} to {channel.limits[1]:g}{unit}"
        for channel in channels(modality)
    ]
    if len(shown) == 1:
        return shown[0].removeprefix(f"{modality.band_names[0]} ")
    parts = [f"{c} = {text}" for c, text in zip(("red", "green", "blue"), shown, strict=True)]
    curved = f"; gamma {gamma(modality):g}" if gamma(modality) != 1 else ""
    return ", ".join(parts) + curved


def channels(modality: Modality, limits: Limits | None = None) -> tuple[Channel, ...]:
    """What is shown of a continuous modality: red, green and blue, or one channel for its colour
    map, with the limits given (its `display_range` by default).
    """
    names, (low, high) = modality.band_names, limits or modality.display_range
    if len(names) == 1:
        return (Channel(names[0], (1.0,), (low, high)),)
    if len(names) == 2:
        # The usual radar composite: the cross-polarised band is some 6 dB weaker, and their
        # difference tells volume scattering (woods) from surfaces.
        shift = 0.24 * (high - low)
        return (
            Channel(names[0], (1.0, 0.0), (low, high)),
            Channel(names[1], (0.0, 1.0), (low - shift, high - shift)),
            Channel(f"{names[0]} − {names[1]}", (1.0, -1.0), (0.0, 0.6 * (high - low))),
        )
    return tuple(
        Channel(names[i], tuple(float(i == k) for k in range(len(names))), (low, high))
        for i in _rgb_bands(modality)
    )


def gamma(modality: Modality) -> float:
    """Exponent whose inverse is applied to the shares of the limits before they are shown."""
    return GAMMA if modality.quantity is Quantity.REFLECTANCE else 1.0


def color_scale(color_map: str) -> tuple[str, ...]:
    """256 colours of a colour map (#rrggbb), its low end first."""
    colors = _mapped(np.linspace(0, 1, 256), color_map)
    return tuple("#" + color.tobytes().hex() for color in colors)


def save_sheet(path: Path, rows: Sequence[Sequence[Panel | None]], title: str) -> None:
    """Write rows of panels as a PNG, with a legend for each modality in it.

    A title is drawn where it differs from the panel's above. Elevations share their limits within
    a row, since the relief of one place would vanish in a range that fits all; the limits stand
    below each panel. The same input gives the same bytes.

    Raises:
        LayerError: there is no panel, or one does not fit its modality.
    """
    if not any(panel is not None for row in rows for panel in row):
        raise LayerError("picture sheet", got="no panel", allowed="one or more")
    _Sheet(rows, title).save(path)


def save_amounts(path: Path, amounts: Sequence[Amount], title: str) -> None:
    """Write amounts side by side as a PNG, each from 0 to its 99th percentile, with its scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(amounts), 3.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10, fontweight="bold")
    for amount, axes in zip(
        amounts, figure.subplots(1, len(amounts), squeeze=False)[0], strict=True
    ):
        known = amount.values[np.isfinite(amount.values)]
        most = float(np.percentile(known, 99)) if known.size else 0.0
        image = axes.imshow(amount.values, cmap=AMOUNT_COLORS, vmin=0, vmax=most or 1.0)
        axes.set_title(amount.title, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_facecolor("#bbbbbb")
        bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.8)
        bar.ax.tick_params(labelsize=7)
        bar.set_label("" if amount.unit == "1" else amount.unit, fontsize=7)
    figure.savefig(path, format="png", metadata={"Software": None})


def _class_colors(
    codes: NDArray[Any], valid: NDArray[np.bool_], modality: Modality
) -> NDArray[np.uint8]:
    unknown = np.setdiff1d(codes[valid], modality.class_codes)
    if unknown.size:
        raise LayerError(
            f"codes of {modality.name}", got=unknown.tolist(), allowed=modality.class_codes
        )
    table = np.zeros((256, 3), np.uint8)
    for entry in modality.classes:
        table[entry.code] = list(bytes.fromhex(entry.color[1:]))
    return table[np.where(valid, codes, 0).astype(np.uint8)]


def _rgb_bands(modality: Modality) -> tuple[int, int, int]:
    """Three bands as declared; of more, the longest, a middle and the shortest wavelength."""
    count = len(modality.bands)
    if count == 3:
        return 0, 1, 2
    order = sorted(range(count), key=lambda i: modality.bands[i].center_nm or i)
    return order[-1], order[count // 2], order[0]


def _continuous_colors(
    values: NDArray[np.float64], modality: Modality, limits: Limits
) -> NDArray[np.uint8]:
    shown = [
        _stretch(np.tensordot(channel.weights, values, 1), channel.limits)
        for channel in channels(modality, limits)
    ]
    if len(shown) == 1:
        return _mapped(shown[0], modality.color_map)
    return np.round(np.stack(shown, axis=-1) ** (1 / gamma(modality)) * 255).astype(np.uint8)


def _stretch(values: NDArray[np.float64], limits: Limits) -> NDArray[np.float64]:
    low, high = limits
    shares: NDArray[np.float64] = np.clip((values - low) / (high - low), 0, 1)
    return shares


def _mapped(shares: NDArray[np.float64], color_map: str) -> NDArray[np.uint8]:
    if color_map == "gray":
        return np.repeat(np.round(shares * 255).astype(np.uint8)[..., None], 3, axis=-1)
    from matplotlib import colormaps

    colors: NDArray[np.uint8] = colormaps[color_map](shares, bytes=True)[..., :3]
    return colors


class _Sheet:
    """A page that is drawn from top to bottom; lengths are in inches."""

    def __init__(self, rows: Sequence[Sequence[Panel | None]], title: str) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        panels = [panel for row in rows for panel in row if panel is not None]
        modalities = {panel.modality.name: panel.modality for panel in panels}
        ratio = max(panel.valid.shape[0] / panel.valid.shape[1] for panel in panels)
        self._panel_height: float = _PANEL_IN * min(ratio, 2)
        self._rows, self._panels = rows, panels
        self._legends = [(m, self._legend_lines(m)) for m in modalities.values()]
        self._has_gaps = any(not panel.valid.all() for panel in panels)
        self._width = max(max(map(len, rows)) * (_PANEL_IN + _GAP_IN) + _GAP_IN, 7.0)
        heads = [self._row_heads(r) for r in range(len(rows))]
        height = (
            0.45
            + sum(self._row_height(row, head) for row, head in zip(rows, heads, strict=True))
            + sum(_LINE_IN * lines for _, lines in self._legends)
            + _LINE_IN * self._has_gaps
            + 2 * _GAP_IN
        )
        self._height = height
        self._figure = Figure(figsize=(self._width, height), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(self._figure)
        self._text(_GAP_IN, 0.3, title, size=11, weight="bold")
        y = 0.45
        for row, head in zip(rows, heads, strict=True):
            self._draw_row(row, head, y)
            y += self._row_height(row, head)
        y += _GAP_IN
        for modality, lines in self._legends:
            self._draw_legend(modality, y)
            y += _LINE_IN * lines
        if self._has_gaps:
            self._image(_stripes((8, 24)), _LABEL_IN, y + 0.06, 0.3, 0.12)
            self._text(_LABEL_IN + 0.36, y + 0.17, "no valid pixel", size=7)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The version of matplotlib must not decide the bytes.
        self._figure.savefig(path, format="png", metadata={"Software": None})

    def _row_heads(self, r: int) -> list[str]:
        """Titles to draw above a row; none if each panel has the title of the last one above."""
        above: dict[int, str] = {}
        for row in self._rows[: r + 1]:
            here = {i: f"{p.modality.name}\n{p.title}" for i, p in enumerate(row) if p is not None}
            repeated = here.items() <= above.items()
            above |= here
        return [] if repeated else [here.get(i, "\n") for i in range(len(row))]

    def _row_height(self, row: Sequence[Panel | None], heads: list[str]) -> float:
        noted = any(p is not None and is_relative(p.modality) for p in row)
        extra: float = 0.32 * bool(heads) + 0.16 * noted
        return self._panel_height + extra + _GAP_IN

    def _draw_row(self, row: Sequence[Panel | None], heads: list[str], y: float) -> None:
        limits = _row_limits(row)
        y += 0.32 * bool(heads)
        for column, panel in enumerate(row):
            if panel is None:
                continue
            x = _GAP_IN + column * (_PANEL_IN + _GAP_IN)
            if heads:
                name, _, title = heads[column].partition("\n")
                self._text(x, y - 0.19, name, size=8, weight="bold")
                self._text(x, y - 0.05, title, size=8)
            shared = limits.get(panel.modality.name)
            colors = to_rgb(panel.values, panel.valid, panel.modality, shared)
            height, width = panel.valid.shape
            scale = min(_PANEL_IN / width, self._panel_height / height)
            self._image(colors, x, y, width * scale, height * scale)
            if shared is not None:
                low, high = shared
                note = f"{low:.0f} to {high:.0f} {panel.modality.unit}"
                self._text(x, y + self._panel_height + 0.13, note, size=7, color="#666666")

    def _legend_lines(self, modality: Modality) -> int:
        if modality.is_categorical:
            return 1 + (len(self._classes(modality)) - 1) // _CLASSES_A_LINE
        return 2 if len(modality.bands) == 1 else 1

    def _classes(self, modality: Modality) -> list[LandCoverClass]:
        """The classes that occur, in the modality's order."""
        mine = [p for p in self._panels if p.modality == modality]
        codes = {int(c) for p in mine for c in np.unique(p.values[0][p.valid])}
        return [c for c in modality.classes if c.code in codes]

    def _draw_legend(self, modality: Modality, y: float) -> None:
        self._text(_GAP_IN, y + 0.17, modality.name, size=8, weight="bold")
        if modality.is_categorical:
            for i, entry in enumerate(self._classes(modality)):
                line, column = divmod(i, _CLASSES_A_LINE)
                x, top = _LABEL_IN + column * _CLASS_IN, y + line * _LINE_IN
                swatch = np.full((1, 1, 3), list(bytes.fromhex(entry.color[1:])), np.uint8)
                self._image(swatch, x, top + 0.06, 0.14, 0.12)
                self._text(x + 0.19, top + 0.17, entry.name, size=7)
            return
        if len(modality.bands) > 1:
            self._text(_LABEL_IN, y + 0.17, f"{modality.title}: {caption(modality)}", size=7)
            return
        bar = _mapped(np.linspace(0, 1, 256)[None], modality.color_map)
        self._image(bar, _LABEL_IN, y + 0.06, 2.0, 0.12)
        low, high = modality.display_range
        ticks = [low, (low + high) / 2, high]
        labels = ["row's lowest", "", "highest"] if is_relative(modality) else map(_tick, ticks)
        for share, label, anchor in zip(
            (0, 0.5, 1), labels, ("left", "center", "right"), strict=True
        ):
            self._text(_LABEL_IN + 2 * share, y + 0.31, label, size=7, align=anchor)
        unit = "" if modality.unit == "1" else f", {modality.unit}"
        scale = ", 1st to 99th percentile of a row" if is_relative(modality) else ""
        self._text(_LABEL_IN + 2.1, y + 0.17, f"{modality.title}{unit}{scale}", size=7)

    def _image(self, colors: NDArray[np.uint8], x: float, y: float, w: float, h: float) -> None:
        axes = self._figure.add_axes(
            (x / self._width, 1 - (y + h) / self._height, w / self._width, h / self._height)
        )
        enlarged = colors.shape[1] <= w * _DPI
        axes.imshow(colors, aspect="auto", interpolation="nearest" if enlarged else "antialiased")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(linewidth=0.5, color="#999999")

    def _text(self, x: float, y: float, text: str, **style: Any) -> None:
        """One line whose base is at y."""
        size, color = style.pop("size"), style.pop("color", _INK)
        self._figure.text(
            x / self._width,
            1 - y / self._height,
            text,
            fontsize=size,
            color=color,
            ha=style.pop("align", "left"),
            va="baseline",
            **style,
        )


def is_relative(modality: Modality) -> bool:
    """Whether the limits of its colours are those of the place shown (`robust_limits`)."""
    return modality.quantity is Quantity.ELEVATION


def _row_limits(row: Sequence[Panel | None]) -> dict[str, Limits]:
    """Limits that the elevations of a row share, by modality."""
    layers: dict[str, list[tuple[NDArray[Any], NDArray[np.bool_]]]] = {}
    for panel in row:
        if panel is not None and is_relative(panel.modality):
            layers.setdefault(panel.modality.name, []).append((panel.values, panel.valid))
    limits = {name: robust_limits(pairs) for name, pairs in layers.items()}
    return {name: pair for name, pair in limits.items() if pair is not None}


def _stripes(shape: tuple[int, int]) -> NDArray[np.uint8]:
    rows, columns = np.indices(shape)
    stripes: NDArray[np.uint8] = _STRIPES[((rows + columns) // 2) % 2]
    return stripes


def _tick(value: float) -> str:
    return f"{value:g}"
