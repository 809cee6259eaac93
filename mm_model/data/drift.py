"""Does a new batch look like what the model was trained on? By band and class, with a verdict."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mm_model.data.index import INDEX
from mm_model.data.patch import Layer
from mm_model.data.stats import BandSummary, layers_of
from mm_model.data.store import PatchStore
from mm_model.errors import DataError
from mm_model.modalities import MODALITIES, Modality

MOST_DISTANCE = 0.25
"""Above it a band or a legend has drifted. Chosen: a quarter of the pixels would have to change."""

HEADS = ("modality", "of", "trained on", "batch", "distance", "verdict")
"""Of a table of `Drift.cells`."""


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

    @property
    def cells(self) -> tuple[str, str, str, str, str, str]:
        verdict = "drifted" if self.has_drifted else "alike"
        distance = f"{self.distance:.2f}"
        return (self.modality, self.what, self.trained, self.seen, distance, verdict)


def seen_layers(store: Path) -> frozenset[str]:
    """SHA-256 of the layers of a store of any version; empty where there is none."""
    if not (store / INDEX).is_file():
        return frozenset()
    return frozenset(pd.read_parquet(store / INDEX, columns=["sha256"])["sha256"])


def drift_of_new(data: Path, seen: frozenset[str]) -> tuple[int, list[Drift], list[str]]:
    """What is new in a pipeline's patches beside the statistics that stand.

    Args:
        data: folder of patches, splits.parquet and stats.json.
        seen: layers that were there before. A patch is new if it has another layer; and if
            splits.parquet lacks it, so that what came in before an interruption is not missed.

    Returns:
        How many patches are new; their drift (empty where nothing can be compared); and the
        modalities of them that the statistics do not describe.
    """
    store, split, statistics = PatchStore(data / "patches"), data / "splits.parquet", {}
    ids = set(pd.read_parquet(split)["patch_id"]) if split.is_file() else set()
    index = store.index
    fresh = index[~index["sha256"].isin(seen) | ~index["patch_id"].isin(ids)]
    new = set(fresh["patch_id"])
    if new and (data / "stats.json").is_file():
        statistics = json.loads((data / "stats.json").read_text())
    present = [MODALITIES[n] for n in index.loc[index["patch_id"].isin(new), "modality"].unique()]
    known = [m for m in present if is_described(m, statistics)]
    lacking = [m.name for m in present if m not in known]
    positions = [at for at, patch in enumerate(store.patch_ids) if patch in new]
    return len(new), drift(store, statistics, known, positions), lacking


def is_described(modality: Modality, statistics: Mapping[str, Any]) -> bool:
    """Whether the statistics are of the modality's bands or classes, as they are declared now."""
    trained = statistics.get("modalities", {}).get(modality.name, {})
    if modality.is_categorical:
        return set(trained.get("classes", ())) == {str(code) for code in modality.class_codes}
    return [band["name"] for band in trained.get("bands", ())] == list(modality.band_names)


def drift(
    batch: PatchStore,
    statistics: Mapping[str, Any],
    modalities: Sequence[Modality],
    positions: Sequence[int] | None = None,
) -> list[Drift]:
    """Every band and legend of the batch against the training statistics (data/stats.json).

    Modalities of which the batch has no valid pixel are not there. Memory does not grow with the
    batch.

    Args:
        batch: patches.
        statistics: of the training set.
        modalities: those that are compared.
        positions: of the patches that are compared; all without.

    Raises:
        DataError: the batch has a modality that the statistics do not describe.
    """
    found: list[Drift] = []
    compared = range(len(batch)) if positions is None else positions
    for modality in modalities:
        layers = layers_of(batch, compared, modality)
        seen = _classes(layers) if modality.is_categorical else _bands(layers, modality)
        if seen is None:
            continue
        trained = statistics["modalities"].get(modality.name)
        if not is_described(modality, statistics):
            raise DataError(
                f"drift of {modality.name}",
                got="other bands or classes" if trained else "no statistics of it",
                allowed=sorted(statistics["modalities"]),
                remedy="run the stage stats with this modality",
            )
        if isinstance(seen, list):
            bands = zip(trained["bands"], seen, strict=True)
            found += [_of_band(modality, *pair) for pair in bands]
        else:
            found.append(_of_classes(modality, seen, trained["classes"]))
    return found


def _classes(layers: Iterable[Layer]) -> NDArray[np.int64] | None:
    """Pixels of each code, or None without a valid one."""
    counts = np.zeros(256, np.int64)
    for layer in layers:
        counts += np.bincount(layer.values[0, layer.valid], minlength=256)
    return counts if counts.any() else None


def _bands(layers: Iterable[Layer], modality: Modality) -> list[BandSummary] | None:
    """What each band is like, or None without a valid pixel."""
    merged: list[BandSummary] | None = None
    for layer in layers:
        known = layer.values[:, layer.valid]
        if known.size:
            parts = [BandSummary.of(values, modality.valid_range) for values in known]
            merged = [a.merge(b) for a, b in zip(merged, parts, strict=True)] if merged else parts
    return merged


def _of_band(modality: Modality, trained: Mapping[str, Any], seen: BandSummary) -> Drift:
    distance = band_distance(trained["quantiles"], seen.shares)
    unit = "" if modality.unit == "1" else f" {modality.unit}"
    return Drift(
        modality.name,
        trained["name"],
        distance,
        f"{trained['quantiles']['0.5']:.4g}{unit}",
        f"{seen.quantile(0.5):.4g}{unit}",
    )


def band_distance(
    quantiles: Mapping[str, float], shares: Callable[[float], tuple[float, float]]
) -> float:
    """Kolmogorov and Smirnov's distance, as far as the training set's quantiles tell it, 0 to 1.

    Args:
        quantiles: share of the training set → the value that this share does not exceed.
        shares: of what was seen, below a value and up to it.
    """
    distance = 0.0
    for share, quantile in quantiles.items():
        # Where many pixels share the quantile's value, the step of the distribution spans a range.
        below, upto = shares(quantile)
        distance = max(distance, below - float(share), float(share) - upto)
    return distance


def class_changes(
    modality: Modality, trained: Mapping[str, int], shares: NDArray[np.floating]
) -> NDArray[np.float64]:
    """How much the share of each declared class differs from the training set's; half the sum of
    the amounts is the total variation.

    Args:
        modality: says which classes there are.
        trained: pixels of each code.
        shares: of what was seen, by code [256].
    """
    before = np.array([trained[str(c.code)] for c in modality.classes]) / sum(trained.values())
    after = np.array([shares[c.code] for c in modality.classes])
    return np.asarray(after - before, np.float64)


def _of_classes(modality: Modality, counts: NDArray[np.int64], trained: Mapping[str, int]) -> Drift:
    shares = counts / counts.sum()
    changes = class_changes(modality, trained, shares)
    most = int(np.abs(changes).argmax())
    name, after = modality.classes[most].name, shares[modality.classes[most].code]
    return Drift(
        modality.name,
        "classes",
        float(np.abs(changes).sum() / 2),
        f"{name} {after - changes[most]:.0%}",
        f"{name} {after:.0%}",
    )
