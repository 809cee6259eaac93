"""What the endpoint and its clients say to each other: records, headers and the errors' statuses.

Light on purpose: no torch, no rasterio, no web framework.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal, Self, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from mm_model import errors
from mm_model.conditions import NOTHING, Conditions, parse_conditions
from mm_model.errors import MMError
from mm_model.modalities import MODALITIES, Modality

MIN_SIDE_PX = 16
"""Least height and width of what is generated."""
MAX_STEPS = 64
"""Most sampling steps of a request."""
DEFAULT_STEPS = 4

TIFF = "image/tiff"
PNG = "image/png"
ZIP = "application/zip"
JSON = "application/json"
PROBLEM = "application/problem+json"
REQUEST_ID = "X-Request-ID"
"""Header that names a request, from its caller through proxy, replica and logs to the answer."""
MANIFEST = "manifest.json"
"""Name of the manifest inside a zip answer."""
SCENE_FILE, VECTOR_FILE = "scene.tif", "vector.json"
"""Names of what an embedding is written to."""
SIDECAR = ".aux.xml"
"""Appended to a GeoTIFF's name: what GDAL and QGIS read beside it."""

_PROBLEM_URN = "urn:mm-model:problem:"

F = TypeVar("F")
OneOrMore: TypeAlias = F | Sequence[F]
"""What is given of a modality: a file, or several of other dates or neighbouring places.

They are laid over each other in this order: each pixel, all bands together, is that of the first
one that knows it.
"""


def each(observed: Mapping[str, OneOrMore[F]]) -> dict[str, tuple[F, ...]]:
    """All that is given of each modality; raises RequestError for a sequence of nothing."""
    found: dict[str, tuple[F, ...]] = {}
    for name, given in observed.items():
        several = isinstance(given, Sequence) and not isinstance(given, bytes | str)
        found[name] = tuple(given) if several else (given,)  # type: ignore[arg-type,assignment]
        if not found[name]:
            raise errors.RequestError(
                f"files of {name}", got=0, allowed="one or more", remedy="leave the modality out"
            )
    return found


# One status for each decision of a caller: the only table of its kind.
STATUS: Mapping[type[MMError], int] = MappingProxyType(
    {
        errors.MMError: 500,
        errors.ConfigError: 500,
        errors.RasterError: 500,
        errors.DataError: 500,
        errors.NonFiniteLossError: 500,
        errors.BundleError: 500,
        errors.GateError: 500,
        errors.StageError: 500,
        errors.RegistryError: 503,
        errors.ServiceError: 503,
        errors.StorageError: 507,
        errors.UnauthenticatedError: 401,
        errors.ForbiddenError: 403,
        errors.RequestError: 422,
        errors.MediaTypeError: 415,
        errors.TooLargeError: 413,
        errors.UnknownModalityError: 422,
        errors.LayerError: 422,
        errors.GeoreferenceError: 422,
        errors.NotReadyError: 503,
        errors.OverloadedError: 429,
        errors.DeadlineError: 504,
    }
)
RETRY_AFTER_S: Mapping[int, int] = MappingProxyType({429: 1, 503: 5})
"""Seconds that a caller should wait before another try, by status."""


class Record(BaseModel):
    """A JSON object on the wire: immutable, no key unknown."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Problem(Record):
    """An RFC 9457 problem: what was wrong, what was got, what is allowed, what to do."""

    type: str = Field(description="URN of the kind of problem")
    title: str = Field(description="the kind of problem, in a few words")
    status: Annotated[int, Field(ge=400, le=599)]
    detail: str = Field(description="what was wrong in this request")
    code: str = Field(description="short name of the kind; the client's error class")
    got: str | None = None
    allowed: str | None = None
    remedy: str | None = None
    request_id: str | None = Field(None, description="of the request that it happened to")


def problem_of(error: MMError, request_id: str | None = None) -> Problem:
    """The problem that tells a client of an error."""
    title = (type(error).__doc__ or type(error).__name__).splitlines()[0].rstrip(".")
    return Problem(
        type=_PROBLEM_URN + error.code,
        title=title,
        status=STATUS[type(error)],
        detail=error.what,
        code=error.code,
        got=error.got,
        allowed=error.allowed,
        remedy=error.remedy,
        request_id=request_id,
    )


def http_problem(status: int, detail: str, request_id: str | None = None) -> Problem:
    """A problem that HTTP itself names (404, 405, 500 …), not this interface."""
    code = errors.RequestError.code if status < 500 else errors.MMError.code
    remedy = None if status < 500 else "tell who runs the endpoint the request's id"
    return Problem(
        type="about:blank",
        title="HTTP error",
        status=status,
        detail=detail,
        code=code,
        remedy=remedy,
        request_id=request_id,
    )


def error_of(problem: Problem) -> MMError:
    """The error that a problem tells of: the same class with the same parts."""
    kinds = {cls.code: cls for cls in error_classes()}
    kind = kinds.get(problem.code, MMError)
    error = kind(problem.detail, got=problem.got, allowed=problem.allowed, remedy=problem.remedy)
    error.request_id = problem.request_id
    return error


def error_classes(base: type[MMError] = MMError) -> Iterator[type[MMError]]:
    """`MMError` and all its descendants that mm_model declares."""
    yield base
    for kind in base.__subclasses__():
        yield from error_classes(kind)


class Origin(Record):
    """Which model made an answer, and from what; in the answer's headers, tags and records."""

    model: str = Field(description="registered model's name")
    model_version: str
    run_id: str = Field(description="MLflow run that trained it; empty if there is none")
    observed: tuple[str, ...] = Field(description="modalities that were given")
    estimated_bands: tuple[str, ...] = Field(
        default=(),
        description="bands of them that a file lacked, as `sar:VH`: estimated from its others",
    )
    conditions: Conditions = Field(
        default=NOTHING, description="what was known besides; what the grid tells is in it"
    )

    HEADERS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "model": "X-Model-Name",
            "model_version": "X-Model-Version",
            "run_id": "X-Run-Id",
            "observed": "X-Observed",
            "estimated_bands": "X-Estimated-Bands",
            "conditions": "X-Conditions",
        }
    )

    def headers(self) -> dict[str, str]:
        """The HTTP headers that carry this."""
        return {header: _text(getattr(self, name)) for name, header in self.HEADERS.items()}

    @classmethod
    def from_headers(cls, headers: Mapping[str, str]) -> Self:
        """Read back what `headers` wrote; raises pydantic.ValidationError if it is not whole."""
        found: dict[str, object] = {n: headers.get(header) for n, header in cls.HEADERS.items()}
        for name in {"observed", "estimated_bands", "targets"} & found.keys():
            found[name] = tuple(_items(found[name]))
        known = (item.partition("=")[::2] for item in _items(found["conditions"]))
        return cls.model_validate({**found, "conditions": parse_conditions(dict(known))})

    @classmethod
    def from_tags(cls, tags: Mapping[str, str]) -> Self:
        """Read back what `tags` wrote."""
        return cls.from_headers(
            {h: tags.get(f"MM_{name.upper()}", "") for name, h in cls.HEADERS.items()}
        )

    def tags(self) -> dict[str, str]:
        """The tags that a GeoTIFF carries; GDAL would drop those that are empty."""
        said = {f"MM_{name.upper()}": _text(getattr(self, name)) for name in self.HEADERS}
        return {name: text for name, text in said.items() if text}


class Provenance(Origin):
    """Origin of what was generated."""

    targets: tuple[str, ...] = Field(description="modalities that were generated")
    samples: int
    seed: int
    steps: int

    HEADERS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            **Origin.HEADERS,
            "targets": "X-Targets",
            "samples": "X-Samples",
            "seed": "X-Seed",
            "steps": "X-Steps",
        }
    )


class SceneOrigin(Origin):
    """Origin of an embedding; embeddings of one bundle can be compared, and no others."""

    bundle_id: str

    HEADERS: ClassVar[Mapping[str, str]] = MappingProxyType(
        {**Origin.HEADERS, "bundle_id": "X-Bundle-Id"}
    )


class SceneVector(SceneOrigin):
    """vector.json: a scene as one vector."""

    vector: tuple[float, ...] = Field(
        description="mean, then standard deviation, of each channel of the scene over its cells "
        "where anything is observed"
    )


def _text(value: object) -> str:
    if isinstance(value, Conditions):
        return ",".join(f"{name}={text}" for name, text in value.texts().items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _items(text: object) -> Iterator[str]:
    return filter(None, str(text or "").split(","))


class JobState(StrEnum):
    """How a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class JobInfo(Record):
    """A job, as its owner sees it."""

    id: str
    state: JobState
    progress: Annotated[float, Field(ge=0, le=1, description="share of the windows computed")]
    time_left_s: float | None = Field(description="by the pace so far; null where none is known")
    attempt: int = Field(description="which one this is; another where a process ended")
    created_at: datetime
    expires_at: datetime | None = Field(description="when it is forgotten; null until it has ended")
    problem: Problem | None = Field(description="why it failed")


class ProgressInfo(Record):
    """How far a request is that is being answered."""

    share: Annotated[float, Field(ge=0, le=1, description="of the sampling steps; 0 as it waits")]


class ManifestFile(Record):
    """One GeoTIFF of a zip answer."""

    name: str
    modality: str
    sample: Annotated[int, Field(ge=0)] | None = Field(
        description="null where a file tells of all samples"
    )


class Manifest(Record):
    """manifest.json of a zip answer."""

    provenance: Provenance
    crs: str
    transform: tuple[float, float, float, float, float, float]
    height: int
    width: int
    files: tuple[ManifestFile, ...]


class AlignedManifest(Record):
    """manifest.json of aligned layers; each lies beside it as `<modality>.tif`."""

    origin: Origin
    crs: str
    transform: tuple[float, float, float, float, float, float]
    height: int
    width: int
    corners_lonlat: tuple[tuple[float, float], ...] | None = Field(
        description="degrees, WGS 84: top left, top right, bottom right, bottom left; null for a "
        "grid that lies nowhere"
    )


class BandInfo(Record):
    """A band of a modality."""

    name: str
    center_nm: float | None
    width_nm: float | None
    polarisation: str | None


class ClassInfo(Record):
    """A class of a categorical modality."""

    code: int
    name: str
    color: str


class ChannelInfo(Record):
    """One channel of a picture: a weighted sum of bands, between two limits."""

    name: str
    weights: tuple[float, ...] = Field(description="one a band")
    limits: tuple[float, float] = Field(description="values shown as the least and most")


class DisplayInfo(Record):
    """How the endpoint shows a modality: share = (sum of weights * bands - low) / (high - low),
    clipped to 0..1, then share ** (1 / gamma).
    """

    channels: tuple[ChannelInfo, ...] = Field(
        description="red, green and blue; or one, for `colors`; none for classes"
    )
    gamma: float
    colors: tuple[str, ...] = Field(description="#rrggbb by the one channel's share, lowest first")
    relative: bool = Field(
        description="whether the limits are better those of the place shown: its 1st and 99th "
        "percentile"
    )


class ModalityInfo(Record):
    """What a GeoTIFF of a modality holds, as input and as output."""

    name: str
    title: str
    quantity: str
    kind: Literal["continuous", "categorical"]
    unit: str
    dtype: str
    nodata: str = Field(description='"nan" or a number')
    valid_range: tuple[float, float]
    bands: tuple[BandInfo, ...]
    classes: tuple[ClassInfo, ...]
    display: DisplayInfo

    @classmethod
    def of(cls, modality: Modality, display: DisplayInfo) -> ModalityInfo:
        record = modality.to_dict()
        return cls(
            name=modality.name,
            title=modality.title,
            quantity=modality.quantity.value,
            kind=modality.kind.value,
            unit=modality.unit,
            dtype=modality.dtype,
            nodata=str(modality.nodata),
            valid_range=modality.valid_range,
            bands=tuple(BandInfo(**band) for band in record["bands"]),
            classes=tuple(ClassInfo(**item) for item in record["classes"]),
            display=display,
        )


class Limits(Record):
    """What a request may ask for."""

    min_side_px: int = MIN_SIDE_PX
    max_side_px: int
    max_samples: int
    max_steps: int = MAX_STEPS
    max_queued: int
    max_body_bytes: int
    deadline_s: float


class ModelIdentity(Record):
    """The version that serves."""

    name: str
    version: str
    run_id: str = ""


class Refusal(Record):
    """A version that an alias named and that was not taken up."""

    version: str
    reason: str


class ModelInfo(Record):
    """Answer of GET /v1/model."""

    serving: ModelIdentity | None = Field(description="null until a champion has been loaded")
    challenger: ModelIdentity | None = Field(
        default=None, description="the version that is tried beside it, once it is loaded"
    )
    modalities: tuple[str, ...] = Field(description="what the serving version knows")
    refused: tuple[Refusal, ...] = Field(description="versions that an alias named in vain")
    registry_error: str | None = Field(description="why the registry cannot be asked, if so")
    limits: Limits


class ModalityList(Record):
    """Answer of GET /v1/modalities."""

    modalities: tuple[ModalityInfo, ...]
    amount_colors: tuple[str, ...] = Field(
        description="#rrggbb of amounts such as a spread, zero first"
    )


class Health(Record):
    """Answer of GET /healthz and /readyz."""

    status: Literal["ok"] = "ok"
    model_version: str | None = None


def max_body_bytes(max_side_px: int) -> int:
    """Bytes of the largest lawful upload: every declared band at full size, as float64."""
    bands = sum(len(modality.bands) for modality in MODALITIES.values())
    return bands * max_side_px**2 * 8 + 2**20
