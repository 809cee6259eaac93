"""What the OpenAPI document says of the operations: texts, forms, answers and problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm_model.api import (
    DEFAULT_STEPS,
    JSON,
    MAX_STEPS,
    MIN_SIDE_PX,
    PNG,
    PROBLEM,
    TIFF,
    ZIP,
    Problem,
    SceneVector,
)
from mm_model.conditions import RANGES
from mm_model.config import ServeConfig
from mm_model.modalities import MODALITIES
from mm_model.serving.generator import MAX_SEED
from mm_model.serving.uploads import CONDITION_FIELDS, FIELDS, FILL_FIELDS

DESCRIPTION = """
Any Earth-observation modality from any others: send what was observed as GeoTIFFs, name what you \
want, get GeoTIFFs on the same grid.

    curl -F sar=@s1.tif -F target=map -F seed=7 -o map.tif URL/v1/generate

Errors are RFC 9457 problems that say what was got, what is allowed and what to do.
""".strip()
_LAYERS = """
Each part that is named as a modality holds a GeoTIFF of it, in its own grid, reference system and \
resolution, and may be repeated for other dates or neighbouring tiles, of which each pixel is \
taken from the first that knows it; bands that a file with named bands lacks are estimated; """
_GENERATE = (
    _LAYERS
    + """the answer lies on the grid of the finest one. Where nothing is observed, `width` and \
`height` (and `crs` with `transform`) say what to generate.

One target and one sample come as a GeoTIFF, more as a zip of GeoTIFFs with a `manifest.json`; \
`Accept: image/png` gets a picture. The headers `X-Model-Name`, `X-Model-Version`, `X-Run-Id`, \
`X-Observed`, `X-Estimated-Bands`, `X-Conditions`, `X-Targets`, `X-Samples`, `X-Seed` and \
`X-Steps` say how it was made.
"""
)
_FILL = (
    _LAYERS
    + """the one that `fill` names is completed on its own grid: observed pixels stay \
untouched, its holes are generated, guided by its own pixels and by the other layers. Its last \
band, `generated`, is 1 where a pixel was generated.

One sample comes as a GeoTIFF, more as a zip with a `manifest.json`.
"""
)
_EMBED = (
    _LAYERS
    + """their expected scene has a cell for 8 x 8 pixels of the finest one's grid.

The scene comes as a GeoTIFF, a band a channel; `Accept: application/json` gets one vector of the \
whole, `Accept: application/zip` both. The headers `X-Model-Name`, `X-Model-Version`, `X-Run-Id`, \
`X-Bundle-Id`, `X-Observed`, `X-Estimated-Bands` and `X-Conditions` say how it was made.
"""
)
_ALIGN = (
    _LAYERS
    + """they come back as a zip of GeoTIFFs on the grid of the finest one, in physical units, \
with a `manifest.json` that says where it lies. Nothing is generated: it shows what `/v1/generate` \
would take from these files, and refuses what that would refuse.
"""
)


def generate_operation(config: ServeConfig) -> dict[str, Any]:
    """POST /v1/generate, as FastAPI takes it."""
    media: dict[str, Any] = {media_type: {"schema": {}} for media_type in (TIFF, ZIP, PNG)}
    return {
        "summary": "Generate modalities",
        "description": _GENERATE.strip(),
        "operation_id": "generate",
        "responses": _responses({"description": "What was generated", "content": media}),
        "openapi_extra": {"requestBody": request_body(config, FIELDS)},
    }


def fill_operation(config: ServeConfig) -> dict[str, Any]:
    """POST /v1/fill, as FastAPI takes it."""
    media: dict[str, Any] = {media_type: {"schema": {}} for media_type in (TIFF, ZIP)}
    return {
        "summary": "Fill the holes of a layer",
        "description": _FILL.strip(),
        "operation_id": "fill",
        "responses": _responses({"description": "The whole layer", "content": media}),
        "openapi_extra": {"requestBody": request_body(config, FILL_FIELDS, ("fill",))},
    }


def embed_operation(config: ServeConfig) -> dict[str, Any]:
    """POST /v1/embed, as FastAPI takes it."""
    vector = {"$ref": f"#/components/schemas/{SceneVector.__name__}"}
    media = {TIFF: {"schema": {}}, JSON: {"schema": vector}, ZIP: {"schema": {}}}
    found = {"description": "The scene", "model": SceneVector, "content": media}
    return {
        "summary": "Embed what was observed",
        "description": _EMBED.strip(),
        "operation_id": "embed",
        "responses": _responses(found),
        "openapi_extra": {"requestBody": request_body(config, CONDITION_FIELDS)},
    }


def align_operation(config: ServeConfig) -> dict[str, Any]:
    """POST /v1/align, as FastAPI takes it."""
    found = {"description": "The layers on one grid", "content": {ZIP: {"schema": {}}}}
    return {
        "summary": "See what was observed as the model sees it",
        "description": _ALIGN.strip(),
        "operation_id": "align",
        "responses": _responses(found),
        "openapi_extra": {"requestBody": request_body(config, CONDITION_FIELDS)},
    }


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The answers of these statuses."""
    meaning = {
        400: "The form is malformed",
        401: "The endpoint asks for an API key, and there is none that it knows",
        404: "There is no such job, or it is another key's",
        409: "The job is not done",
        403: "The API key has another scope; or, without keys, a browser asks for a page of "
        "another site",
        413: "An upload, an image side or the body is over its limit",
        415: "The body is no form, or a part is no whole GeoTIFF",
        422: "A field, a layer or its unit is wrong, or layers do not overlap",
        429: "Too many requests are in progress; try again after Retry-After seconds",
        503: "No model is loaded yet; try again after Retry-After seconds",
        504: "The answer took longer than the deadline, or the body came too slowly",
        507: "The disk is full",
    }
    schema = {"$ref": f"#/components/schemas/{Problem.__name__}"}
    return {
        status: {
            "description": meaning[status],
            "model": Problem,
            "content": {PROBLEM: {"schema": schema}},
        }
        for status in statuses
    }


def _responses(found: dict[str, Any]) -> dict[int | str, dict[str, Any]]:
    return {200: found, **problems(400, 401, 403, 413, 415, 422, 429, 503, 504, 507)}


def request_body(
    config: ServeConfig,
    fields: Mapping[str, str],
    required: Sequence[str] = (),
    max_side_px: int | None = None,
) -> dict[str, Any]:
    """The form: a file for each declared modality, and the fields; sides as of other requests."""
    properties: dict[str, Any] = {
        modality.name: {
            "type": "array",
            "items": {"type": "string", "contentMediaType": TIFF},
            "description": f"GeoTIFF: {modality.title}; bands {', '.join(modality.band_names)} "
            f"in {modality.unit}, {modality.valid_range[0]:g} to {modality.valid_range[1]:g}; "
            "repeat it for several, of which each pixel is taken from the first that knows it",
        }
        for modality in MODALITIES.values()
    }
    kinds = _kinds(config, max_side_px or config.max_side_px)
    for name, meaning in fields.items():
        properties[name] = {**kinds.get(name, {"type": "string"}), "description": meaning}
    schema = {"type": "object", "additionalProperties": False, "properties": properties}
    if required:
        schema["required"] = list(required)
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


def _kinds(config: ServeConfig, max_side_px: int) -> dict[str, dict[str, Any]]:
    """Schemas of the fields that are more than any text."""

    def whole(least: int, most: int, **more: int) -> dict[str, Any]:
        return {"type": "integer", "minimum": least, "maximum": most, **more}

    side = whole(MIN_SIDE_PX, max_side_px)
    numbers = {
        name: {"type": "number", "minimum": low, "maximum": high}
        for name, (low, high) in RANGES.items()
    }
    return {
        "target": {"type": "array", "items": {"type": "string", "enum": list(MODALITIES)}},
        "fill": {"type": "string", "enum": list(MODALITIES)},
        "uncertainty": {"type": "boolean", "default": False},
        "samples": whole(1, config.max_samples, default=1),
        "seed": whole(0, MAX_SEED, default=0),
        "steps": whole(1, MAX_STEPS, default=DEFAULT_STEPS),
        "width": side,
        "height": side,
        "date": {"type": "string", "format": "date"},
        **numbers,
    }
