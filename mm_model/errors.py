"""Everything that can go wrong in a way a caller can act on.

One base class, and one class for each decision that a caller can take. A message says what was
wrong, what was got, what is allowed and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class MMError(Exception):
    """Base of all errors that this package raises on purpose.

    Args:
        what: what is wrong, in a few words, naming the file, field or argument.
        got: the offending value, shortened by the caller if it is long.
        allowed: what would have been accepted.
        remedy: what to do now.

    Attributes:
        request_id: of the request to the endpoint that ended so, for who reads its log; else None.
    """

    code: ClassVar[str] = "error"
    request_id: str | None = None

    def __init__(
        self, what: str, *, got: object = None, allowed: object = None, remedy: str | None = None
    ) -> None:
        self.what = what
        self.got = None if got is None else str(got)
        self.allowed = None if allowed is None else str(allowed)
        self.remedy = remedy
        parts = [what]
        if self.got is not None:
            parts.append(f"got {self.got}")
        if self.allowed is not None:
            parts.append(f"allowed: {self.allowed}")
        if remedy is not None:
            parts.append(remedy)
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (Ray, multiprocessing): rebuild from the parts, not the text.
        parts = (self.what, self.got, self.allowed, self.remedy, self.request_id)
        return (_rebuild, (type(self), *parts))


def _rebuild(
    cls: type[MMError],
    what: str,
    got: str | None,
    allowed: str | None,
    remedy: str | None,
    request_id: str | None,
) -> MMError:
    error = cls(what, got=got, allowed=allowed, remedy=remedy)
    error.request_id = request_id
    return error


class ConfigError(MMError):
    """A parameter, manifest or command line is wrong: edit it."""

    code = "config"


class RasterError(MMError):
    """A raster file cannot be used: mend or remove the file that is named."""

    code = "raster"


class DataError(MMError):
    """A data set breaks its contract (store, split, statistics, validation)."""

    code = "data"


class NonFiniteLossError(MMError):
    """Training met a loss that is not finite: look at the step and patches that are named."""

    code = "non_finite_loss"


class BundleError(MMError):
    """A bundle is damaged, incomplete or of another format."""

    code = "bundle"


class RegistryError(MMError):
    """The model registry refused, lacks, or cannot be asked for, a version."""

    code = "registry"


class GateError(MMError):
    """A model version did not pass its gate."""

    code = "gate"


class StageError(MMError):
    """A stage of the pipeline failed: do what its message says, then run it again."""

    code = "stage"


class ServiceError(MMError):
    """A service (MLflow, Prefect, Ray, the endpoint) does not answer: start it."""

    code = "service"


class StorageError(MMError):
    """A disk is full, or a quota is used up: make room, then try again."""

    code = "storage"


class RequestError(MMError):
    """A request to the endpoint or the generator is wrong: change the request."""

    code = "request"


class MediaTypeError(RequestError):
    """An upload is not a GeoTIFF, or no GeoTIFF that can be read whole."""

    code = "media_type"


class TooLargeError(RequestError):
    """An upload, an image side or a number of samples is over its limit."""

    code = "too_large"


class UnknownModalityError(RequestError):
    """A modality is named that this model does not know."""

    code = "unknown_modality"


class LayerError(RequestError):
    """An observed layer has wrong bands, type or unit."""

    code = "layer"


class GeoreferenceError(RequestError):
    """Observed layers cannot be brought onto one grid."""

    code = "georeference"


class UnauthenticatedError(MMError):
    """The endpoint asks for an API key: send one that it knows."""

    code = "unauthenticated"


class ForbiddenError(MMError):
    """An API key is not for this: ask for one with the scope that is named."""

    code = "forbidden"


class NotReadyError(MMError):
    """No model is loaded yet: try again later."""

    code = "not_ready"


class OverloadedError(MMError):
    """Too much work is queued: try again after a while."""

    code = "overloaded"


class DeadlineError(MMError):
    """The answer took longer than the deadline."""

    code = "deadline"
