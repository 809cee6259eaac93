"""Real rasters as patches, as a manifest describes them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mm_model.data.align import check_median, resample, to_classes, to_physical
from mm_model.data.content import known_values
from mm_model.data.georeference import ground_sampling_m, is_metric, metric_grid, utm_zone
from mm_model.data.patch import Layer, Patch, Unit
from mm_model.data.raster import RasterHeader, read_header, read_raster
from mm_model.data.sources.manifest import (
    LINEAR_POWER,
    TIMELESS,
    BandOf,
    LayerEntry,
    SceneSpec,
    load_manifest,
)
from mm_model.data.storage import stat
from mm_model.data.strips import window_below
from mm_model.errors import ConfigError, RasterError
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality

# A file's own grid is kept, unresampled, if its pixels are within this of the size wanted.
_SAME_SIZE = 0.01
# A larger scene is read in strips of about so many, so that its size is no matter.
_PART_PX = 2048 * 2048
_SAMPLED = 64  # one pixel of so many is kept, to judge the median of a scene read in strips


@dataclass(frozen=True)
class _Part:
    """Rows of a scene's grid."""

    whole: Grid
    top: int
    rows: int

    @property
    def is_all(self) -> bool:
        return self.rows == self.whole.height

    @property
    def grid(self) -> Grid:
        if self.is_all:
            return self.whole
        return self.whole.window(self.top, 0, self.rows, self.whole.width)


class GeotiffSource:
    """A unit is a scene: all its files, on one grid, cut into patches without overlap.

    A scene of more than 2,048 px a side is read and warped in strips of rows of patches, by exact
    warping, so that a whole Sentinel-2 tile takes no more memory than a scene of that size.

    Args:
        manifest: path of the YAML file.
        patch_px: side of a patch.
        gsd_m: size of a pixel where the manifest says nothing else.
        modalities: the active ones; what the manifest says of others is not read.
    """

    def __init__(
        self, manifest: Path, patch_px: int, gsd_m: float, modalities: Sequence[Modality]
    ) -> None:
        self._patch_px = patch_px
        self._gsd_m = gsd_m
        self._modalities = {m.name: m for m in modalities}
        scenes = load_manifest(manifest)
        self._scenes = {f"{s.source}/{s.scene}": s for s in scenes}

    def units(self) -> Sequence[Unit]:
        return [Unit(key, self._fingerprint(self._scenes[key])) for key in sorted(self._scenes)]

    def read(self, unit: Unit) -> Iterator[Patch]:
        scene = self._scenes[unit.unit_id]
        gsd_m = scene.gsd_m or self._gsd_m
        grid = _scene_grid(scene, gsd_m)
        wanted = {n: e for n, e in scene.layers.items() if n in self._modalities}
        samples: dict[str, list[NDArray[Any]]] = {name: [] for name in wanted}
        for top, rows in _strips(grid, self._patch_px):
            part = _Part(grid, top, rows)
            layers = {
                n: _read_layer(scene, e, self._modalities[n], part) for n, e in wanted.items()
            }
            yield from self._cut(unit, scene, gsd_m, part, layers)
            for name, layer in layers.items():
                if not (part.is_all or self._modalities[name].is_categorical):
                    # A copy: a view would keep all of the strip.
                    samples[name].append(known_values(layer)[:, ::_SAMPLED].copy())
        for name, parts in samples.items():
            if parts:
                where = f"{scene.folder / str(wanted[name].file)}"
                check_median(np.concatenate(parts, axis=1), self._modalities[name], where)

    def _cut(
        self, unit: Unit, scene: SceneSpec, gsd_m: float, part: _Part, layers: Mapping[str, Layer]
    ) -> Iterator[Patch]:
        side = self._patch_px
        for row, col in part.grid.subdivide(side):
            window = (slice(row, row + side), slice(col, col + side))
            yield Patch(
                f"{unit.unit_id}/{part.top + row:05d}-{col:05d}",
                scene.place_id,
                scene.source,
                part.whole.window(part.top + row, col, side, side),
                gsd_m,
                {
                    name: Layer(
                        layer.values[(slice(None), *window)],
                        layer.valid[window],
                        layer.acquired_at,
                        layer.native_gsd_m,
                    )
                    for name, layer in layers.items()
                },
            )

    def _fingerprint(self, scene: SceneSpec) -> str:
        """Of what is asked of the scene, and of size and time of change of its files."""
        said = scene.model_dump_json(exclude={"folder"})
        files = []
        for name in sorted({f for e in scene.layers.values() for f, _ in _bands(e)}):
            status = _stat(scene.folder / name)
            files.append((name, status[0], status[1]))
        content = repr((said, self._patch_px, scene.gsd_m or self._gsd_m, files))
        return hashlib.sha256(content.encode()).hexdigest()


def _strips(grid: Grid, patch_px: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of what is read at a time: all, or some rows of patches."""
    if grid.height * grid.width <= _PART_PX:
        yield 0, grid.height
        return
    rows = max(1, _PART_PX // grid.width // patch_px) * patch_px
    for top in range(0, grid.height // patch_px * patch_px, rows):
        yield top, min(rows, grid.height - top)


def _stat(path: Path) -> tuple[int, str]:
    try:
        return stat(path)
    except OSError:
        raise RasterError(
            f"{path} does not exist", remedy="mend the manifest, or name the layer in `without`"
        ) from None


def _bands(entry: LayerEntry) -> list[tuple[str, int | str | None]]:
    """(file, band) of each band; one pair with None for all bands of a file."""
    if entry.bands is None:
        return [(str(entry.file), None)]
    return [
        (b.file, b.band) if isinstance(b, BandOf) else (str(entry.file), b) for b in entry.bands
    ]


def _scene_grid(scene: SceneSpec, gsd_m: float) -> Grid:
    """The file's own grid if it is square in metres and of the wanted size, else a new one."""
    path = scene.folder / _bands(scene.layers[scene.grid])[0][0]
    grid = read_header(path).grid
    if not grid.crs:
        raise RasterError(f"{path} has no reference system", remedy="choose another `grid`")
    crs = utm_zone(grid) if scene.crs == "utm" else scene.crs or grid.crs
    if not is_metric(crs):
        raise ConfigError(
            f"{scene.source}.{scene.scene}: reference system of the grid",
            got=crs[:80],
            allowed="a projected one, in metres",
            remedy=f"set crs: {utm_zone(grid)} (or crs: utm)",
        )
    sides = np.array(grid.pixel_size)
    if crs == grid.crs and (abs(sides / gsd_m - 1) < _SAME_SIZE).all():
        return grid
    return metric_grid(grid, crs, gsd_m)


def _read_layer(scene: SceneSpec, entry: LayerEntry, modality: Modality, part: _Part) -> Layer:
    """All bands of a layer, in physical units, on the scene's grid."""
    values, valid = [], np.ones(part.grid.shape, dtype=np.bool_)
    tags: Mapping[str, str] = {}
    sampled: list[float] = []
    for file, pairs in groupby(_bands(entry), key=lambda pair: pair[0]):
        wanted = [band for _, band in pairs if band is not None]
        path = scene.folder / file
        found, known, header = _read_file(path, wanted or None, entry, modality, part)
        tags = header.tags
        sampled += [gsd_m] if (gsd_m := ground_sampling_m(header.grid)) else []
        values.append(found)
        valid &= known
    stacked = np.concatenate(values)
    if len(stacked) != len(modality.bands):
        raise RasterError(
            f"{scene.folder / str(entry.file)}: bands for {modality.name}",
            got=len(stacked),
            allowed=len(modality.bands),
            remedy="list `bands` in the manifest",
        )
    native_gsd_m = entry.native_gsd_m or max(sampled, default=None)
    return Layer(stacked, valid, _date(entry, tags, scene), native_gsd_m)


def _read_file(
    path: Path,
    bands: Sequence[int | str] | None,
    entry: LayerEntry,
    modality: Modality,
    part: _Part,
) -> tuple[NDArray[Any], NDArray[np.bool_], RasterHeader]:
    window = None
    if not part.is_all:
        header = read_header(path)
        window = _window(header.grid, part)
        if window is None:  # the file ends above or begins below
            shape = (len(modality.bands if bands is None else bands), *part.grid.shape)
            return np.zeros(shape, modality.dtype), np.zeros(part.grid.shape, np.bool_), header
    raster = read_raster(path, bands=bands, window=window)
    valid = raster.valid
    for nodata in entry.nodata:
        valid = valid & (raster.values != nodata).all(axis=0)
    if not raster.grid.crs:
        raise RasterError(f"{path} has no reference system", remedy="georeference it")
    if entry.classes is not None:
        values, valid = to_classes(raster.values, valid, entry.classes, str(path))
    else:
        values, valid = to_physical(
            raster.values,
            valid,
            modality,
            scales=raster.scales if entry.scale is None else [entry.scale] * len(raster.values),
            offsets=raster.offsets if entry.offset is None else [entry.offset] * len(raster.values),
            linear_power=entry.unit == LINEAR_POWER,
            out_of_range=entry.out_of_range,
            where=str(path),
            is_part=not part.is_all,
        )
    source = raster.grid if window is None else raster.grid.window(*window)
    values, valid = resample(values, valid, source, part.grid, modality, exact=not part.is_all)
    return values, valid, raster.header


def _window(grid: Grid, part: _Part) -> tuple[int, int, int, int] | None:
    """The rows, or what of a file lies below them where it has another grid."""
    if grid == part.whole:
        return part.top, 0, part.rows, grid.width
    return window_below(grid, part.grid)


def _date(entry: LayerEntry, tags: Mapping[str, str], scene: SceneSpec) -> str | None:
    if entry.date is None or entry.date == TIMELESS:
        return None
    if not entry.date.startswith("tag:"):
        return entry.date
    tag = entry.date.removeprefix("tag:")
    match = re.match(r"(\d{4})-?(\d{2})-?(\d{2})", tags.get(tag, ""))
    if match is None:
        raise RasterError(
            f"{scene.folder / str(entry.file)}: tag {tag}",
            got=repr(tags.get(tag)),
            allowed="a date, as YYYY-MM-DD or YYYYMMDD",
        )
    return "-".join(match.groups())
