"""A result to the bytes of an answer: a GeoTIFF, a zip of GeoTIFFs, or a picture."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mm_model.api import MANIFEST, PNG, TIFF, ZIP, Manifest, ManifestFile, Provenance
from mm_model.data import raster
from mm_model.modalities import Modality
from mm_model.pictures import to_rgb
from mm_model.serving.generator import Result

_GAP_PX = 4
# The same answer has the same bytes whenever it is made.
_ZIP_DATE = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class Answer:
    """The body of an HTTP answer."""

    content: bytes
    media_type: str
    filename: str


def wants_picture(accept: str) -> bool:
    """Whether an Accept header asks for a PNG rather than for data."""
    wanted = {item.split(";")[0].strip().lower() for item in accept.split(",")}
    return PNG in wanted and not wanted & {TIFF, ZIP}


def answer(
    result: Result,
    modalities: Mapping[str, Modality],
    provenance: Provenance,
    *,
    picture: bool = False,
) -> Answer:
    """A GeoTIFF for one target and one sample, a zip for more, a PNG if a picture is wanted."""
    if picture:
        return Answer(_picture(result, modalities), PNG, "generated.png")
    tiffs = geotiffs(result, modalities, provenance)
    if len(tiffs) == 1:
        ((file, content),) = tiffs.items()
        return Answer(content, TIFF, file.name)
    return Answer(_zip(result, tiffs, provenance), ZIP, "generated.zip")


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
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for file, content in geotiffs(result, modalities, provenance).items():
        paths.append(folder / file.name)
        paths[-1].write_bytes(content)
    return paths


def _geotiff(result: Result, modality: Modality, k: int, provenance: Provenance) -> bytes:
    content = raster.write_geotiff(
        None,
        result.values[modality.name][k],
        result.valid,
        result.grid,
        modality,
        tags={**provenance.tags(), "MM_SAMPLE": str(k)},
    )
    assert content is not None  # no path was given
    return content


def _zip(result: Result, tiffs: Mapping[ManifestFile, bytes], provenance: Provenance) -> bytes:
    manifest = Manifest(
        provenance=provenance,
        crs=result.grid.crs,
        transform=result.grid.transform,
        height=result.grid.height,
        width=result.grid.width,
        files=tuple(tiffs),
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored: the GeoTIFFs are compressed already
        archive.writestr(
            zipfile.ZipInfo(MANIFEST, _ZIP_DATE), manifest.model_dump_json(indent=2) + "\n"
        )
        for file, content in tiffs.items():
            archive.writestr(zipfile.ZipInfo(file.name, _ZIP_DATE), content)
    return buffer.getvalue()


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
