"""A client of the endpoint: files in, files out, and the library's own errors."""

from __future__ import annotations

import io
import os
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, NoReturn, Self

import httpx
from pydantic import ValidationError

from mm_model.api import (
    DEFAULT_STEPS,
    MANIFEST,
    PNG,
    SCENE_FILE,
    VECTOR_FILE,
    ZIP,
    Health,
    JobInfo,
    Manifest,
    ModalityInfo,
    ModalityList,
    ModelInfo,
    Problem,
    Provenance,
    SceneVector,
    error_of,
)
from mm_model.conditions import NOTHING, Conditions
from mm_model.errors import DeadlineError, MMError, NotReadyError, RequestError, ServiceError

_CONNECT_S = 10.0
_PAUSE_S = 0.5

_Part = tuple[str, tuple[str | None, bytes | IO[bytes]]]


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


class Client:
    """Speaks to one endpoint.

    Args:
        url: its root, such as http://127.0.0.1:8000.
        timeout_s: longest wait for an answer; the endpoint has a deadline of its own.
        api_key: where the endpoint asks for one; the variable MM_API_KEY by default.
        transport: for tests, an application in this process.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 150.0,
        api_key: str | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        timeout = httpx.Timeout(timeout_s, connect=_CONNECT_S)
        key = api_key or os.environ.get("MM_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(timeout=timeout, transport=transport, headers=headers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def generate(
        self,
        observed: Mapping[str, Path | bytes],
        targets: Sequence[str] = (),
        *,
        samples: int = 1,
        seed: int = 0,
        steps: int = DEFAULT_STEPS,
        height: int | None = None,
        width: int | None = None,
        crs: str | None = None,
        transform: Sequence[float] | None = None,
        conditions: Conditions = NOTHING,
        picture: bool = False,
    ) -> Generated:
        """Generate targets (all that are not observed, if none is named).

        Args:
            observed: modality → GeoTIFF.
            targets: modalities to generate.
            samples: number of draws.
            seed: from which every draw follows.
            steps: sampling steps; 1 gives the best single estimate, E[target | observed].
            height: of what is generated, in pixels, if nothing is observed.
            width: the same.
            crs: EPSG:<code> or WKT of what is generated, if nothing is observed.
            transform: (a, b, c, d, e, f) of `mm_model.geo.grid.Grid`; goes with `crs`.
            conditions: what is known besides; what the grid tells need not be said.
            picture: a PNG rather than GeoTIFFs.

        Raises:
            RequestError: something in the request is wrong (its subclasses say what).
            NotReadyError, OverloadedError, DeadlineError: try again later, or ask for less.
            ServiceError: nobody answers.
        """
        fields = {
            "samples": samples,
            "seed": seed,
            "steps": steps,
            "height": height,
            "width": width,
            "crs": crs,
            "transform": None if transform is None else ",".join(map(repr, transform)),
            **conditions.texts(),
        }
        parts = _form(observed, [*fields.items(), *(("target", target) for target in targets)])
        headers = {"Accept": PNG} if picture else {}
        response = self._call("POST", "/v1/generate", files=parts, headers=headers)
        with self._understood():
            return _generated(response)

    def embed(
        self, observed: Mapping[str, Path | bytes], *, conditions: Conditions = NOTHING
    ) -> Embedded:
        """The expected scene of what is observed.

        Args:
            observed: modality → GeoTIFF; one or more.
            conditions: what is known besides; what the grid tells need not be said.

        Raises:
            MMError: of the classes that `generate` raises.
        """
        if not observed:
            raise RequestError("observed", got=0, allowed="one GeoTIFF or more")
        parts = _form(observed, list(conditions.texts().items()))
        response = self._call("POST", "/v1/embed", files=parts, headers={"Accept": ZIP})
        with self._understood(), zipfile.ZipFile(io.BytesIO(response.content)) as archive:
            files = {name: archive.read(name) for name in (SCENE_FILE, VECTOR_FILE)}
            return Embedded(files, SceneVector.model_validate_json(files[VECTOR_FILE]))

    def fill(
        self,
        layer: str,
        observed: Mapping[str, Path | bytes],
        *,
        samples: int = 1,
        seed: int = 0,
        steps: int = DEFAULT_STEPS,
        uncertainty: bool = False,
        conditions: Conditions = NOTHING,
    ) -> Generated:
        """Complete a layer that is observed in parts: the holes of `layer`, one of `observed`.

        With `uncertainty`, mean and spread of two samples or more, too; the other arguments and
        the errors are those of `generate`.
        """
        fields = {
            "fill": layer,
            "samples": samples,
            "seed": seed,
            "steps": steps,
            "uncertainty": str(uncertainty).lower(),
            **conditions.texts(),
        }
        response = self._call("POST", "/v1/fill", files=_form(observed, list(fields.items())))
        with self._understood():
            return _generated(response)

    def start_job(
        self,
        observed: Mapping[str, Path],
        targets: Sequence[str] = (),
        *,
        fill: str | None = None,
        samples: int = 1,
        seed: int = 0,
        steps: int = DEFAULT_STEPS,
        uncertainty: bool = False,
        conditions: Conditions = NOTHING,
    ) -> JobInfo:
        """Have files of any size generated from, or one of them filled; answers at once.

        Files are sent as they are read. Sent twice, it is two jobs.
        """
        fields = {
            "fill": fill,
            "samples": samples,
            "seed": seed,
            "steps": steps,
            "uncertainty": str(uncertainty).lower(),
            **conditions.texts(),
        }
        parts = _form({}, [*fields.items(), *(("target", target) for target in targets)])
        with ExitStack() as stack:
            for name, path in observed.items():
                parts.append((name, (f"{name}.tif", stack.enter_context(path.open("rb")))))
            response = self._call("POST", "/v1/jobs", files=parts)
        with self._understood():
            return JobInfo.model_validate_json(response.content)

    def job(self, job_id: str) -> JobInfo:
        """How far a job is; raises RequestError if there is none, or no more."""
        with self._understood():
            return JobInfo.model_validate_json(self._call("GET", f"/v1/jobs/{job_id}").content)

    def save_result(self, job_id: str, folder: Path) -> Path:
        """Stream what a job made into a folder, made if need be; returns the file.

        Raises:
            RequestError: there is no such job, or it is not done.
            ServiceError: nobody answers, or no more.
        """
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with self._http.stream("GET", f"{self._url}/v1/jobs/{job_id}/result") as response:
                if not response.is_success:
                    response.read()
                    self._refused(response)
                name = (
                    response.headers["content-disposition"].partition('filename="')[2].rstrip('"')
                )
                path = folder / Path(name).name
                partial = path.with_name(f".{path.name}.partial")
                with partial.open("wb") as file:
                    for chunk in response.iter_bytes():
                        file.write(chunk)
        except httpx.HTTPError as error:
            raise ServiceError(f"nobody answers at {self._url}", got=error) from error
        return partial.rename(path)

    def delete_job(self, job_id: str) -> None:
        """Cancel a job, or forget what it made; raises RequestError if there is none."""
        self._call("DELETE", f"/v1/jobs/{job_id}")

    def model(self) -> ModelInfo:
        """Which version serves, what was refused, and the limits."""
        with self._understood():
            return ModelInfo.model_validate_json(self._call("GET", "/v1/model").content)

    def modalities(self) -> tuple[ModalityInfo, ...]:
        """What the serving version knows; raises NotReadyError if there is none."""
        with self._understood():
            answer = self._call("GET", "/v1/modalities")
            return ModalityList.model_validate_json(answer.content).modalities

    def ready(self) -> str:
        """The version that serves; raises NotReadyError if none is loaded."""
        with self._understood():
            health = Health.model_validate_json(self._call("GET", "/readyz").content)
            return health.model_version or ""

    def wait_ready(self, timeout_s: float, version: int | str | None = None) -> str:
        """Wait until a version (or the named one) serves; returns it.

        Raises:
            NotReadyError: it does not serve in time; the message says what was refused.
            ServiceError: nobody answers in time.
        """
        give_up = time.monotonic() + timeout_s
        while True:
            error: MMError
            try:
                serves = self.ready()
                if version is None or serves == str(version):
                    return serves
                refused = [r.reason for r in self.model().refused if r.version == str(version)]
                error = NotReadyError(
                    f"version {version} does not serve",
                    got=f"version {serves}",
                    remedy=f"it was refused: {refused[0]}" if refused else "look at its log",
                )
            except (NotReadyError, ServiceError) as not_yet:
                error = not_yet
            if time.monotonic() >= give_up:
                raise error
            time.sleep(_PAUSE_S)

    def _call(
        self,
        method: str,
        path: str,
        *,
        files: list[_Part] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """The response if it is one of success; else the error that it tells of."""
        try:
            response = self._http.request(method, self._url + path, files=files, headers=headers)
        except httpx.ReadTimeout as error:
            raise DeadlineError(f"{self._url} took too long", got=error) from error
        except httpx.HTTPError as error:
            raise ServiceError(
                f"nobody answers at {self._url}", got=error, remedy="start it with `mm up`"
            ) from error
        if response.is_success:
            return response
        self._refused(response)

    def _refused(self, response: httpx.Response) -> NoReturn:
        """Raise the error that a response tells of."""
        try:
            problem = Problem.model_validate_json(response.content)
        except ValidationError:
            raise ServiceError(
                f"{self._url} answers, but not as this endpoint does",
                got=f"{response.status_code} {response.text[:200]}",
            ) from None
        raise error_of(problem)

    @contextmanager
    def _understood(self) -> Iterator[None]:
        """Turns an answer of another shape into a ServiceError."""
        try:
            yield
        except (ValidationError, KeyError, zipfile.BadZipFile) as error:
            raise ServiceError(
                f"{self._url} answers, but not as this endpoint does", got=str(error)[:200]
            ) from error


def _form(files: Mapping[str, Path | bytes], fields: Sequence[tuple[str, object]]) -> list[_Part]:
    """The parts of a form; fields that are None are left out."""
    # Fields without a file name, so that a form without any file is multipart too.
    parts: list[_Part] = [
        (name, (None, str(value).encode())) for name, value in fields if value is not None
    ]
    for name, file in files.items():
        content = file if isinstance(file, bytes) else file.read_bytes()
        parts.append((name, (f"{name}.tif", content)))
    return parts


def _save(files: Mapping[str, bytes], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in files.items():
        path = folder / Path(name).name  # a name from elsewhere stays in the folder
        path.write_bytes(content)
        paths.append(path)
    return paths


def _generated(response: httpx.Response) -> Generated:
    provenance = Provenance.from_headers(response.headers)
    if response.headers.get("content-type") != ZIP:
        name = response.headers["content-disposition"].partition('filename="')[2].rstrip('"')
        return Generated({name: response.content}, provenance)
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        manifest = Manifest.model_validate_json(archive.read(MANIFEST))
        files = {file.name: archive.read(file.name) for file in manifest.files}
    return Generated(files, provenance, manifest)
