"""Does a new batch look like what the model was trained on? By band and class, with a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_model.data.store import PatchStore
from mm_model.errors import DataError
from mm_model.modalities import Modality

MOST_DISTANCE = 0.25
"""Above it a band or a legend has drifted. Chosen: a quarter of the pixels would have to change."""


@dataclass(frozen=True)
class Drift:
    """A band, or the classes of a map, of a batch beside those of the training set.

    Attributes:
        modality, what: what is compared; `what` is the band, or "classes".
        distance: 0 (alike) to 1. For a band the largest difference of the two cumulative
            distributions at the training set's quantiles (Kolmogorov and Smirnov's distance, as far
            as those tell it); for classes half the sum of the differences of their shares (total
            variation).
        trained, seen: medians in the modality's unit; of classes, the code that changed most and
            its share.
    """

    modality: str
    what: str
    distance: float
    trained: str
    seen: str

    @property
    def has_drifted(self) -> bool:
        return self.distance > MOST_DISTANCE


def drift(
    batch: PatchStore, statistics: Mapping[str, Any], modalities: Sequence[Modality]
) -> list[Drift]:
    """Every band and legend of the batch against the training statistics (data/stats.json).

    Modalities that the batch lacks are not there.

    Raises:
        DataError: the batch has a modality that the statistics lack, or no valid pixel.
    """
    found: list[Drift] = []
    for modality in modalities:
        layers = [
            layer
            for position in range(len(batch))
            for layer in batch.read(position, [modality.name]).layers.values()
        ]
        if not layers:
            continue
        trained = statistics["modalities"].get(modality.name)
        if trained is None:
            raise DataError(
                f"drift of {modality.name}",
                got="no statistics of it",
                allowed=sorted(statistics["modalities"]),
                remedy="run the stage stats with this modality",
            )
        known = np.concatenate([y.values[:, y.valid] for y in layers], axis=1)
        if not known.size:
            continue
        if modality.is_categorical:
            found.append(_of_classes(modality, known[0], trained["classes"]))
        else:
            found += [
                _of_band(modality, band, values)
                for band, values in zip(trained["bands"], known, strict=True)
            ]
    if not found:
        raise DataError("drift of a batch", got="no valid pixel of an active modality")
    return found


def _of_band(modality: Modality, band: Mapping[str, Any], values: np.ndarray[Any, Any]) -> Drift:
    ordered = np.sort(values)
    distance = 0.0
    for share, quantile in band["quantiles"].items():
        # Where many pixels share the quantile's value, the step of the distribution spans a range.
        below, upto = (
            float(np.searchsorted(ordered, quantile, side)) / len(ordered)
            for side in ("left", "right")
        )
        distance = max(distance, below - float(share), float(share) - upto)
    unit = "" if modality.unit == "1" else f" {modality.unit}"
    return Drift(
        modality.name,
        band["name"],
        distance,
        f"{band['quantiles']['0.5']:.4g}{unit}",
        f"{np.median(ordered):.4g}{unit}",
    )


def _of_classes(
    modality: Modality, codes: np.ndarray[Any, Any], trained: Mapping[str, int]
) -> Drift:
    counts = np.bincount(codes, minlength=256)
    before = np.array([trained[str(c.code)] for c in modality.classes]) / sum(trained.values())
    after = np.array([counts[c.code] for c in modality.classes]) / len(codes)
    most = int(np.abs(after - before).argmax())
    name = modality.classes[most].name
    return Drift(
        modality.name,
        "classes",
        float(np.abs(after - before).sum() / 2),
        f"{name} {before[most]:.0%}",
        f"{name} {after[most]:.0%}",
    )
