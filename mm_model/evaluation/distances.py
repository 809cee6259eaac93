"""A picture of how well each translation goes at each ground sampling distance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_model.modalities import Kind

# Kind → figure, what it is called with its unit, decimals.
_FIGURES = {
    Kind.CONTINUOUS: ("psnr_of_mean_db", "PSNR, dB", 1),
    Kind.CATEGORICAL: ("miou_of_mean", "mIoU", 2),
}
_CELL_IN, _LABEL_IN = (0.62, 0.26), 1.5


def save_distances(path: Path, distances: Sequence[Mapping[str, Any]]) -> None:
    """Write a PNG: a matrix of observed sets × targets for each distance, side by side, for
    continuous targets and for classes; all matrices of a kind share their colours.

    Args:
        path: of the PNG.
        distances: `distances` of metrics.json.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = distances[0]["rows"]
    kinds = [k for k in _FIGURES if any(r["kind"] == k for r in rows)]
    observed = list(dict.fromkeys(tuple(r["observed"]) for r in rows))
    targets = {k: list(dict.fromkeys(r["target"] for r in rows if r["kind"] == k)) for k in kinds}
    width = max(sum(map(len, targets.values())) * _CELL_IN[0] * len(distances), 5) + 2.4 * _LABEL_IN
    height = len(observed) * _CELL_IN[1] + 2.1
    figure = Figure((width, height), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    ratios = [len(targets[k]) + 2 for k in kinds]
    parts: Any = figure.subfigures(1, len(kinds), squeeze=False, width_ratios=ratios)
    for kind, part in zip(kinds, parts[0], strict=True):
        key, name, digits = _FIGURES[kind]
        grids = [_matrix(d["rows"], observed, targets[kind], key) for d in distances]
        known = np.concatenate([g[np.isfinite(g)] for g in grids])
        limits = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        axes = np.atleast_1d(part.subplots(1, len(distances), sharey=True))
        for ax, grid, distance in zip(axes, grids, distances, strict=True):
            image = ax.imshow(grid, aspect="auto", cmap="cividis", vmin=limits[0], vmax=limits[1])
            counts = f"{distance['patches']} patches\n{distance['places']} places"
            head = f"{distance['gsd_m']:g} m\n{counts}"
            ax.set_title(head, fontsize=7)
            ax.set_xticks(range(len(targets[kind])), targets[kind], fontsize=7)
            ax.set_yticks(range(len(observed)), [_name(o) for o in observed], fontsize=7)
            for (row, column), value in np.ndenumerate(grid):
                bright = np.isfinite(value) and value > sum(limits) / 2
                text = f"{value:.{digits}f}" if np.isfinite(value) else "–"
                color = "#111111" if bright or not np.isfinite(value) else "white"
                ax.text(column, row, text, ha="center", va="center", fontsize=6, color=color)
        bar = part.colorbar(image, ax=list(axes), location="bottom", aspect=30)
        bar.set_label(name, fontsize=7)
        bar.ax.tick_params(labelsize=6)
    figure.suptitle(
        "Observed (rows) to target (columns): mean of the samples, by sampling distance", fontsize=9
    )
    figure.savefig(path, format="png", metadata={"Software": None})


def _matrix(
    rows: Sequence[Mapping[str, Any]],
    observed: Sequence[tuple[str, ...]],
    targets: Sequence[str],
    key: str,
) -> NDArray[np.float64]:
    """[observed, targets]; NaN where there is no such row, or no patch of it."""
    found = {(tuple(r["observed"]), r["target"]): r.get(key) for r in rows}
    values = [[found.get((o, t)) for t in targets] for o in observed]
    return np.array(values, dtype=np.float64)


def _name(observed: Sequence[str]) -> str:
    return ", ".join(observed)
