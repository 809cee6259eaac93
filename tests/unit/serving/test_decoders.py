"""Decoders: what they may do, what becomes of them, and what is believed of what they say."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from serving_fixtures import GRID, ask, form, geotiff, make_source, refused, serve_config

from mm_model.data import raster
from mm_model.errors import GeoreferenceError, MediaTypeError, RasterError, ServiceError
from mm_model.geo.grid import Grid
from mm_model.serving import app as application
from mm_model.serving.app import build_app
from mm_model.serving.decoders import DecoderPool, InProcess

MEMORY = 256 * 2**20
NOWHERE = Grid("", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), 17, 29)


@pytest.fixture(scope="module")
def pool():
    pool = DecoderPool(MEMORY)
    yield pool
    pool.close()


def encode(dtype, grid=NOWHERE, bands=2):
    rng = np.random.default_rng(5)
    values = rng.integers(1, 99, (bands, *grid.shape)).astype(dtype)
    names = [f"b{k}" for k in range(bands)]
    return raster.encode_geotiff(values, grid, names, nodata=values.flat[3], tags={})


def decode(pool, content, bands=None):
    with pool.decoder() as decoder:
        return decoder.pixels(content, "it", decoder.header(content, "it"), bands)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint32", "float32", "float64"])
@pytest.mark.parametrize("bands", [None, ["b1"], ["b1", "b0"]])
def test_it_reads_what_this_process_would_read(pool, dtype, bands):
    content = encode(dtype)
    own = InProcess()
    expected = own.pixels(content, "it", own.header(content, "it"), bands)
    found = decode(pool, content, bands)
    assert found.values.dtype == expected.values.dtype
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_array_equal(found.valid, expected.valid)
    assert not found.valid.all()
    assert (found.scales, found.offsets) == (expected.scales, expected.offsets)
    assert found.header == replace(expected.header, tags={})


def test_several_files_of_a_request_are_kept_apart(pool):
    files = {name: encode("uint8", bands=n) for n, name in enumerate(("a", "b", "c"), 1)}
    with pool.decoder() as decoder:
        headers = {name: decoder.header(content, name) for name, content in files.items()}
        for name in ("c", "a", "b"):
            found = decoder.pixels(files[name], name, headers[name], None)
            np.testing.assert_array_equal(found.values, raster.read_raster(files[name]).values)


def test_a_decoder_says_what_is_wrong_and_goes_on(pool):
    decode(pool, encode("uint8"))
    pids, replaced = pool.pids, pool.replaced
    with pytest.raises(RasterError, match="it cannot be read as GeoTIFF"):
        decode(pool, b"II*\0" + bytes(60))
    with pytest.raises(RasterError, match="whole GeoTIFF"):
        decode(pool, geotiff("sar")[:2000])
    assert decode(pool, encode("uint8")).values.shape == (2, 17, 29)
    assert (pool.pids, pool.replaced) == (pids, replaced)


CONFINED = """
import os, socket
from mm_model.data import decoder
decoder._warm_up()
decoder.confine(64 * 2**20)
def tried(do):
    try:
        do()
    except (OSError, MemoryError) as error:
        return type(error).__name__
    return "done"
print(tried(lambda: open("/etc/passwd")), tried(lambda: open("/tmp/new-file", "w")),
      tried(socket.socket), tried(os.pipe), tried(lambda: bytearray(128 * 2**20)),
      tried(lambda: bytearray(2**20)))
decoder.allow_cpu(1)
while True:
    pass
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel keeps to these limits on Linux")
def test_a_decoder_opens_nothing_and_has_limits():
    done = subprocess.run(
        [sys.executable, "-c", CONFINED], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.split() == ["OSError"] * 4 + ["MemoryError", "done"], done.stderr
    assert done.returncode == -signal.SIGXCPU


def test_its_environment_holds_no_secret(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "geheim")
    pool = DecoderPool(MEMORY, workers=1)
    try:
        decode(pool, encode("uint8"))
        (pid,) = pool.pids
        with open(f"/proc/{pid}/environ", "rb") as environ:  # noqa: PTH123
            assert b"geheim" not in environ.read()
    finally:
        pool.close()


def test_a_file_that_needs_too_much_memory_is_refused_and_the_next_one_is_read():
    pool = DecoderPool(12 * 2**20, workers=1)
    large = encode("uint8", NOWHERE.resized(2000, 3000), bands=4)
    try:
        for _ in range(2):
            with pytest.raises((MediaTypeError, RasterError)):
                decode(pool, large)
            assert decode(pool, encode("uint8")).values.shape == (2, 17, 29)
    finally:
        pool.close()


def test_a_decoder_that_takes_too_long_is_killed_and_the_next_one_reads():
    pool = DecoderPool(MEMORY, workers=1, wall_s=3)
    content = encode("uint8")
    try:
        decode(pool, content)
        (pid,) = pool.pids
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(MediaTypeError, match=r"cannot be decoded.*SIGKILL.*3 s"):
            decode(pool, content)
        assert pool.pids != [pid]
        assert decode(pool, content).values.shape == (2, 17, 29)
    finally:
        pool.close()


def test_one_that_dies_between_requests_is_nobodys_fault(pool):
    decode(pool, encode("uint8"))
    for pid in pool.pids:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    for _ in range(3):
        assert decode(pool, encode("uint8")).values.shape == (2, 17, 29)


def test_who_waits_for_a_decoder_holds_up_nobody_else():
    """Ray gives a replica few threads; with one alone, here, it must stay free."""
    pool, content, held = DecoderPool(MEMORY, workers=1), geotiff("sar"), threading.Event()

    def hold():
        with pool.decoder():
            held.wait()

    def read():
        with pool.decoder() as decoder:
            return decoder.header(content, "it")

    async def go():
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        waiting = [asyncio.create_task(pool.run(work)) for work in (hold, read, read)]
        await asyncio.sleep(0)
        try:
            async with asyncio.timeout(60):
                assert await asyncio.to_thread(lambda: "alive") == "alive"
            assert not any(task.done() for task in waiting)
        finally:
            held.set()
        return await asyncio.gather(*waiting)

    try:
        _, one, other = asyncio.run(go())
    finally:
        pool.close()
    assert one.grid == other.grid == GRID


def test_many_callers_share_few_decoders(pool):
    contents = [encode("float32", NOWHERE.resized(20 + k, 31)) for k in range(12)]
    found = {}

    def call(k):
        found[k] = decode(pool, contents[k]).values

    threads = [threading.Thread(target=call, args=(k,)) for k in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, content in enumerate(contents):
        np.testing.assert_array_equal(found[k], raster.read_raster(content).values)
    assert len(pool.pids) == 2


HEADER = (
    '{"header": {"grid": {"crs": "", "transform": [1, 0, 0, 0, %s, 0], "height": 4, "width": 4},'
    ' "dtype": "uint8", "nodata": null, "band_names": ["x"], "units": [""], "scales": [1],'
    ' "offsets": [%s], "tags": {}, "block_shape": [4, 4]}}'
)
WHOLE = HEADER % ("1", "0")


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([], MediaTypeError),
        (["no json"], MediaTypeError),
        (['{"surprise": 1}'], MediaTypeError),
        (['{"ready": true}'], MediaTypeError),
        ([HEADER % ("0", "0")], GeoreferenceError),
        ([HEADER % ("NaN", "0")], GeoreferenceError),
        ([HEADER % ("1", "0, 0")], MediaTypeError),
        ([WHOLE], MediaTypeError),
        ([WHOLE, '{"shape": [1, 4, 4]}'], MediaTypeError),
        ([WHOLE, '{"shape": [1, 4, 4], "dtype": "object"}'], MediaTypeError),
        ([WHOLE, '{"shape": [1, 99999999, 99999999], "dtype": "uint8"}'], MediaTypeError),
        ([WHOLE, '{"shape": [2, 4, 4], "dtype": "uint8"}', "x" * 64], MediaTypeError),
        ([WHOLE, '{"shape": [1, 4, 4], "dtype": "uint8"}', "x" * 30], MediaTypeError),
    ],
)
def test_a_decoder_is_not_believed(tmp_path, monkeypatch, lines, error):
    """One that somebody has taken over: whatever it says, the caller gets a refusal."""
    liar = tmp_path / "liar"
    text = "\n".join(['{"ready": true}', *lines])
    (tmp_path / "said").write_text(text if lines and lines[-1].startswith("x") else text + "\n")
    liar.write_text(f"#!/bin/sh\ncat {tmp_path}/said\nexec cat >/dev/null <&0 & sleep 1\n")
    liar.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(liar))
    pool = DecoderPool(MEMORY, workers=1, wall_s=3)
    try:
        with pytest.raises(error):
            decode(pool, encode("uint8"))
    finally:
        pool.close()


def test_one_that_does_not_start_is_the_platforms_fault(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    pool = DecoderPool(MEMORY, workers=1)
    try:
        with pytest.raises(ServiceError, match="no decoder starts; got exit status 1"):
            decode(pool, encode("uint8"))
    finally:
        pool.close()


def test_the_endpoint_refuses_what_kills_a_decoder_and_answers_the_next(monkeypatch):
    pool = DecoderPool(MEMORY, workers=1, wall_s=3)
    monkeypatch.setattr(application, "shared_pool", lambda _: pool)
    app = build_app(make_source(max_side_px=96), serve_config(max_side_px=96))
    request = form({"sar": geotiff("sar")}, target="dem", steps=1)
    try:
        (first,) = ask(app, request)
        assert first.status_code == 200
        os.kill(pool.pids[0], signal.SIGSTOP)
        (killed,) = ask(app, request)
        problem = refused(killed, 415, "media_type")
        assert "a decoder that ended (SIGKILL)" in problem.got
        (after,) = ask(app, request)
        assert after.content == first.content
        assert first.headers["x-observed"] == "sar"
        assert raster.read_header(after.content).grid == GRID
    finally:
        pool.close()
