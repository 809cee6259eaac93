"""Uploads to files that can be trusted: decoded by a confined process, written anew as they were.

Whoever reads such a copy reads the same pixels, mask, scale and offset that the upload holds, but
nothing else of what its sender wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mm_model.api import each
from mm_model.data import raster
from mm_model.data.strips import COPY_BLOCK_PX, strips, write_copy
from mm_model.modalities import Modality
from mm_model.serving.bands import numbers_of
from mm_model.serving.decoders import Decoder, FileDecoder
from mm_model.serving.generator import Generator
from mm_model.serving.overlay import labelled
from mm_model.serving.requests import SceneRequest
from mm_model.serving.uploads import check_header, check_signature, read_headers, whole_file

_Rows = Iterator[tuple[int, NDArray[np.generic], NDArray[np.bool_]]]


def copy_uploads(
    request: SceneRequest,
    files: Mapping[str, Sequence[bytes]],
    generator: Generator,
    decoder: Decoder,
    folder: Path,
) -> SceneRequest:
    """The request with copies of uploads that are in memory, in a folder.

    Raises:
        RequestError: a file is not what it should be; no copy is made before all headers are right.
    """
    headers = read_headers(files, generator, decoder)
    request = copied_to(folder, request)
    for name, paths in each(request.observed).items():
        of_it = zip(labelled(name, files[name]), headers[name], paths, strict=True)
        for (label, content), header, path in of_it:
            with whole_file():
                numbers = numbers_of(header, generator.modality(name))
                found = decoder.pixels(content, f"part {label}", header, numbers)
                write_copy(path, header, numbers, [(0, found.values, found.valid)])
    return request


def copied_to(folder: Path, request: SceneRequest) -> SceneRequest:
    """The request with its copies in a folder."""
    named = each(request.observed).items()
    observed = {name: tuple(folder / path for path in paths) for name, paths in named}
    return replace(request, observed=observed)


def check_file(
    path: Path, label: str, modality: Modality, generator: Generator
) -> raster.RasterHeader:
    """The header of an upload on disk; raises as `copy_file` does."""
    part = f"part {label}"
    with path.open("rb") as file:
        check_signature(file.read(4), part, path.stat().st_size)
    with FileDecoder(path, part) as decoder:
        return _header(decoder, part, modality, generator)


def copy_file(
    path: Path,
    label: str,
    modality: Modality,
    generator: Generator,
    copy: Path,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Copy an upload of any size, strip by strip; `check` is called between and may raise.

    `label` is what errors call it.

    Raises:
        MediaTypeError: it is no GeoTIFF, or not whole.
        TooLargeError, LayerError: its header is not one of the modality.
    """
    part = f"part {label}"
    with FileDecoder(path, part) as decoder:
        header = _header(decoder, part, modality, generator)
        numbers, grid = numbers_of(header, modality), header.grid

        def rows() -> _Rows:
            for row, height in strips(grid.height, COPY_BLOCK_PX):
                check()
                with whole_file():
                    found = decoder.pixels(header, numbers, (row, 0, height, grid.width))
                yield row, found.values, found.valid

        write_copy(copy, header, numbers, rows())


def _header(
    decoder: FileDecoder, part: str, modality: Modality, generator: Generator
) -> raster.RasterHeader:
    with whole_file():
        header = decoder.header()
    check_header(header, modality, part, generator)
    return header
