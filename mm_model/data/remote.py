"""Small documents, and windows of cloud-optimised GeoTIFFs, over HTTP.

GDAL fetches the byte ranges and keeps them for a while: neighbours share headers and blocks. It
repeats a request by itself a few times; what it gives up on is opened again here after a while,
with a fresh signature where the old one was refused.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import httpx
import numpy as np
import rasterio
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.windows import Window

from mm_model.data.georeference import transform_xy
from mm_model.data.raster import Raster, band_numbers, header_of
from mm_model.errors import GeoreferenceError, RasterError, ServiceError
from mm_model.geo.grid import Grid

T = TypeVar("T")

# Of one window, all bands together: a place is some hundred pixels wide, this is 8192 x 8192.
_MOST_VALUES = 1 << 26
_EDGE_POINTS = 9  # by which the outline of a grid is followed into another reference system
_STATUS = re.compile(r"HTTP (?:response|error) code ?: ?(\d{3})")
_KEPT_BYTES = 1 << 27  # of fetched ranges; some blocks of each band of a few places
_MOST_BYTES = 1 << 24  # of a document
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_LEAVE_IT = "name its item under `exclude` in search.yaml"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class Patience:
    """How often and how long a server that fails is asked again.

    Attributes:
        attempts: in all.
        first_wait_s: before the second attempt; doubled each time, spread at random by half.
        timeout_s: for an answer.
    """

    attempts: int = 5
    first_wait_s: float = 1.0
    timeout_s: float = 60.0

    def wait(self, attempt: int, at_least_s: float = 0.0) -> None:
        """Sleep after a failed attempt, counted from 1; at most a minute."""
        spread = random.uniform(0.75, 1.25)  # so that many readers do not come back together
        time.sleep(min(60.0, max(at_least_s, self.first_wait_s * 2 ** (attempt - 1) * spread)))


PATIENT = Patience()


def fetch(
    url: str, patience: Patience, headers: Mapping[str, str] = MappingProxyType({})
) -> httpx.Response:
    """A small document, asked for again while the server is busy or broken.

    Raises:
        ServiceError: it does not come, though asked patiently, or is larger than 16 MiB.
    """
    cause = ""
    for attempt in range(1, patience.attempts + 1):
        asked_to_wait_s = 0.0
        try:
            response = httpx.get(
                url, headers=dict(headers), timeout=patience.timeout_s, follow_redirects=True
            )
            if response.is_success and len(response.content) <= _MOST_BYTES:
                return response
            cause = f"HTTP {response.status_code}, {len(response.content)} bytes"
            if response.status_code not in _AGAIN:
                break
            told = response.headers.get("retry-after", "")
            asked_to_wait_s = float(told) if told.isdigit() else 0.0
        except httpx.HTTPError as error:
            cause = f"{type(error).__name__} {error}"
        if attempt < patience.attempts:
            patience.wait(attempt, asked_to_wait_s)
    raise ServiceError(
        f"{url.split('?')[0]} does not answer",
        got=cause,
        remedy="run it again later: what was found and read is kept",
    )


def read_window(
    href: str,
    sign: Callable[[str, bool], str],
    target: Grid,
    *,
    bands: Sequence[int | str] | None = None,
    patience: Patience = PATIENT,
) -> Raster | None:
    """The part of a remote GeoTIFF that a grid needs, on the file's own grid.

    Args:
        href: http(s) address without signature; errors name it.
        sign: (href, whether the last signature was refused) → the address to ask.
        target: what is to be covered; two pixels more are read around it.
        bands: numbers from 1, or names; all if None.
        patience: with the server.

    Returns:
        Pixels as stored and their mask (`header.grid` is that of the window); None where the file
        does not reach the grid.

    Raises:
        RasterError: there is no such file, it is no GeoTIFF, or the window is too large.
        ServiceError: the server does not deliver, though asked patiently.
    """

    def read(dataset: Any) -> Raster | None:
        header = header_of(dataset, href)
        if not header.grid.crs:
            raise RasterError(f"{href} has no reference system", remedy=_LEAVE_IT)
        numbers = band_numbers(header, bands, href)
        window = _covering(header.grid, target)
        if window is None:
            return None
        row, col, height, width = window
        if height * width * len(numbers) > _MOST_VALUES:
            raise RasterError(
                f"{href}: window",
                got=f"{len(numbers)} bands of {height} x {width} pixels",
                allowed=f"{_MOST_VALUES} values",
                remedy="choose smaller places",
            )
        at = Window(col, row, width, height)
        values = dataset.read(numbers, window=at)
        valid = (dataset.read_masks(numbers, window=at) != 0).all(axis=0)
        if values.dtype.kind == "f":
            valid &= np.isfinite(values).all(axis=0)
        return Raster(
            values,
            valid,
            tuple(header.scales[n - 1] for n in numbers),
            tuple(header.offsets[n - 1] for n in numbers),
            replace(header, grid=header.grid.window(row, col, height, width)),
        )

    return _patiently(href, sign, read, patience)


def read_overview(
    href: str, sign: Callable[[str, bool], str], side_px: int, patience: Patience = PATIENT
) -> np.ndarray[Any, Any]:
    """The first band of a whole remote GeoTIFF at about `side_px` a side, from its overviews.

    Raises:
        RasterError, ServiceError: as `read_window`.
    """

    def read(dataset: Any) -> np.ndarray[Any, Any]:
        shrink = max(1.0, max(dataset.height, dataset.width) / side_px)
        shape = (max(1, round(dataset.height / shrink)), max(1, round(dataset.width / shrink)))
        band: np.ndarray[Any, Any] = dataset.read(1, out_shape=shape, resampling=Resampling.nearest)
        return band

    return _patiently(href, sign, read, patience)


def _patiently(
    href: str, sign: Callable[[str, bool], str], read: Callable[[Any], T], patience: Patience
) -> T:
    if not href.startswith(("http://", "https://")):
        raise RasterError(
            f"{href[:200]}: address",
            allowed="http or https",
            remedy="declare under `rewrite` of the catalogue where else the file is served",
        )
    cause, refused = "", False
    for attempt in range(1, patience.attempts + 1):
        signed = sign(href, refused)
        # GDAL keeps failures, too, by address. Behind "#" a server sees nothing of it.
        again = f"#{attempt}" if attempt > 1 else ""
        try:
            # Left to choose, GDAL would take any format, VRT among them, from a stranger.
            with (
                rasterio.Env(**_options(patience)),
                rasterio.open(f"/vsicurl/{signed}{again}", driver="GTiff") as dataset,
            ):
                return read(dataset)
        except RasterioError as error:
            cause = _cause(error)
        status = _status(cause)
        if status in {404, 410}:
            raise RasterError(
                f"{href} does not exist",
                got=f"HTTP {status}",
                remedy=_LEAVE_IT,
            )
        if status is None and _is_no_tiff(signed, patience):
            raise RasterError(
                f"{href} is no GeoTIFF",
                got=cause,
                allowed="a GeoTIFF file",
                remedy=_LEAVE_IT,
            )
        refused = status in {401, 403}
        if attempt < patience.attempts and not (refused and attempt == 1):
            patience.wait(attempt)
    raise ServiceError(
        f"{href} cannot be read",
        got=f"{cause}, {patience.attempts} times",
        remedy="run it again later: what was read is kept",
    )


def _is_no_tiff(signed: str, patience: Patience) -> bool:
    """Whether a server answers, and with something else; half a GeoTIFF looks like none to GDAL."""
    ask = {"Range": "bytes=0-3"}
    try:
        with httpx.stream(
            "GET", signed, headers=ask, timeout=patience.timeout_s, follow_redirects=True
        ) as response:
            begin = next(response.iter_bytes(4), b"") if response.is_success else b""
    except httpx.HTTPError:
        return False
    return len(begin) == 4 and begin not in _TIFF


def _options(patience: Patience) -> dict[str, Any]:
    return {
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # no side files
        "GDAL_INGESTED_BYTES_AT_OPEN": 32768,  # the header in one request
        "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
        "GDAL_HTTP_MULTIPLEX": "YES",
        "GDAL_HTTP_MAX_RETRY": 2,
        "GDAL_HTTP_RETRY_DELAY": patience.first_wait_s / 2,
        "GDAL_HTTP_TIMEOUT": max(1, round(patience.timeout_s)),
        "GDAL_HTTP_CONNECTTIMEOUT": max(1, round(min(10, patience.timeout_s))),
        "CPL_VSIL_CURL_CACHE_SIZE": _KEPT_BYTES,
    }


def _covering(source: Grid, target: Grid) -> tuple[int, int, int, int] | None:
    """Row, column, height and width of the part of `source` around `target`; None if apart."""
    steps = np.linspace(0, 1, _EDGE_POINTS)
    edge = [(r, c) for r in steps for c in steps if r in (0, 1) or c in (0, 1)]
    points = [target.xy(r * target.height, c * target.width) for r, c in edge]
    try:
        xs, ys = transform_xy(target.crs, source.crs, *zip(*points, strict=True))
    except GeoreferenceError:  # beyond what the file's system can express
        return None
    at = np.array([source.row_col(x, y) for x, y in zip(xs, ys, strict=True)])
    low = np.maximum(np.floor(at.min(axis=0)) - 2, 0).astype(int)
    high = np.minimum(np.ceil(at.max(axis=0)) + 2, source.shape).astype(int)
    if (high <= low).any():
        return None
    return int(low[0]), int(low[1]), int(high[0] - low[0]), int(high[1] - low[1])


def _cause(error: RasterioError) -> str:
    """GDAL's words without signatures, which are secrets for as long as they last."""
    parts: list[str] = []
    link: BaseException | None = error
    while link is not None:
        parts.append(" ".join(str(link).split()))
        link = link.__cause__ or link.__context__
    text = " | ".join(dict.fromkeys(parts))
    return re.sub(r"\?[^\s'\",]+", "?…", text)[:300]


def _status(cause: str) -> int | None:
    match = _STATUS.search(cause)
    return int(match.group(1)) if match else None
