"""Counting what a patch store holds: places, sets of modalities, dates, values and classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mm_model.data.footprints import BBOX, GEOMETRY
from mm_model.data.index import INDEX
from mm_model.data.patch import Layer
from mm_model.data.quality import day_span
from mm_model.data.stats import BandSummary
from mm_model.data.store import PatchStore
from mm_model.modalities import Modality

MOST_LAYERS = 10_000
"""Layers of a modality whose pixels are counted: all, or so many, evenly spread over the store."""
_BATCH = 64  # layers that are summed up together


@dataclass(frozen=True)
class Values:
    """Pixels of a modality.

    Attributes:
        layers: number of layers that were counted.
        pixels: of them, valid ones.
        bands: a summary a band; empty for classes.
        classes: code → pixels; empty for numbers.
    """

    layers: int
    pixels: int
    bands: Sequence[BandSummary]
    classes: Mapping[int, int]


@dataclass(frozen=True)
class Census:
    """What a store holds.

    Attributes:
        modalities: the active ones, in declared order.
        patches: one row a patch, in the store's order: patch_id, place_id, source, split, crs,
            gsd_m, members (of `modalities`, as bits), xmin, ymin, xmax, ymax (degrees, NaN where it
            lies nowhere), first_day and last_day (ordinals, NaN where no date is known).
        places: one row a place: place_id, source, patches, members (of any of its patches), lon,
            lat (degrees of its middle, NaN where it lies nowhere).
        layers: one row a modality, by name: layers, valid_fraction (mean), dated, first_day,
            last_day, native_gsd_m (tuple of the distances that occur, in metres).
        values: modality name → its pixels.
    """

    modalities: tuple[Modality, ...]
    patches: pd.DataFrame
    places: pd.DataFrame
    layers: pd.DataFrame
    values: Mapping[str, Values]

    def names(self, members: int) -> tuple[str, ...]:
        """The modalities of a set that is given as bits."""
        return tuple(m.name for i, m in enumerate(self.modalities) if members >> i & 1)

    @property
    def sets(self) -> list[tuple[int, int, int]]:
        """Sets of modalities that occur together in a patch: members, patches, places."""
        groups = self.patches.groupby("members")
        counts = pd.DataFrame({"n": groups.size(), "places": groups["place_id"].nunique()})
        rows = [(int(m), int(n), int(p)) for m, n, p in counts.itertuples()]
        return sorted(rows, key=lambda row: (-row[1], row[0]))


def take_census(store: PatchStore, splits: pd.DataFrame, modalities: Sequence[Modality]) -> Census:
    """Count; the memory it takes does not grow with the pixels.

    Args:
        store: the patches.
        splits: columns patch_id and split.
        modalities: the active ones.
    """
    index = store.index
    number = {m.name: i for i, m in enumerate(modalities)}
    begins = (index["patch_id"] != index["patch_id"].shift()).to_numpy(dtype=bool)
    starts = np.flatnonzero(begins)
    bits = np.left_shift(1, index["modality"].map(number).to_numpy(np.int64))
    days = _days(index["acquired_at"])
    patches = index.loc[begins, ["patch_id", "place_id", "source", "crs", "gsd_m"]]
    patches = patches.reset_index(drop=True)
    patches["split"] = patches["patch_id"].map(splits.set_index("patch_id")["split"])
    patches["members"] = np.bitwise_or.reduceat(bits, starts)
    patches["first_day"] = np.fmin.reduceat(days[:, 0], starts)
    patches["last_day"] = np.fmax.reduceat(days[:, 1], starts)
    outlines, boxes = _outlines(store, starts)
    patches[["xmin", "ymin", "xmax", "ymax"]] = boxes
    return Census(
        tuple(modalities),
        patches,
        _places(patches, outlines),
        _layers(index, days, modalities),
        _values(store, index["modality"].to_numpy(), np.cumsum(begins) - 1, modalities),
    )


def _days(dates: pd.Series[str]) -> NDArray[np.float64]:
    """First and last day that each date may mean, as ordinals; NaN where there is none."""
    known = {text: day_span(text) for text in dates.dropna().unique()}
    spans = {text: span or (np.nan, np.nan) for text, span in known.items()}
    unknown = (np.nan, np.nan)
    return np.array([spans.get(text, unknown) for text in dates], np.float64).reshape(-1, 2)


def _outlines(
    store: PatchStore, starts: NDArray[np.int64]
) -> tuple[NDArray[np.object_], NDArray[np.float64]]:
    """Shape and box of each patch, in degrees."""
    table = pq.read_table(store.path / INDEX, columns=[GEOMETRY, BBOX]).take(starts)
    sides = [f"{BBOX}.{k}" for k in ("xmin", "ymin", "xmax", "ymax")]
    boxes = table.select([BBOX]).flatten().select(sides).to_pandas().to_numpy(np.float64)
    shapes: NDArray[np.object_] = shapely.from_wkb(table[GEOMETRY].to_numpy())
    return shapes, boxes


def _places(patches: pd.DataFrame, outlines: NDArray[np.object_]) -> pd.DataFrame:
    order = np.argsort(codes := pd.factorize(patches["place_id"])[0], kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    chosen = patches.iloc[order]
    places = chosen.iloc[starts][["place_id", "source"]].reset_index(drop=True)
    places["patches"] = np.diff(np.append(starts, len(order)))
    places["members"] = np.bitwise_or.reduceat(chosen["members"].to_numpy(), starts)
    # The mean direction from the Earth's middle: degrees have a seam at the antimeridian, and what
    # was cut there is taken by its first part.
    middles = shapely.centroid(shapely.get_geometry(outlines, 0))[order]
    lon, lat = np.radians(shapely.get_x(middles)), np.radians(shapely.get_y(middles))
    towards = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
    x, y, z = np.add.reduceat(towards, starts, axis=1)
    places["lon"], places["lat"] = (
        np.degrees(np.arctan2(y, x)),
        np.degrees(np.arctan2(z, np.hypot(x, y))),
    )
    return places


def _layers(
    index: pd.DataFrame, days: NDArray[np.float64], modalities: Sequence[Modality]
) -> pd.DataFrame:
    records = {}
    for modality in modalities:
        mine = (index["modality"] == modality.name).to_numpy()
        dated = days[mine][~np.isnan(days[mine][:, 0])]
        records[modality.name] = {
            "layers": int(mine.sum()),
            "valid_fraction": float(index.loc[mine, "valid_fraction"].mean()),
            "dated": len(dated),
            "first_day": dated[:, 0].min() if len(dated) else np.nan,
            "last_day": dated[:, 1].max() if len(dated) else np.nan,
            "native_gsd_m": tuple(sorted(index.loc[mine, "native_gsd_m"].dropna().unique())),
        }
    return pd.DataFrame.from_dict(records, orient="index")


def _values(
    store: PatchStore,
    names: NDArray[np.object_],
    positions: NDArray[np.int64],
    modalities: Sequence[Modality],
) -> dict[str, Values]:
    """Pixels of each modality; `names` and `positions` say which layer each row of the index is."""
    chosen = {m.name: spread(positions[names == m.name], MOST_LAYERS) for m in modalities}
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("layers"), TimeRemainingColumn()
    found = {}
    with Progress(TextColumn("{task.description}"), *columns) as progress:
        task = progress.add_task("counting", total=sum(map(len, chosen.values())))

        def batches(modality: Modality) -> Iterator[list[Layer]]:
            mine = chosen[modality.name]
            for i in range(0, len(mine), _BATCH):
                yield [_layer(store, p, modality) for p in mine[i : i + _BATCH]]
                progress.advance(task, len(mine[i : i + _BATCH]))

        for modality in modalities:
            progress.update(task, description=f"counting {modality.name}")
            counted = _counted_classes if modality.is_categorical else _summed_bands
            found[modality.name] = counted(modality, len(chosen[modality.name]), batches(modality))
    return found


def spread(items: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """All of them, or `most` of them in even steps."""
    if len(items) <= most:
        return items
    return items[(np.arange(most) * len(items)) // most]


def _layer(store: PatchStore, position: int, modality: Modality) -> Layer:
    return store.read(int(position), [modality.name]).layers[modality.name]


def _counted_classes(modality: Modality, layers: int, batches: Iterator[list[Layer]]) -> Values:
    counts = np.zeros(256, np.int64)
    for batch in batches:
        known = np.concatenate([layer.values[0, layer.valid] for layer in batch])
        counts += np.bincount(known, minlength=256)
    classes = {code: int(counts[code]) for code in modality.class_codes}
    return Values(layers, int(counts.sum()), (), classes)


def _summed_bands(modality: Modality, layers: int, batches: Iterator[list[Layer]]) -> Values:
    def summed(values: NDArray[np.generic]) -> list[BandSummary]:
        return [BandSummary.of(band, modality.valid_range) for band in values]

    bands = summed(np.empty((len(modality.bands), 0), np.float32))
    for batch in batches:
        known = np.concatenate([layer.values[:, layer.valid] for layer in batch], axis=1)
        bands = [a.merge(b) for a, b in zip(bands, summed(known), strict=True)]
    return Values(layers, reduce(max, (b.moments.count for b in bands)), bands, {})
