"""A form from anybody to a request: headers are checked before pixels are decoded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mm_model.api import DEFAULT_STEPS, OneOrMore, each
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
from mm_model.serving.bands import bands_of, can_complete, missing_bands, numbers_of
from mm_model.serving.decoders import Decoder, InProcess
from mm_model.serving.generator import EmbedRequest, Generator, Request
from mm_model.serving.layers import ObservedLayer, check_offset, check_values, in_units
from mm_model.serving.overlay import labelled
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
        RequestError: a part is unknown, malformed or no GeoTIFF of its modality, or a field is
            twice there.
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
    observed = read_layers(in_memory(files), generator, decoder, grid)
    return Request(observed, targets, grid=grid, conditions=conditions, **numbers)


def read_embed_request(
    parts: Sequence[Part], generator: Generator, decoder: Decoder
) -> EmbedRequest:
    """The request to embed that a form makes; decides and raises as `read_request` does."""
    texts, files = _sort_out(parts, CONDITION_FIELDS, generator)
    conditions = parse_conditions(texts)
    generator.check_observed(tuple(files))
    return EmbedRequest(read_layers(in_memory(files), generator, decoder), conditions)


def read_layers(
    given: Mapping[str, OneOrMore[bytes]],
    generator: Generator,
    decoder: Decoder | None = None,
    declared: Grid | None = None,
) -> dict[str, tuple[ObservedLayer, ...]]:
    """Decode GeoTIFFs by modality; all headers are checked before the first pixel is decoded.

    Bands go by their names if a file names them as the modality does, beside whatever else it
    holds, else by their order. A declared scale and offset are applied. Bands that a file lacks are
    estimated: see `bands.complete_bands`.

    Args:
        given: modality name → bytes of a file, or of several.
        generator: knows the modalities, and the limits.
        decoder: reads them; here, without: files of one's own.
        declared: the grid of the answer, if the request declares one.

    Raises:
        MediaTypeError: one is no GeoTIFF, or cannot be read whole.
        TooLargeError: they declare more pixels than are allowed.
        LayerError: one has other bands or another type of pixels.
        GeoreferenceError: they do not overlap, or not the declared grid.
    """
    files: dict[str, tuple[bytes, ...]] = each(given)
    decoder = decoder or InProcess()
    headers = read_headers(files, generator, decoder)
    if headers:
        # The model's order, as the generator takes them.
        grids = {n: [h.grid for h in headers[n]] for n in generator.modalities if n in headers}
        generator.check_grids(grids, declared)
    layers = {}
    for name, contents in files.items():
        one_by_one = zip(labelled(name, contents), headers[name], strict=True)
        layers[name] = tuple(
            _decode(content, header, label, generator.modality(name), decoder, generator)
            for (label, content), header in one_by_one
        )
    return layers


def read_headers(
    files: Mapping[str, Sequence[bytes]], generator: Generator, decoder: Decoder
) -> dict[str, list[raster.RasterHeader]]:
    """Checked headers of GeoTIFFs by modality; raises what `read_layers` does."""
    headers: dict[str, list[raster.RasterHeader]] = {name: [] for name in files}
    for name, contents in files.items():
        modality = generator.modality(name)
        for label, content in labelled(name, contents):
            part = f"part {label}"
            check_signature(content[:4], part, len(content))
            with whole_file():
                header = decoder.header(content, part)
            check_header(header, modality, part, generator)
            headers[name].append(header)
    _check_pixels(headers, generator)
    return headers


def _check_pixels(
    headers: Mapping[str, Sequence[raster.RasterHeader]], generator: Generator
) -> None:
    """Raise TooLargeError if all files together hold more than one of each modality may."""
    bands = {name: len(modality.bands) for name, modality in generator.modalities.items()}
    pixels = sum(
        bands[name] * header.grid.height * header.grid.width
        for name, of_it in headers.items()
        for header in of_it
    )
    allowed = sum(bands.values()) * generator.max_side_px**2
    if pixels > allowed:
        raise TooLargeError(
            "values of all files: bands x height x width",
            got=pixels,
            allowed=f"at most {allowed}",
            remedy="send fewer or smaller files, or a job, which takes any size",
        )


def check_signature(head: bytes, part: str, size_bytes: int) -> None:
    """Raise MediaTypeError if a file does not begin as a TIFF does."""
    if not head.startswith(_SIGNATURES):
        raise MediaTypeError(
            part,
            got=f"{size_bytes} bytes that are not a TIFF" if size_bytes else "nothing",
            allowed="a GeoTIFF file",
            remedy="convert it with gdal_translate -of GTiff",
        )


def _decode(
    content: bytes,
    header: raster.RasterHeader,
    label: str,
    modality: Modality,
    decoder: Decoder,
    generator: Generator,
) -> ObservedLayer:
    missing = missing_bands(header, modality)
    with whole_file():
        numbers = numbers_of(header, modality)
        found = decoder.pixels(content, f"part {label}", header, numbers)
    values, valid = in_units(found, modality)
    if valid.any():
        there = [name for name in modality.band_names if name not in missing]
        check_offset(label, modality, header, values[:, valid], there)
        if missing:  # before what is made of them hides what is wrong with them
            check_values(label, modality, values[:, valid], there)
    return ObservedLayer(
        generator.completed(modality.name, values, missing), valid, header.grid, missing
    )


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
    named = bands_of(header, modality)
    if named is not None and not named:
        raise LayerError(
            f"{part}: bands",
            got=", ".join(name[:40] or "no name" for name in header.band_names[:8]),
            allowed=", ".join(modality.band_names),
            remedy=f"send it as what it is; if it is {modality.name}, name its bands so",
        )
    if header.bands != len(modality.bands) and named is None:
        fewer = header.bands < len(modality.bands)
        raise LayerError(
            f"{part}: bands",
            got=header.bands,
            allowed=f"{len(modality.bands)}, or named {', '.join(modality.band_names)}",
            remedy="name those that are there (the band's description): the others are estimated; "
            "or leave it out, any subset of layers will do"
            if fewer
            else "select them with gdal_translate -b",
        )
    missing = missing_bands(header, modality)
    if missing and not can_complete(modality, generator.manifest.statistics):
        raise LayerError(
            f"{part}: bands",
            got=f"none of {', '.join(missing)}",
            allowed=f"all of {', '.join(modality.band_names)}: this version's statistics do not "
            "tell one band from another",
            remedy="leave it out, any subset of layers will do; or train the model again",
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


def in_memory(files: Mapping[str, Sequence[bytes | Path]]) -> dict[str, tuple[bytes, ...]]:
    """Files of a form that was read whole."""
    return {n: tuple(c for c in of_it if isinstance(c, bytes)) for n, of_it in files.items()}


def _sort_out(
    parts: Sequence[Part], fields: Mapping[str, str], generator: Generator
) -> tuple[dict[str, str], dict[str, tuple[bytes | Path, ...]]]:
    """Texts, and files in their order, by name.

    Raises:
        RequestError: a part is unknown, or a field twice there.
    """
    seen = set()
    files: dict[str, tuple[bytes | Path, ...]] = {}
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
        if not isinstance(part.content, str):
            files[part.name] = (*files.get(part.name, ()), part.content)
            continue
        if part.name in seen and part.name != "target":
            raise RequestError(f"part {shown} is there twice", allowed="once")
        seen.add(part.name)
    return {p.name: p.content for p in parts if isinstance(p.content, str)}, files


def read_scene_request(
    parts: Sequence[Part], fields: Mapping[str, str], generator: Generator
) -> tuple[SceneRequest, dict[str, tuple[bytes | Path, ...]]]:
    """The request that a form makes of whole files, and these.

    What the request names are the files' copies, without the folder that they go to: see
    `serving.copies`.

    Raises:
        RequestError: a part is unknown or malformed, a field twice there, or they do not fit each
            other.
    """
    texts, files = _sort_out(parts, fields, generator)
    request = SceneRequest(
        {name: _copy_names(name, len(of_it)) for name, of_it in files.items()},
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


def _copy_names(name: str, files: int) -> tuple[Path, ...]:
    """A modality's name is an identifier; so no two of all these are the same."""
    return (Path(f"{name}.tif"), *(Path(f"{name}-{k}.tif") for k in range(2, files + 1)))


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
