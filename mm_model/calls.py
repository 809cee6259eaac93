"""What can be asked of an endpoint, and what its answers mean: no network here.

`mm_model.client` carries these calls, in its own thread or in an event loop.
"""

from __future__ import annotations

import io
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from pydantic import ValidationError

from mm_model.api import (
    DEFAULT_STEPS,
    MANIFEST,
    PNG,
    SCENE_FILE,
    SIDECAR,
    VECTOR_FILE,
    ZIP,
    Health,
    JobInfo,
    Manifest,
    ModalityInfo,
    ModalityList,
    ModelInfo,
    OneOrMore,
    Origin,
    Provenance,
    Record,
    SceneVector,
    each,
)
from mm_model.conditions import NOTHING, Conditions
from mm_model.errors import RequestError, ServiceError

_JOBS = "/v1/jobs"

T = TypeVar("T")
F = TypeVar("F", bound=Path | bytes)
R = TypeVar("R", bound=Record)
Headers = Mapping[str, str]
"""Of an answer; names in whatever case."""


class Repeat(Enum):
    """When a call may be made once more by itself."""

    ALWAYS = "it changes nothing, or is a pure function of what is sent"
    IF_REFUSED = "only if the endpoint never got it, or said that it did nothing"
    NEVER = "its first answer is what was asked for"


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and how its answer is read.

    Attributes:
        fields: of a form; those that are None are left out.
        files: of the form: part and GeoTIFF; those on disk are read while they are sent.
        read: the answer's headers and body → what the caller gets.
        save: the same for an answer that goes into a folder; None if it cannot.
        repeat: when it may be made once more.
    """

    method: str
    path: str
    read: Callable[[Headers, BinaryIO], T]
    fields: Sequence[tuple[str, object]] = ()
    files: Sequence[tuple[str, Path | bytes]] = ()
    headers: Headers = field(default_factory=dict)
    save: Callable[[Headers, BinaryIO, Path], Saved] | None = None
    repeat: Repeat = Repeat.ALWAYS
    folder: Path | None = None

    def into(self, folder: Path) -> Call[Saved]:
        """The same call, its answer written below a folder, which is made."""
        save = self.save
        assert save is not None
        return Call(
            self.method,
            self.path,
            lambda headers, body: save(headers, body, folder),
            self.fields,
            self.files,
            {"Accept": ZIP, **self.headers},  # in which classes have their names
            repeat=self.repeat,
            folder=folder,
        )

    @contextmanager
    def body(self, is_success: bool) -> Iterator[BinaryIO]:
        """Where the answer's body is gathered: in memory, or in the folder that it goes to."""
        if self.folder is None or not is_success:
            yield io.BytesIO()
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder, prefix=".answer-") as file:
            yield file

    def understood(self, headers: Headers, body: BinaryIO, url: str) -> T:
        """What an answer of success says; raises ServiceError if it is of another shape."""
        body.seek(0)
        try:
            return self.read(headers, body)
        except (ValidationError, KeyError, zipfile.BadZipFile) as error:
            raise not_this_endpoint(url, str(error)) from error


def not_this_endpoint(url: str, got: str) -> ServiceError:
    """The error where somebody else answers."""
    return ServiceError(f"{url} answers, but not as this endpoint does", got=got[:200])


@dataclass(frozen=True)
class Generated:
    """An answer.

    Attributes:
        files: file name → bytes: GeoTIFFs, or one PNG.
        provenance: which model made it, and from what.
        manifest: what each file is; None where there is but one.
    """

    files: Mapping[str, bytes]
    provenance: Provenance
    manifest: Manifest | None = None

    def save(self, folder: Path) -> list[Path]:
        """Write the files below a folder, which is made; returns their paths."""
        return _save(self.files, folder)


@dataclass(frozen=True)
class Embedded:
    """A scene as a representation.

    Attributes:
        files: scene.tif, a band a channel, and vector.json.
        vector: what vector.json holds.
    """

    files: Mapping[str, bytes]
    vector: SceneVector

    def save(self, folder: Path) -> list[Path]:
        """Write the files below a folder, which is made; returns their paths."""
        return _save(self.files, folder)


@dataclass(frozen=True)
class Saved:
    """An answer that was written while it came.

    Attributes:
        paths: the files; those of classes have a sidecar with their names for GDAL and QGIS.
        origin: which model made them, and from what.
        manifest: what each file is; None where there is none.
    """

    paths: tuple[Path, ...]
    origin: Origin
    manifest: Manifest | None = None


def generate(
    observed: Mapping[str, OneOrMore[Path | bytes]],
    targets: Sequence[str] = (),
    *,
    samples: int = 1,
    seed: int = 0,
    steps: int = DEFAULT_STEPS,
    height: int | None = None,
    width: int | None = None,
    crs: str | None = None,
    transform: Sequence[float] | None = None,
    uncertainty: bool = False,
    conditions: Conditions = NOTHING,
    picture: bool = False,
) -> Call[Generated]:
    """Generate targets (all that are not observed, if none is named).

    Args:
        observed: modality → GeoTIFF, or several of other dates or neighbouring places, of which
            each pixel is taken from the first that knows it; a file is sent as it is read.
        targets: modalities to generate.
        samples: number of draws.
        seed: from which every draw follows.
        steps: sampling steps; 1 gives the best single estimate, E[target | observed].
        height: of what is generated, in pixels; needed if nothing is observed.
        width: the same.
        crs: EPSG:<code> or WKT of what is generated; beside layers, which are warped onto this
            grid, it must be named.
        transform: (a, b, c, d, e, f) of `mm_model.geo.grid.Grid`; goes with `crs`.
        uncertainty: mean and spread of two samples or more, too, or probabilities of classes and
            their entropy.
        conditions: what is known besides; what the grid tells need not be said.
        picture: a PNG rather than GeoTIFFs.

    Raises:
        RequestError: something in the request is wrong (its subclasses say what).
        NotReadyError, OverloadedError, DeadlineError: try again later, or ask for less.
        ServiceError: nobody answers.
    """
    form = _form(samples, seed, steps, uncertainty, conditions)
    grid = _grid_form(height, width, crs, transform)
    return Call(
        "POST",
        "/v1/generate",
        _generated,
        [*form, *grid, *(("target", target) for target in targets)],
        _files(observed),
        {"Accept": PNG} if picture else {},
        _save_generated,
    )


def embed(
    observed: Mapping[str, OneOrMore[Path | bytes]], *, conditions: Conditions = NOTHING
) -> Call[Embedded]:
    """The expected scene of what is observed.

    Args:
        observed: modality → GeoTIFF, or several, as of `generate`; one or more.
        conditions: what is known besides; what the grid tells need not be said.

    Raises:
        MMError: of the classes that `generate` raises.
    """
    if not observed:
        raise RequestError("observed", got=0, allowed="one GeoTIFF or more")
    fields = list(conditions.texts().items())
    accept = {"Accept": ZIP}
    files = _files(observed)
    return Call("POST", "/v1/embed", _embedded, fields, files, accept, _save_embedded)


def fill(
    layer: str,
    observed: Mapping[str, OneOrMore[Path | bytes]],
    *,
    samples: int = 1,
    seed: int = 0,
    steps: int = DEFAULT_STEPS,
    uncertainty: bool = False,
    conditions: Conditions = NOTHING,
) -> Call[Generated]:
    """Complete a layer that is observed in parts: the holes of `layer`, one of `observed`.

    With `uncertainty`, mean and spread of two samples or more, too; the other arguments and the
    errors are those of `generate`.
    """
    form = [("fill", layer), *_form(samples, seed, steps, uncertainty, conditions)]
    files = _files(observed)
    return Call("POST", "/v1/fill", _generated, form, files, {}, _save_generated)


def start_job(
    observed: Mapping[str, OneOrMore[Path]],
    targets: Sequence[str] = (),
    *,
    fill: str | None = None,
    samples: int = 1,
    seed: int = 0,
    steps: int = DEFAULT_STEPS,
    height: int | None = None,
    width: int | None = None,
    crs: str | None = None,
    transform: Sequence[float] | None = None,
    uncertainty: bool = False,
    conditions: Conditions = NOTHING,
) -> Call[JobInfo]:
    """Have files of any size generated from, or one of them filled; answers at once.

    `fill` names the layer that is filled, on its own grid; without it, the arguments are those of
    `generate`. Sent twice, it is two jobs: it is not repeated where the endpoint may have got it.
    """
    form = [("fill", fill), *_form(samples, seed, steps, uncertainty, conditions)]
    grid = _grid_form(height, width, crs, transform)
    return Call(
        "POST",
        _JOBS,
        _record(JobInfo),
        [*form, *grid, *(("target", target) for target in targets)],
        _files(observed),
        repeat=Repeat.IF_REFUSED,
    )


def _files(observed: Mapping[str, OneOrMore[F]]) -> list[tuple[str, F]]:
    return [(name, file) for name, files in each(observed).items() for file in files]


def _form(
    samples: int, seed: int, steps: int, uncertainty: bool, conditions: Conditions
) -> list[tuple[str, object]]:
    fields = {
        "samples": samples,
        "seed": seed,
        "steps": steps,
        "uncertainty": str(uncertainty).lower(),
        **conditions.texts(),
    }
    return list(fields.items())


def _grid_form(
    height: int | None, width: int | None, crs: str | None, transform: Sequence[float] | None
) -> list[tuple[str, object]]:
    coefficients = None if transform is None else ",".join(map(repr, transform))
    return [("height", height), ("width", width), ("crs", crs), ("transform", coefficients)]


def job(job_id: str) -> Call[JobInfo]:
    """How far a job is; raises RequestError if there is none, or no more."""
    return Call("GET", f"{_JOBS}/{job_id}", _record(JobInfo))


def save_result(job_id: str, folder: Path) -> Call[Path]:
    """What a job made, written into a folder, which is made, while it comes; returns the file.

    Raises:
        RequestError: there is no such job, or it is not done.
        ServiceError: nobody answers, or no more.
    """

    def keep(headers: Headers, body: BinaryIO) -> Path:
        return _write(folder, _filename(headers), body)

    return Call("GET", f"{_JOBS}/{job_id}/result", keep, folder=folder)


def delete_job(job_id: str) -> Call[None]:
    """Cancel a job, or forget what it made; raises RequestError if there is none."""
    return Call("DELETE", f"{_JOBS}/{job_id}", lambda *_: None, repeat=Repeat.IF_REFUSED)


def model() -> Call[ModelInfo]:
    """Which version serves, what was refused, and the limits."""
    return Call("GET", "/v1/model", _record(ModelInfo))


def modalities() -> Call[tuple[ModalityInfo, ...]]:
    """What the serving version knows; raises NotReadyError if there is none."""
    known = _record(ModalityList)
    return Call("GET", "/v1/modalities", lambda headers, body: known(headers, body).modalities)


def ready() -> Call[str]:
    """The version that serves; raises NotReadyError if none is loaded."""
    health = _record(Health)
    return Call(
        "GET",
        "/readyz",
        lambda headers, body: health(headers, body).model_version or "",
        repeat=Repeat.NEVER,
    )


def _record(kind: type[R]) -> Callable[[Headers, BinaryIO], R]:
    return lambda _, body: kind.model_validate_json(body.read())


def _save(files: Mapping[str, bytes], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(folder, name, io.BytesIO(content)) for name, content in files.items()]


def _write(folder: Path, name: str, content: BinaryIO) -> Path:
    """A file is there as a whole or not at all; a name from elsewhere stays in the folder."""
    path = folder / Path(name).name
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            shutil.copyfileobj(content, file, 2**20)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _generated(headers: Headers, body: BinaryIO) -> Generated:
    provenance = Provenance.from_headers(headers)
    if headers.get("content-type") != ZIP:
        return Generated({_filename(headers): body.read()}, provenance)
    with zipfile.ZipFile(body) as archive:
        manifest = Manifest.model_validate_json(archive.read(MANIFEST))
        files = {file.name: archive.read(file.name) for file in manifest.files}
    return Generated(files, provenance, manifest)


def _save_generated(headers: Headers, body: BinaryIO, folder: Path) -> Saved:
    provenance = Provenance.from_headers(headers)
    if headers.get("content-type") != ZIP:
        return Saved((_write(folder, _filename(headers), body),), provenance)
    with zipfile.ZipFile(body) as archive:
        manifest = Manifest.model_validate_json(archive.read(MANIFEST))
        names = [file.name for file in manifest.files]
        beside = [name + SIDECAR for name in names if name + SIDECAR in archive.namelist()]
        _extract(archive, beside, folder)
        paths = _extract(archive, names, folder)
    return Saved(paths, provenance, manifest)


def _embedded(_: Headers, body: BinaryIO) -> Embedded:
    with zipfile.ZipFile(body) as archive:
        files = {name: archive.read(name) for name in (SCENE_FILE, VECTOR_FILE)}
    return Embedded(files, SceneVector.model_validate_json(files[VECTOR_FILE]))


def _save_embedded(_: Headers, body: BinaryIO, folder: Path) -> Saved:
    with zipfile.ZipFile(body) as archive:
        vector = SceneVector.model_validate_json(archive.read(VECTOR_FILE))
        return Saved(_extract(archive, [SCENE_FILE, VECTOR_FILE], folder), vector)


def _extract(archive: zipfile.ZipFile, names: Sequence[str], folder: Path) -> tuple[Path, ...]:
    paths = []
    for name in names:
        with archive.open(name) as member:
            paths.append(_write(folder, name, member))  # type: ignore[arg-type]
    return tuple(paths)


def _filename(headers: Headers) -> str:
    return headers["content-disposition"].partition('filename="')[2].rstrip('"')
