"""A result to the bytes of an answer: a GeoTIFF, a zip, a picture, or a vector."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_model.api import (
    JSON,
    MANIFEST,
    PNG,
    SCENE_FILE,
    SIDECAR,
    TIFF,
    VECTOR_FILE,
    ZIP,
    AlignedManifest,
    Manifest,
    ManifestFile,
    Origin,
    Provenance,
    Record,
    SceneOrigin,
    SceneVector,
)
from mm_model.data import georeference, raster
from mm_model.data.sidecar import sidecar
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality
from mm_model.pictures import to_rgb
from mm_model.serving.requests import Aligned, Embedding, Result

_GAP_PX = 4
# The same answer has the same bytes whenever it is made.
ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Answer:
    """The body of an HTTP answer."""

    content: bytes
    media_type: str
    filename: str


def wanted_type(accept: str, offered: Sequence[str]) -> str:
    """The first of the media types on offer that an Accept header names; the first, if none."""
    wanted = {item.split(";")[0].strip().lower() for item in accept.split(",")}
    return next((media_type for media_type in offered if media_type in wanted), offered[0])


def answer(
    result: Result,
    modalities: Mapping[str, Modality],
    provenance: Provenance,
    *,
    media_type: str = TIFF,
) -> Answer:
    """A GeoTIFF for one target and one sample, a zip for more or where one is wanted; or a PNG."""
    if media_type == PNG:
        return Answer(_picture(result, modalities), PNG, "generated.png")
    tiffs = geotiffs(result, modalities, provenance)
    if len(tiffs) == 1 and media_type == TIFF:
        ((file, content),) = tiffs.items()
        return Answer(content, TIFF, file.name)
    files = _with_manifest(result, tiffs, provenance) | _sidecars(tiffs, modalities)
    return Answer(_zip(files), ZIP, "generated.zip")


def aligned_answer(aligned: Aligned, modalities: Mapping[str, Modality], origin: Origin) -> Answer:
    """The observed layers as GeoTIFFs on their one grid, and a manifest that places it."""
    grid = aligned.grid
    manifest = AlignedManifest(
        origin=origin,
        crs=grid.crs,
        transform=grid.transform,
        height=grid.height,
        width=grid.width,
        corners_lonlat=_corners_lonlat(grid),
    )
    layers = {
        f"{name}.tif": _written(values, valid, grid, modalities[name], origin.tags())
        for name, (values, valid) in aligned.observed.items()
    }
    return Answer(_zip({MANIFEST: encode_record(manifest), **layers}), ZIP, "aligned.zip")


def _corners_lonlat(grid: Grid) -> tuple[tuple[float, float], ...] | None:
    """None where the grid lies nowhere on Earth, or beyond what its system can express."""
    if georeference.latitude_deg(grid) is None:
        return None
    corners = ((0, 0), (0, grid.width), (grid.height, grid.width), (grid.height, 0))
    xs, ys = zip(*(grid.xy(row, col) for row, col in corners), strict=True)
    found = georeference.to_lonlat(grid.crs, xs, ys)
    return tuple((lon, lat) for lon, lat in found.tolist()) if np.isfinite(found).all() else None


def embedding_answer(embedding: Embedding, origin: SceneOrigin, media_type: str) -> Answer:
    """The scene as a GeoTIFF, its vector as JSON, or a zip of both."""
    if media_type == TIFF:
        return Answer(_scene(embedding, origin), TIFF, SCENE_FILE)
    if media_type == JSON:
        return Answer(_vector(embedding, origin), JSON, VECTOR_FILE)
    return Answer(_zip(_scene_and_vector(embedding, origin)), ZIP, "scene.zip")


def geotiffs(
    result: Result, modalities: Mapping[str, Modality], provenance: Provenance
) -> dict[ManifestFile, bytes]:
    """A GeoTIFF for each target and sample: `<target>.tif`, or `<target>_<sample>.tif`."""
    several = provenance.samples > 1
    return {
        ManifestFile(
            name=f"{name}_{k}.tif" if several else f"{name}.tif", modality=name, sample=k
        ): _geotiff(result, modalities[name], k, provenance)
        for name, samples in result.values.items()
        for k in range(len(samples))
    }


def write_answer(
    result: Result, modalities: Mapping[str, Modality], provenance: Provenance, folder: Path
) -> list[Path]:
    """Write the GeoTIFFs below a folder, which is made; returns their paths."""
    tiffs = geotiffs(result, modalities, provenance)
    _write(_sidecars(tiffs, modalities), folder)
    return _write({file.name: content for file, content in tiffs.items()}, folder)


def write_embedding(embedding: Embedding, origin: SceneOrigin, folder: Path) -> list[Path]:
    """Write scene.tif and vector.json below a folder, which is made; returns their paths."""
    return _write(_scene_and_vector(embedding, origin), folder)


def _write(files: Mapping[str, bytes], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def _scene_and_vector(embedding: Embedding, origin: SceneOrigin) -> dict[str, bytes]:
    return {SCENE_FILE: _scene(embedding, origin), VECTOR_FILE: _vector(embedding, origin)}


def _scene(embedding: Embedding, origin: SceneOrigin) -> bytes:
    """A float32 band a channel, named z00, z01, …; NaN where nothing was observed."""
    return raster.encode_geotiff(
        np.where(embedding.valid, embedding.scene, np.float32(np.nan)),
        embedding.grid,
        [f"z{k:02}" for k in range(len(embedding.scene))],
        nodata=np.nan,
        tags=origin.tags(),
    )


def _vector(embedding: Embedding, origin: SceneOrigin) -> bytes:
    return encode_record(SceneVector(**dict(origin), vector=tuple(embedding.vector.tolist())))


def _geotiff(result: Result, modality: Modality, k: int, provenance: Provenance) -> bytes:
    tags = {**provenance.tags(), "MM_SAMPLE": str(k)}
    return _written(result.values[modality.name][k], result.valid, result.grid, modality, tags)


def _written(
    values: NDArray[np.generic],
    valid: NDArray[np.bool_],
    grid: Grid,
    modality: Modality,
    tags: Mapping[str, str],
) -> bytes:
    content = raster.write_geotiff(None, values, valid, grid, modality, tags=tags)
    assert content is not None  # no path was given
    return content


def _with_manifest(
    result: Result, tiffs: Mapping[ManifestFile, bytes], provenance: Provenance
) -> dict[str, bytes]:
    manifest = Manifest(
        provenance=provenance,
        crs=result.grid.crs,
        transform=result.grid.transform,
        height=result.grid.height,
        width=result.grid.width,
        files=tuple(tiffs),
    )
    return {MANIFEST: encode_record(manifest), **{file.name: c for file, c in tiffs.items()}}


def _sidecars(
    tiffs: Mapping[ManifestFile, bytes], modalities: Mapping[str, Modality]
) -> dict[str, bytes]:
    made = {file.name + SIDECAR: sidecar(modalities[file.modality]) for file in tiffs}
    return {name: content for name, content in made.items() if content is not None}


def _zip(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored: the GeoTIFFs are compressed already
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, ZIP_DATE), content)
    return buffer.getvalue()


def encode_record(record: Record) -> bytes:
    return (record.model_dump_json(indent=2) + "\n").encode()


def _picture(result: Result, modalities: Mapping[str, Modality]) -> bytes:
    """A row of pictures for each target, a column for each sample, as PNG."""
    height, width = result.grid.shape
    rows, columns = len(result.values), len(next(iter(result.values.values())))
    step_y, step_x = height + _GAP_PX, width + _GAP_PX
    canvas: NDArray[np.uint8] = np.full(
        (rows * step_y - _GAP_PX, columns * step_x - _GAP_PX, 3), 255, np.uint8
    )
    for row, (name, samples) in enumerate(result.values.items()):
        for column, values in enumerate(samples):
            top, left = row * step_y, column * step_x
            canvas[top : top + height, left : left + width] = to_rgb(
                values, result.valid, modalities[name]
            )
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, "png")
    return buffer.getvalue()
