"""Are the layers of a patch where they say they are? Measured for each, corrected or left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_model.config import AlignmentConfig
from mm_model.data.coregistration import Shift, features, find_shift
from mm_model.data.patch import Layer, Patch
from mm_model.modalities import Modality


def align(
    patch: Patch, modalities: Sequence[Modality], config: AlignmentConfig
) -> tuple[Patch, dict[str, dict[str, Any]]]:
    """Measure every layer against the patch's reference layer, and act as declared.

    The reference is the first of `modalities` that the patch has. A layer whose shift is known and
    longer than `max_shift_px` is moved back by whole pixels (what comes in from outside is invalid;
    the rest is measured again), left out, or kept. A shift that is not known changes nothing.

    Returns:
        The patch, and for each of its layers the columns of the index: `shift_reference` (None for
        the reference itself), `shift_row_px`, `shift_col_px` (of what is stored; NaN where
        unknown), `shift_confidence`, `moved_rows_px`, `moved_cols_px` (by which it was moved) and
        `excluded_layers` (what was left out of this patch, with its shift; None where nothing was).
    """
    present = [m for m in modalities if m.name in patch.layers]
    layers = dict(patch.layers)
    columns: dict[str, dict[str, Any]] = {}
    left_out = []
    reference = present[0]
    columns[reference.name] = _columns(None, Shift(0.0, 0.0, np.nan))
    if len(present) == 1:
        return patch, columns
    target = features(layers[reference.name], reference, patch.gsd_m)
    for modality in present[1:]:
        layer = layers[modality.name]
        shift = find_shift(target, features(layer, modality, patch.gsd_m))
        moved = (0, 0)
        if shift.is_known and shift.length_px > config.max_shift_px:
            if config.action == "exclude":
                left_out.append(f"{modality.name} {shift.row_px:+.2f} {shift.col_px:+.2f} px")
                del layers[modality.name]
                continue
            if config.action == "correct":
                moved = -round(shift.row_px), -round(shift.col_px)
                layer = layers[modality.name] = _moved(layer, *moved)
                shift = find_shift(target, features(layer, modality, patch.gsd_m))
        columns[modality.name] = _columns(reference.name, shift, moved)
    if left_out:
        for row in columns.values():
            row["excluded_layers"] = "; ".join(left_out)
    return replace(patch, layers=layers), columns


def _columns(
    reference: str | None, shift: Shift, moved: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    return {
        "shift_reference": reference,
        "shift_row_px": shift.row_px,
        "shift_col_px": shift.col_px,
        "shift_confidence": shift.confidence,
        "moved_rows_px": moved[0],
        "moved_cols_px": moved[1],
        "excluded_layers": None,
    }


def _moved(layer: Layer, rows: int, cols: int) -> Layer:
    """The layer's content this much farther down and to the right."""
    valid = _rolled(layer.valid[None], rows, cols)[0]
    # np.roll brings in at one border what has left at the other.
    inside = np.zeros_like(valid)
    height, width = valid.shape
    inside[max(0, rows) : height + min(0, rows), max(0, cols) : width + min(0, cols)] = True
    return replace(layer, values=_rolled(layer.values, rows, cols), valid=valid & inside)


def _rolled(values: NDArray[Any], rows: int, cols: int) -> NDArray[Any]:
    return np.roll(values, (rows, cols), (1, 2))
