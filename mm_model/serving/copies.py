"""Uploads to files that can be trusted: decoded by a confined process, written anew as they were.

Whoever reads such a copy reads the same pixels, mask, scale and offset that the upload holds, but
nothing else of what its sender wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mm_model.data import raster
from mm_model.data.strips import COPY_BLOCK_PX, strips, write_copy
from mm_model.modalities import Modality
from mm_model.serving.decoders import Decoder, FileDecoder
from mm_model.serving.generator import Generator
from mm_model.serving.layers import bands_of
from mm_model.serving.requests import SceneRequest
from mm_model.serving.uploads import check_header, check_signature, read_header, whole_file

_Rows = Iterator[tuple[int, NDArray[np.generic], NDArray[np.bool_]]]


def copy_uploads(
    request: SceneRequest,
    files: Mapping[str, bytes],
    generator: Generator,
    decoder: Decoder,
    folder: Path,
) -> SceneRequest:
    """The request with copies of uploads that are in memory, in a folder.

    Raises:
        RequestError: a file is not what it should be; no copy is made before all headers are right.
    """
    modalities = {name: generator.modality(name) for name in files}
    headers = {n: read_header(files[n], m, generator, decoder) for n, m in modalities.items()}
    for name, header in headers.items():
        with whole_file():
            bands = bands_of(header, modalities[name])
            found = decoder.pixels(files[name], f"part {name}", header, bands)
            numbers = raster.band_numbers(header, bands, name)
            write_copy(folder / f"{name}.tif", header, numbers, [(0, found.values, found.valid)])
    return replace(request, observed={name: folder / f"{name}.tif" for name in files})


def check_file(path: Path, modality: Modality, generator: Generator) -> None:
    """Check the header of an upload on disk; raises as `copy_file` does."""
    with path.open("rb") as file:
        check_signature(file.read(4), modality, path.stat().st_size)
    with FileDecoder(path, f"part {modality.name}") as decoder:
        _header(decoder, modality, generator)


def copy_file(
    path: Path,
    modality: Modality,
    generator: Generator,
    copy: Path,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Copy an upload of any size, strip by strip; `check` is called between and may raise.

    Raises:
        MediaTypeError: it is no GeoTIFF, or not whole.
        TooLargeError, LayerError: its header is not one of the modality.
    """
    with FileDecoder(path, f"part {modality.name}") as decoder:
        header = _header(decoder, modality, generator)
        bands, grid = bands_of(header, modality), header.grid

        def rows() -> _Rows:
            for row, height in strips(grid.height, COPY_BLOCK_PX):
                check()
                with whole_file():
                    found = decoder.pixels(header, bands, (row, 0, height, grid.width))
                yield row, found.values, found.valid

        write_copy(copy, header, raster.band_numbers(header, bands, modality.name), rows())


def _header(decoder: FileDecoder, modality: Modality, generator: Generator) -> raster.RasterHeader:
    with whole_file():
        header = decoder.header()
    check_header(header, modality, f"part {modality.name}", generator)
    return header
