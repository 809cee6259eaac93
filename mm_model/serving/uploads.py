"""A form from anybody to a request: headers are checked before pixels are decoded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mm_model.api import DEFAULT_STEPS
from mm_model.conditions import parse_conditions
from mm_model.data import georeference, raster
from mm_model.errors import (
    LayerError,
    MediaTypeError,
    RasterError,
    RequestError,
    TooLargeError,
    UnknownModalityError,
)
from mm_model.geo.grid import Grid
from mm_model.modalities import Modality
from mm_model.serving.decoders import Decoder, InProcess
from mm_model.serving.generator import EmbedRequest, Generator, Request
from mm_model.serving.layers import ObservedLayer, bands_of, check_offset, in_units
from mm_model.serving.requests import SceneRequest, check_request

CONDITION_FIELDS: Mapping[str, str] = {
    "date": "of the pictures, as YYYY-MM-DD; it tells the season and, with a latitude, the sun",
    "sun_elevation_deg": "of the sun above the horizon; goes with sun_azimuth_deg",
    "sun_azimuth_deg": "of the sun, clockwise from north; goes with sun_elevation_deg",
    "latitude_deg": "north positive; where it lies by default",
    "gsd_m": "metres a pixel on the ground; the grid's by default",
}
"""The form fields that say what is known besides images, and what they mean."""

FIELDS: Mapping[str, str] = {
    "target": "modality to generate; repeat it for several; all that are not observed by default",
    "samples": "number of draws; 1 by default",
    "seed": "whole number from which every draw follows; 0 by default",
    "steps": f"sampling steps; {DEFAULT_STEPS} by default",
    "width": "columns to generate; the finest layer's grid by default",
    "height": "rows to generate; goes with width",
    "crs": "EPSG:<code> or WKT of what is generated; beside layers, which are warped onto this "
    "grid, it must be there",
    "transform": "a,b,c,d,e,f: x = a*col + b*row + c, y = d*col + e*row + f; goes with crs",
    "uncertainty": "true: mean and spread of two samples or more, too, or probabilities of classes "
    "and their entropy",
    **CONDITION_FIELDS,
}
"""The form fields of a request to generate, and what they mean."""

_FILL = {"fill": "the layer, among those that are sent, whose holes are generated"}
_FILLED = ("samples", "seed", "steps", "uncertainty", *CONDITION_FIELDS)
FILL_FIELDS: Mapping[str, str] = {**_FILL, **{name: FIELDS[name] for name in _FILLED}}
"""The form fields of a request to fill, and what they mean."""
JOB_FIELDS: Mapping[str, str] = {**FIELDS, **_FILL}
"""The form fields of a job, which generates or fills."""

# Classic TIFF and BigTIFF in both byte orders.
_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# GDAL would take other texts for names of files and addresses to read a CRS from.
_CRS = re.compile(r"(EPSG:\d{1,7}|[A-Z_]{3,20}\[.*\])", re.DOTALL)
_NOWHERE = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Part:
    """One part of a multipart form: text of a field, or a file: its bytes, or where it lies."""

    name: str
    content: str | bytes | Path


def read_request(parts: Sequence[Part], generator: Generator, decoder: Decoder) -> Request:
    """The request to generate that a form makes.

    Whatever form and headers tell is decided before a pixel is decoded.

    Raises:
        RequestError: a part is unknown, twice there, malformed or no GeoTIFF of its modality.
    """
    texts, files = _sort_out(parts, FIELDS, generator)
    numbers = {
        "samples": _integer(texts, "samples", 1),
        "seed": _integer(texts, "seed", 0),
        "steps": _integer(texts, "steps", DEFAULT_STEPS),
    }
    targets = tuple(str(p.content) for p in parts if p.name == "target")
    grid = _grid(texts)
    conditions = parse_conditions(texts)
    generator.check_form(tuple(files), targets, grid, **numbers)
    observed = _read_layers(files, generator, decoder, grid)
    return Request(observed, targets, grid=grid, conditions=conditions, **numbers)


def read_embed_request(
    parts: Sequence[Part], generator: Generator, decoder: Decoder
) -> EmbedRequest:
    """The request to embed that a form makes; decides and raises as `read_request` does."""
    texts, files = _sort_out(parts, CONDITION_FIELDS, generator)
    conditions = parse_conditions(texts)
    generator.check_observed(tuple(files))
    return EmbedRequest(_read_layers(files, generator, decoder), conditions)


def _read_layers(
    given: Mapping[str, bytes | Path],
    generator: Generator,
    decoder: Decoder,
    declared: Grid | None = None,
) -> dict[str, ObservedLayer]:
    """The files' layers; all headers are checked before the first pixel is decoded."""
    files = {n: content for n, content in given.items() if isinstance(content, bytes)}
    modalities = {name: generator.modality(name) for name in files}
    headers = {n: read_header(files[n], m, generator, decoder) for n, m in modalities.items()}
    if headers:
        # The model's order, as the generator takes them.
        grids = {n: headers[n].grid for n in generator.modalities if n in headers}
        generator.check_grids(grids, declared)
    return {n: _decode(files[n], headers[n], m, decoder) for n, m in modalities.items()}


def read_layer(content: bytes, modality: Modality, generator: Generator) -> ObservedLayer:
    """Decode one's own GeoTIFF of a modality, once its header says that it can be one.

    Bands go by their names if the file names them as the modality does, beside whatever else it
    holds, else by their order. A declared scale and offset are applied.

    Raises:
        MediaTypeError: it is no GeoTIFF, or cannot be read whole.
        TooLargeError: it declares more pixels than are allowed.
        LayerError: it has other bands or another type of pixels.
    """
    own = InProcess()
    return _decode(content, read_header(content, modality, generator, own), modality, own)


def read_header(
    content: bytes, modality: Modality, generator: Generator, decoder: Decoder
) -> raster.RasterHeader:
    """The header of a modality's GeoTIFF, checked; raises what `read_layer` does."""
    part = f"part {modality.name}"
    check_signature(content[:4], modality, len(content))
    with whole_file():
        header = decoder.header(content, part)
    check_header(header, modality, part, generator)
    return header


def check_signature(head: bytes, modality: Modality, size_bytes: int) -> None:
    """Raise MediaTypeError if a file does not begin as a TIFF does."""
    if not head.startswith(_SIGNATURES):
        raise MediaTypeError(
            f"part {modality.name}",
            got=f"{size_bytes} bytes that are not a TIFF" if size_bytes else "nothing",
            allowed="a GeoTIFF file",
            remedy="convert it with gdal_translate -of GTiff",
        )


def _decode(
    content: bytes, header: raster.RasterHeader, modality: Modality, decoder: Decoder
) -> ObservedLayer:
    bands = bands_of(header, modality)
    with whole_file():
        found = decoder.pixels(content, f"part {modality.name}", header, bands)
    values, valid = in_units(found, modality)
    if valid.any():
        check_offset(modality, header, values[:, valid])
    return ObservedLayer(values, valid, header.grid)


@contextmanager
def whole_file() -> Iterator[None]:
    """A file that cannot be read is of the wrong type to who sent it."""
    try:
        yield
    except RasterError as error:
        raise MediaTypeError(
            error.what, got=error.got, allowed=error.allowed, remedy="send the whole file again"
        ) from error


def check_header(
    header: raster.RasterHeader, modality: Modality, part: str, generator: Generator
) -> None:
    """Check what a header tells of a modality's file.

    Raises:
        TooLargeError: it declares more pixels than are allowed.
        LayerError: it has other bands or another type of pixels.
    """
    generator.check_side(part, header.grid)
    if header.bands != len(modality.bands) and bands_of(header, modality) is None:
        raise LayerError(
            f"{part}: bands",
            got=header.bands,
            allowed=f"{len(modality.bands)}, or named {', '.join(modality.band_names)}",
            remedy="select them with gdal_translate -b",
        )
    kinds = "iu" if modality.is_categorical else "iuf"
    if _kind(header.dtype) not in kinds:
        raise LayerError(
            f"{part}: pixel type",
            got=header.dtype,
            allowed="integers" if modality.is_categorical else "real integers or floats",
            remedy="convert it with gdal_translate -ot",
        )
    # A block is decoded whole, however small the image that it belongs to.
    longest = max(header.block_shape)
    if longest > max(4 * generator.max_side_px, 4096):
        raise TooLargeError(
            f"{part}: side of a block in pixels",
            got=longest,
            allowed=max(4 * generator.max_side_px, 4096),
            remedy="write it anew with blocks of 256 pixels",
        )


def _kind(dtype: str) -> str:
    """NumPy's letter for a type; GDAL knows some (complex_int16) that NumPy does not."""
    try:
        return np.dtype(dtype).kind
    except TypeError:
        return "c"


def _sort_out(
    parts: Sequence[Part], fields: Mapping[str, str], generator: Generator
) -> tuple[dict[str, str], dict[str, bytes | Path]]:
    """Texts and files by name; raises RequestError if a part is unknown or twice there."""
    seen = set()
    for part in parts:
        is_file, shown = not isinstance(part.content, str), part.name[:80]
        if part.name in fields and is_file:
            raise RequestError(f"field {shown}", got="a file", allowed="text")
        if part.name not in fields and not is_file:
            if part.name in generator.modalities:
                raise RequestError(
                    f"part {shown}",
                    got="text",
                    allowed="a GeoTIFF file",
                    remedy=f"send it as a file: curl -F {shown}=@{shown}.tif",
                )
            raise RequestError(f"unknown form field {shown!r}", allowed=", ".join(fields))
        if is_file and part.name not in generator.modalities:
            raise UnknownModalityError(
                f"part {shown!r}: unknown modality", allowed=", ".join(generator.modalities)
            )
        if part.name in seen and part.name != "target":
            raise RequestError(f"part {shown} is there twice", allowed="once")
        seen.add(part.name)
    return (
        {p.name: p.content for p in parts if isinstance(p.content, str)},
        {p.name: p.content for p in parts if not isinstance(p.content, str)},
    )


def read_scene_request(
    parts: Sequence[Part], fields: Mapping[str, str], generator: Generator
) -> tuple[SceneRequest, dict[str, bytes | Path]]:
    """The request that a form makes of whole files, and these; see `serving.copies`.

    Raises:
        RequestError: a part is unknown, twice there or malformed, or they do not fit each other.
    """
    texts, files = _sort_out(parts, fields, generator)
    request = SceneRequest(
        {name: Path(f"{name}.tif") for name in files},
        tuple(str(p.content) for p in parts if p.name == "target"),
        samples=_integer(texts, "samples", 1),
        seed=_integer(texts, "seed", 0),
        steps=_integer(texts, "steps", DEFAULT_STEPS),
        grid=_grid(texts),
        conditions=parse_conditions(texts),
        fill=texts.get("fill"),
        uncertainty=_flag(texts, "uncertainty"),
    )
    check_request(request, generator)
    return request, files


def wants_uncertainty(parts: Sequence[Part]) -> bool:
    """Whether a form asks for bands that only `write_scene` makes."""
    return _flag({p.name: p.content for p in parts if isinstance(p.content, str)}, "uncertainty")


def _flag(texts: Mapping[str, str], name: str) -> bool:
    text = texts.get(name, "false")
    if text not in ("true", "false"):
        raise RequestError(f"field {name}", got=repr(text[:40]), allowed="true or false")
    return text == "true"


def _integer(texts: Mapping[str, str], name: str, default: int) -> int:
    text = texts.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"-?\d{1,20}", text, re.ASCII):
        raise RequestError(f"field {name}", got=repr(text[:40]), allowed="a whole number")
    return int(text)


def _grid(texts: Mapping[str, str]) -> Grid | None:
    """The grid that the fields name, or None if they name none."""
    named = [n for n in ("width", "height", "crs", "transform") if n in texts]
    if not named:
        return None
    if not {"width", "height"} <= set(named) or ("crs" in texts) != ("transform" in texts):
        raise RequestError(
            "grid to generate",
            got=", ".join(named),
            allowed="width and height; crs and transform both or neither",
        )
    height, width = _integer(texts, "height", 0), _integer(texts, "width", 0)
    crs = texts.get("crs", "")
    if "crs" in texts:
        if not _CRS.fullmatch(crs):
            raise RequestError("field crs", got=repr(crs[:80]), allowed="EPSG:<code> or WKT")
        georeference.is_metric(crs)  # raises GeoreferenceError if there is no such system
    return Grid(crs, _transform(texts["transform"]) if crs else _NOWHERE, height, width)


def _transform(text: str) -> tuple[float, float, float, float, float, float]:
    try:
        a, b, c, d, e, f = (float(number) for number in text.split(","))
    except ValueError:
        a = b = c = d = e = f = math.nan
    if not all(map(math.isfinite, (a, b, c, d, e, f))):
        raise RequestError("field transform", got=repr(text[:120]), allowed="a,b,c,d,e,f: numbers")
    return a, b, c, d, e, f
