"""Requests that nobody means well with: GeoTIFFs and forms that are broken in thousands of ways.

Every request follows from one number, so that one that breaks something can be made again. Seeds
are whole files of modalities; mutations know where a TIFF keeps what (its directory, its keys, its
pixels) and how a form is built, since random bytes alone are refused at the door.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.random import Generator as Random
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from rasterio.transform import Affine
from rasterio.windows import Window

BOUNDARY = b"----mutated"
_NUMBERS = (0, 1, 2, 3, 7, 255, 256, 32767, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
_FLOATS = (0.0, -0.0, 1e-320, 1e-30, -1e-9, 1e9, 1e15, -1e18, 1e30, 1e150, 1e300, -1e308,
           np.nan, np.inf, -np.inf)  # fmt: skip
_TEXTS = (
    "", "0", "-1", "1", "2", "16", "17", "1e9", "nan", "inf", "0x10", "１２", "9" * 19, "9" * 400,
    "-" * 70_000, "\0", "../../etc/passwd", "/vsicurl/http://127.0.0.1/x.tif", "<VRTDataset/>",
    "EPSG:4326", "EPSG:32633", "EPSG:0", "EPSG:9999999", "EPSG:4978", "EPSG:3832", "EPSG:5041",
    "PROJCS[]", "GEOGCS[\"x\"]", "LOCAL_CS[\"x\",UNIT[\"m\",1]]", "GEOGCS[" * 2000 + "]" * 2000,
    "1,0,0,0,-1,0", "10,0,5e5,0,-10,5e6", "1e-300,0,0,0,1e300,0", "1e300,0,1e300,0,-1e300,1e300",
    "1e-12,0,5e5,0,-1e-12,5e6", "nan,0,0,0,1,0", "0,0,0,0,0,0", "1,1,0,1,1,0", "2024-02-30",
    "2024-07-01", "0000-00-00", "9999-12-31", "90", "-90", "360", "1e308", "map", "dem", "rgb",
    "sar", "nir", "mäp", "\r\n\r\n", "é" * 300, "\ud7ff", "%00", "' OR 1=1 --", "${jndi:x}",
)  # fmt: skip
_NAMES = ("target", "samples", "seed", "steps", "width", "height", "crs", "transform", "date",
          "sun_elevation_deg", "sun_azimuth_deg", "latitude_deg", "gsd_m", "rgb", "nir", "sar",
          "dem", "map", "other", "", "../sar", "sar\0")  # fmt: skip


@dataclass(frozen=True)
class Mutated:
    """A request, as bytes.

    Attributes:
        kind: of mutation.
        path, headers, body: what is sent, by POST.
    """

    kind: str
    path: str
    headers: Mapping[str, str]
    body: bytes


def real_seeds(folder: Path, side_px: int = 48) -> dict[str, list[bytes]]:
    """Modality → pieces of real rasters, whose values are what the modality means, in many layouts.

    Raises:
        OSError: there are none in the folder.
    """
    scene = folder / "terramesh_examples" / "38D_378R_2_3"
    return {
        "sar": _layouts(scene / "s1.tif", side_px),
        "dem": _layouts(scene / "dem.tif", side_px),
    }


def mutated(seeds: Mapping[str, Sequence[bytes]], count: int, first: int = 0) -> Iterator[Mutated]:
    """Requests `first` to `first + count - 1`; each depends on its number and the seeds alone."""
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        yield (_mutated_file if rng.random() < 0.7 else _mutated_form)(seeds, rng)


# ---------------------------------------------------------------------------------------- GeoTIFFs


def _mutated_file(seeds: Mapping[str, Sequence[bytes]], rng: Random) -> Mutated:
    name = _choice(rng, sorted(seeds))
    content = _choice(rng, seeds[name])
    kinds = [_FILE_KINDS[int(rng.integers(len(_FILE_KINDS)))] for _ in range(rng.integers(1, 3))]
    # Those that decode come first: what is broken on purpose is not read in this process.
    kinds.sort(key=lambda kind: _DECODING.index(kind) if kind in _DECODING else len(_DECODING))
    for kind in kinds:
        content = kind(content, rng, _choice(rng, seeds[_choice(rng, sorted(seeds))]))
    files = {name: content}
    if rng.random() < 0.2:  # beside a whole one
        other = _choice(rng, sorted(seeds))
        files = {other: _choice(rng, seeds[other]), **files}
    path = _choice(rng, ["/v1/generate", "/v1/embed"])
    fields = [] if path.endswith("embed") else [("steps", "1"), ("target", "map")]
    return _request("+".join(k.__name__.strip("_") for k in kinds), path, form(files, fields))


def _flip(content: bytes, rng: Random, _: bytes) -> bytes:
    changed = bytearray(content)
    for at in rng.integers(0, max(1, len(changed)), int(rng.integers(1, 17))):
        if changed:
            changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _overwrite(content: bytes, rng: Random, _: bytes) -> bytes:
    at, length = int(rng.integers(0, len(content) + 1)), int(rng.integers(1, 64))
    return content[:at] + rng.bytes(length) + content[at + length :]


def _truncate(content: bytes, rng: Random, _: bytes) -> bytes:
    return content[: int(rng.integers(0, len(content) + 1))]


def _splice(content: bytes, rng: Random, other: bytes) -> bytes:
    at = int(rng.integers(0, len(content) + 1))
    return content[:at] + other[int(rng.integers(0, len(other))) :]


def _repeat(content: bytes, rng: Random, _: bytes) -> bytes:
    low, high = sorted(map(int, rng.integers(0, len(content) + 1, 2)))
    return content[:high] + content[low:high] * int(rng.integers(1, 4)) + content[high:]


def _entry(content: bytes, rng: Random, _: bytes) -> bytes:
    """Change entries of the directory: tag, type, count or value."""
    at = _directory(content)
    if at is None:
        return content
    changed, order, offset, entries, wide = bytearray(content), *at
    for _ in range(int(rng.integers(1, 4))):
        size = 20 if wide else 12
        start = offset + (8 if wide else 2) + size * int(rng.integers(entries))
        if start + size > len(changed):
            return bytes(changed)
        what = int(rng.integers(5))
        number = int(_choice(rng, _NUMBERS)) if rng.random() < 0.6 else int(rng.integers(2**32))
        if what == 0:
            struct.pack_into(order + "H", changed, start, number & 0xFFFF)
        elif what == 1:
            struct.pack_into(order + "H", changed, start + 2, number & 0x1F)
        elif what == 2:
            struct.pack_into(order + "I", changed, start + 4, number)
        else:
            struct.pack_into(order + "I", changed, start + (12 if wide else 8), number)
    return bytes(changed)


def _loop(content: bytes, rng: Random, _: bytes) -> bytes:
    """Have the last directory lead to itself, or anywhere."""
    at = _directory(content)
    if at is None or at[3]:
        return content
    order, offset, entries, _wide = at
    changed, end = bytearray(content), offset + 2 + 12 * entries
    if end + 4 <= len(changed):
        to = offset if rng.random() < 0.5 else int(rng.integers(len(content)))
        struct.pack_into(order + "I", changed, end, to)
    return bytes(changed)


def _directory(content: bytes) -> tuple[str, int, int, bool] | None:
    """Byte order, offset and number of entries of the first directory; whether it is BigTIFF."""
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    if order is None or len(content) < 16:
        return None
    wide = struct.unpack_from(order + "H", content, 2)[0] == 43
    (offset,) = struct.unpack_from(order + ("Q" if wide else "I"), content, 8 if wide else 4)
    if offset + 8 > len(content):
        return None
    (entries,) = struct.unpack_from(order + ("Q" if wide else "H"), content, offset)
    return (order, offset, entries, wide) if 0 < entries < 4096 else None


def _numbers(content: bytes, rng: Random, _: bytes) -> bytes:
    """Write floats that nobody expects among the pixels."""

    def change(pixels: np.ndarray, profile: dict) -> None:
        if pixels.dtype.kind == "f" and pixels.size:
            some = rng.random(pixels.shape) < _choice(rng, [0.001, 0.1, 1.0])
            with np.errstate(over="ignore"):
                pixels[some] = np.float64(_choice(rng, _FLOATS)).astype(pixels.dtype)
        profile["nodata"] = _choice(rng, [None, np.nan, 0, 1e30])

    return _written_anew(content, change)


def _place(content: bytes, rng: Random, _: bytes) -> bytes:
    """Lay the image where nothing lies, in pixels of no size."""

    def change(_: np.ndarray, profile: dict) -> None:
        finite = [v for v in _FLOATS if np.isfinite(v)]
        six = np.array(profile["transform"])[:6]
        for index in rng.integers(0, 6, int(rng.integers(1, 4))):
            six[index] = _choice(rng, finite)
        profile["transform"] = Affine(*six)
        profile["crs"] = _choice(rng, [profile["crs"], "EPSG:4326", "EPSG:5041", "EPSG:2056"])

    return _written_anew(content, change)


def _scale(content: bytes, rng: Random, _: bytes) -> bytes:
    """Declare a scale and an offset that break arithmetic."""
    return _written_anew(
        content,
        lambda *_: None,
        scale=float(_choice(rng, _FLOATS)),
        offset=float(_choice(rng, _FLOATS)),
    )


def _shape(content: bytes, rng: Random, _: bytes) -> bytes:
    """A small file that says it is huge: sides, bands or blocks, with nothing in most of it."""
    sides = (1, 15, 16, 97, 1024, 1025, 4096, 60_000, 2_000_000)
    profile = {
        "driver": "GTiff",
        "width": _choice(rng, sides),
        "height": _choice(rng, sides),
        "count": _choice(rng, (1, 2, 3, 300, 3000)),
        "dtype": _choice(rng, ("uint8", "int16", "float32", "float64", "complex64")),
        "SPARSE_OK": "TRUE",
        "BIGTIFF": "YES",
        "tiled": True,
        "blockxsize": _choice(rng, (16, 256, 4096, 65_536)),
        "blockysize": _choice(rng, (16, 256, 4096)),
        "interleave": _choice(rng, ("band", "pixel")),
    }
    blocks = profile["width"] * profile["height"] * profile["count"]
    if blocks / (profile["blockxsize"] * profile["blockysize"]) > 1e5:
        profile["count"], profile["blockxsize"], profile["blockysize"] = 1, 65_536, 4096
    return _encoded(profile) or content


def _written_anew(
    content: bytes,
    change: Callable[[np.ndarray, dict], None],
    scale: float = 1.0,
    offset: float = 0.0,
) -> bytes:
    """A file decoded, changed and encoded; one that is broken already stays as it is."""
    try:
        with MemoryFile(content) as memory, memory.open(driver="GTiff") as dataset:
            if dataset.width * dataset.height * dataset.count > 1 << 20:
                return content
            pixels, profile, names = dataset.read(), dict(dataset.profile), dataset.descriptions
        change(pixels, profile)
        return _encoded(profile, pixels, names, scale, offset) or content
    except Exception:  # GDAL refuses to write that
        return content


def _encoded(
    profile: Mapping,
    pixels: np.ndarray | None = None,
    names: Sequence[str | None] = (),
    scale: float = 1.0,
    offset: float = 0.0,
) -> bytes | None:
    """A GeoTIFF, or None where GDAL does not write such a one."""
    try:
        with warnings.catch_warnings(), MemoryFile() as memory:
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            with memory.open(**profile) as dataset:
                if pixels is not None:
                    dataset.write(pixels)
                if names:
                    dataset.descriptions = names
                if (scale, offset) != (1.0, 0.0):
                    dataset.scales = [scale] * dataset.count
                    dataset.offsets = [offset] * dataset.count
            return bytes(memory.getbuffer())
    except Exception:  # a profile that GDAL refuses
        return None


_FILE_KINDS = (
    _flip, _flip, _overwrite, _truncate, _splice, _repeat, _entry, _entry, _entry, _entry, _loop,
    _numbers, _place, _scale, _shape,
)  # fmt: skip

_DECODING = (_numbers, _place, _scale, _shape)


def _layouts(path: Path, side_px: int) -> list[bytes]:
    """A piece of a raster in the layouts that TIFF has."""
    with MemoryFile(path.read_bytes()) as memory, memory.open() as dataset:
        window = Window(30, 50, side_px, side_px - 7)
        pixels, profile = dataset.read(window=window), dict(dataset.profile)
        profile["transform"] = dataset.window_transform(window)
    pixels = pixels.astype("float32")
    plain = {
        "driver": "GTiff",
        "width": pixels.shape[2],
        "height": pixels.shape[1],
        "count": pixels.shape[0],
        "dtype": "float32",
        "crs": profile["crs"],
        "transform": profile["transform"],
    }
    tiled = {"tiled": True, "blockxsize": 16, "blockysize": 16}
    ways: list[dict] = [
        {},
        {"compress": "deflate", "predictor": 3, **tiled},
        {"compress": "lzw", "predictor": 2, "interleave": "pixel"},
        {"compress": "packbits", "interleave": "band", **tiled},
        {"compress": "zstd", "BIGTIFF": "YES"},
        {"compress": "lerc", "MAX_Z_ERROR": 0.01},
        {"ENDIANNESS": "BIG", "compress": "deflate"},
        {"ENDIANNESS": "BIG", "BIGTIFF": "YES", **tiled},
    ]
    found = [_encoded({**plain, **way}, pixels) for way in ways]
    return [content for content in found if content]


# ------------------------------------------------------------------------------------------- forms


def form(
    files: Mapping[str, bytes], fields: Sequence[tuple[str, str]], boundary: bytes = BOUNDARY
) -> bytes:
    """The body of a form, as a client that means well sends it."""
    made = [
        b'Content-Disposition: form-data; name="%b"\r\n\r\n%b'
        % (name.encode(errors="surrogatepass"), text.encode(errors="surrogatepass"))
        for name, text in fields
    ]
    made += [
        b'Content-Disposition: form-data; name="%b"; filename="%b.tif"\r\n'
        b"Content-Type: image/tiff\r\n\r\n%b" % (name.encode(), name.encode(), content)
        for name, content in files.items()
    ]
    return (
        b"".join(b"--%b\r\n%b\r\n" % (boundary, part) for part in made) + b"--%b--\r\n" % boundary
    )


def _request(kind: str, path: str, body: bytes, **headers: str) -> Mutated:
    media_type = f"multipart/form-data; boundary={BOUNDARY.decode()}"
    return Mutated(kind, path, {"content-type": media_type, **headers}, body)


def _mutated_form(seeds: Mapping[str, Sequence[bytes]], rng: Random) -> Mutated:
    path = _choice(rng, ["/v1/generate", "/v1/generate", "/v1/embed"])
    return _choice(rng, _FORM_KINDS)(seeds, rng, path)


def _texts(seeds: Mapping[str, Sequence[bytes]], rng: Random, path: str) -> Mutated:
    """Fields with texts that fit nowhere, with or without a file."""
    files = {} if rng.random() < 0.5 else _one(seeds, rng)
    names = [_choice(rng, _NAMES[:13]) for _ in range(rng.integers(1, 5))]
    fields = [(name, _choice(rng, _TEXTS)) for name in names]
    return _request("texts", path, form(files, [("steps", "1"), *fields]))


def _grids(_: Mapping[str, Sequence[bytes]], rng: Random, __: str) -> Mutated:
    """Nothing observed, on grids that lie anywhere."""
    six = np.array([10.0, 0.0, 5e5, 0.0, -10.0, 5e6])
    for index in rng.integers(0, 6, int(rng.integers(1, 4))):
        six[index] = _choice(rng, _FLOATS)
    crs = _choice(rng, [t for t in _TEXTS if "[" in t or t.startswith("EPSG")])
    fields = [
        ("width", "17"),
        ("height", "21"),
        ("steps", "1"),
        ("target", _choice(rng, ["map", "dem"])),
        ("crs", crs if rng.random() < 0.5 else "EPSG:32633"),
        ("transform", ",".join(repr(float(v)) for v in six)),
    ]
    return _request("grids", "/v1/generate", form({}, fields))


def _parts(seeds: Mapping[str, Sequence[bytes]], rng: Random, path: str) -> Mutated:
    """Many parts, or parts of wrong names and kinds."""
    count = int(_choice(rng, (1, 2, 63, 64, 65, 500, 5000)))
    fields = [(_choice(rng, _NAMES), _choice(rng, _TEXTS[:8])) for _ in range(count)]
    files = {
        _choice(rng, _NAMES): b"" if rng.random() < 0.5 else next(iter(_one(seeds, rng).values()))
    }
    return _request("parts", path, form(files, fields))


def _body(seeds: Mapping[str, Sequence[bytes]], rng: Random, path: str) -> Mutated:
    """Bytes of the form itself changed: boundaries, headers, lengths, the end."""
    body = form(_one(seeds, rng), [("steps", "1")])
    change = _choice(rng, (_flip_head, _truncate, _repeat, _overwrite_head))
    return _request("body", path, change(body, rng, body))


def _flip_head(content: bytes, rng: Random, other: bytes) -> bytes:
    return _flip(content[:220], rng, other) + content[220:]


def _overwrite_head(content: bytes, rng: Random, other: bytes) -> bytes:
    return _overwrite(content[:220], rng, other) + content[220:]


def _heads(seeds: Mapping[str, Sequence[bytes]], rng: Random, path: str) -> Mutated:
    """Headers of the request, and of parts, that are wrong or long."""
    date = _choice(rng, ("2024-01-15", "+2AA-", "a-\xff", "\\ud800"))
    body = form(_one(seeds, rng), [("steps", "1"), ("date", date)])
    long = b"X-A: " + b"a" * int(_choice(rng, (10, 8000, 100_000))) + b"\r\n"
    many = b"".join(b"X-%d: a\r\n" % k for k in range(int(_choice(rng, (1, 100, 5000)))))
    slips = b'filename="../../../../tmp/slipped.tif"'
    body = _choice(
        rng,
        [
            body.replace(b"Content-Type: image/tiff\r\n", long),
            body.replace(b"Content-Type: image/tiff\r\n", many),
            body.replace(b"Content-Type: image/tiff", b"Content-Transfer-Encoding: base64"),
            body.replace(b"; name=", b"; name*=utf-7''+"),
            body.replace(b'filename="sar.tif"', slips).replace(b'filename="dem.tif"', slips),
            body.replace(b"\r\n", b"\n"),
            b"",
        ],
    )
    headers = {
        "content-type": _choice(
            rng,
            [
                f"multipart/form-data; boundary={BOUNDARY.decode()}",
                "multipart/form-data",
                "multipart/form-data; boundary=",
                "multipart/form-data; boundary=" + "b" * 5000,
                *(
                    f"multipart/form-data; charset={charset}; boundary={BOUNDARY.decode()}"
                    for charset in ("utf-7", "undefined", "punycode", "raw_unicode_escape")
                ),
                "multipart/mixed; boundary=" + BOUNDARY.decode(),
                "application/x-www-form-urlencoded",
            ],
        ),
        "accept": _choice(
            rng, ["*/*", "image/png", "text/html", ";;;q=x", "a" * 9000, "image/*;q=9"]
        ),
        "content-length": _choice(rng, [str(len(body)), "0", "-1", "9" * 30, "１", "abc"]),
    }
    return Mutated("heads", path, headers, body)


_FORM_KINDS = (_texts, _texts, _grids, _grids, _parts, _body, _body, _heads)


def _one(seeds: Mapping[str, Sequence[bytes]], rng: Random) -> dict[str, bytes]:
    name = _choice(rng, sorted(seeds))
    return {name: _choice(rng, seeds[name])}


def _choice(rng: Random, of: Sequence):
    return of[int(rng.integers(len(of)))]
