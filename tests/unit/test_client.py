"""Both clients against real servers: what they repeat, what they do not, and how much they hold."""

from __future__ import annotations

import asyncio
import http.server
import inspect
import io
import socket
import threading
import tracemalloc
from contextlib import contextmanager

import pytest

from mm_model import calls, client
from mm_model.api import PROBLEM, Health, ModelInfo, Provenance, http_problem, problem_of
from mm_model.calls import Call, Repeat
from mm_model.client import AsyncClient, Client
from mm_model.errors import (
    DeadlineError,
    MMError,
    NotReadyError,
    OverloadedError,
    RequestError,
    ServiceError,
)

LARGE = 40 * 2**20
ORIGIN = Provenance(
    model="m", model_version="3", run_id="r", observed=("sar",), targets=("dem",), samples=1,
    seed=0, steps=1,
)  # fmt: skip


class Script:
    """A server that answers as it is told, one after another, and remembers what it got.

    An answer is (status, headers, body); "drop" closes the connection without any; "half" does so
    in the middle of the body. The last one is repeated.
    """

    def __init__(self, *answers):
        self.answers, self.got = list(answers), []

    @contextmanager
    def serving(self):
        script = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                length = int(self.headers.get("Content-Length", 0))
                size = 0
                while size < length:
                    size += len(self.rfile.read(min(2**16, length - size)))
                script.got.append((self.path, dict(self.headers), size))
                left = script.answers
                told = left.pop(0) if len(left) > 1 else left[0]
                if told == "drop":
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                if told == "half":
                    self.send_response(200)
                    self.send_header("Content-Length", "100")
                    self.end_headers()
                    self.wfile.write(b"x" * 10)
                    self.close_connection = True
                    return
                status, headers, body = told
                size = body if isinstance(body, int) else len(body)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(size)}.items():
                    self.send_header(name, value)
                self.end_headers()
                if isinstance(body, int):
                    for _ in range(body // 2**20):
                        self.wfile.write(bytes(2**20))
                else:
                    self.wfile.write(body)

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, *_):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}"
            server.shutdown()


def problem(error, **headers):
    told = problem_of(error, "the-id")
    return told.status, {"Content-Type": PROBLEM, **headers}, told.model_dump_json().encode()


def tiff(body=b"II*\0 and so on"):
    name = {"Content-Disposition": 'attachment; filename="dem.tif"', "Content-Type": "image/tiff"}
    return 200, {**ORIGIN.headers(), **name}, body


BUSY = problem(OverloadedError("busy"), **{"Retry-After": "1"})
READY = (200, {}, Health(model_version="3").model_dump_json().encode())
LOST = (500, {"Content-Type": "text/plain"}, b"Internal Server Error")  # Ray's proxy says so


class Waits:
    """Counts what a client would wait, instead of waiting."""

    def __init__(self, monkeypatch):
        self.seconds = []

        async def sleep(seconds):
            self.seconds.append(seconds)

        monkeypatch.setattr(client.time, "sleep", self.seconds.append)
        monkeypatch.setattr(client.asyncio, "sleep", sleep)


@pytest.fixture
def waits(monkeypatch):
    return Waits(monkeypatch)


@pytest.fixture(params=["threads", "event loop"])
def ask(request):
    """Calls a method of either client."""

    def blocking(url, method, *args, **options):
        with Client(url, **options) as speaker:
            return method(speaker, *args)

    def awaited(url, method, *args, **options):
        async def run():
            async with AsyncClient(url, **options) as speaker:
                return await method(speaker, *args)

        return asyncio.run(run())

    return blocking if request.param == "threads" else awaited


def generate(speaker, files=None):
    return speaker.generate({"sar": b"II*\0"} if files is None else files, ["dem"])


def test_both_have_the_same_methods_with_the_same_arguments():
    def shown(kind):
        return {
            name: str(inspect.signature(method).replace(return_annotation=inspect.Signature.empty))
            for name, method in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert shown(Client) == shown(AsyncClient)
    assert {"generate", "generate_to", "embed", "embed_to", "wait_ready"} <= set(shown(Client))
    parameters = list(inspect.signature(Client("http://x").generate_to).parameters)
    assert parameters[:3] == ["folder", "observed", "targets"]
    assert "best single estimate" in Client.generate.__doc__


def test_it_waits_as_long_as_it_is_told_and_keeps_the_id(ask, waits):
    busy = Script(BUSY, BUSY, tiff())
    with busy.serving() as url:
        assert ask(url, generate).provenance == ORIGIN
    assert len(waits.seconds) == 2
    assert all(1 <= seconds <= 1.5 for seconds in waits.seconds)
    ids = {headers["X-Request-ID"] for _, headers, _ in busy.got}
    assert len(busy.got) == 3
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (BUSY, OverloadedError),
        (problem(OverloadedError("busy"), **{"Retry-After": "9999"}), OverloadedError),
        (problem(OverloadedError("busy")), OverloadedError),
        (problem(RequestError("seed", got=-1)), RequestError),
        (problem(DeadlineError("slow"), **{"Retry-After": "1"}), DeadlineError),
    ],
)
def test_the_first_answer_is_raised_where_waiting_is_no_use(ask, waits, answer, error):
    script = Script(answer, tiff())
    with script.serving() as url, pytest.raises(error) as raised:
        ask(url, generate, patience_s=0 if answer is BUSY else 60)
    assert raised.value.request_id == "the-id"
    assert len(script.got) == 1
    assert waits.seconds == []


@pytest.mark.parametrize("lost", ["drop", "half", LOST])
def test_a_draw_is_asked_again_where_the_connection_was_lost(ask, waits, lost):
    script = Script(lost, lost, tiff())
    with script.serving() as url:
        assert ask(url, generate).files == {"dem.tif": b"II*\0 and so on"}
    assert len(script.got) == 3
    first, second = waits.seconds
    assert 0.5 <= first <= 0.75 < 1 <= second <= 1.5


def test_it_does_not_ask_for_ever(ask, waits):
    script = Script("drop")
    with script.serving() as url, pytest.raises(ServiceError, match="nobody answers"):
        ask(url, generate)
    assert len(script.got) == 4


class EnoughError(Exception):
    pass


def test_who_has_answered_before_is_waited_for(monkeypatch):
    pauses = []

    def sleep(seconds):
        pauses.append(seconds)
        if len(pauses) == 9:
            raise EnoughError

    status, headers, body = tiff()
    with Script((status, {**headers, "Connection": "close"}, body)).serving() as url:
        speaker = Client(url)
        generate(speaker)
    monkeypatch.setattr(client.time, "sleep", sleep)
    with speaker, pytest.raises(EnoughError):
        generate(speaker)
    assert max(pauses) <= 6
    with Client(url) as stranger, pytest.raises(ServiceError, match="nobody answers"):
        generate(stranger)
    assert len(pauses) == 9 + 3


def test_our_own_fault_is_not_asked_for_again(ask, waits):
    told = http_problem(500, "internal error (KeyError)", "the-id")
    script = Script((500, {"Content-Type": PROBLEM}, told.model_dump_json().encode()), tiff())
    with script.serving() as url, pytest.raises(MMError, match="internal error") as raised:
        ask(url, generate)
    assert raised.value.request_id == "the-id"
    assert len(script.got) == 1


def unsafe(speaker):
    """A call that does something, such as to begin a job."""
    call = Call("POST", "/v1/x", lambda _, body: body.read(), repeat=Repeat.IF_REFUSED)
    return speaker._ask(call)


@pytest.mark.parametrize("lost", ["drop", "half", LOST])
def test_what_may_have_been_done_is_not_done_again(ask, waits, lost):
    script = Script(lost, (200, {}, b"done"))
    with script.serving() as url, pytest.raises(ServiceError):
        ask(url, unsafe)
    assert len(script.got) == 1
    refused = Script(BUSY, (200, {}, b"done"))
    with refused.serving() as url:
        assert ask(url, unsafe) == b"done"


def test_readiness_is_asked_once(ask, waits):
    script = Script(problem(NotReadyError("no model"), **{"Retry-After": "5"}), READY)
    with script.serving() as url, pytest.raises(NotReadyError):
        ask(url, lambda speaker: speaker.ready())
    assert waits.seconds == []
    again = Script(problem(NotReadyError("no model"), **{"Retry-After": "5"}), READY)
    with again.serving() as url:
        assert ask(url, lambda speaker: speaker.wait_ready(5, version=3)) == "3"
    assert len(again.got) == 2


def test_an_answer_that_takes_too_long_is_a_deadline(ask, waits):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DeadlineError):
            ask(url, generate, timeout_s=0.2)
    assert waits.seconds == []


def test_large_files_go_from_disk_to_disk(ask, waits, tmp_path):
    (tmp_path / "in.tif").write_bytes(bytes(LARGE))
    # Lost in the middle, so that both are begun anew.
    script = Script("half", tiff(LARGE))

    def to_disk(speaker):
        return speaker.generate_to(tmp_path / "out", {"sar": tmp_path / "in.tif"}, ["dem"])

    tracemalloc.start()
    try:
        with script.serving() as url:
            saved = ask(url, to_disk)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert saved.paths == (tmp_path / "out/dem.tif",)
    assert saved.origin == ORIGIN
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["dem.tif"]
    assert saved.paths[0].stat().st_size == LARGE
    assert all(size > LARGE for _, _, size in script.got)
    assert peak < LARGE / 4


def test_what_is_not_whole_is_not_there(ask, waits, tmp_path):
    script = Script((200, {**ORIGIN.headers(), "Content-Type": "application/zip"}, b"PK no zip"))
    with script.serving() as url, pytest.raises(ServiceError, match="not as this endpoint does"):
        ask(url, lambda speaker: speaker.generate_to(tmp_path / "out", {}, ["dem"]))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_refusal_leaves_nothing_behind(ask, waits, tmp_path):
    script = Script(problem(RequestError("seed", got=-1)))
    with script.serving() as url, pytest.raises(RequestError):
        ask(url, lambda speaker: speaker.generate_to(tmp_path / "out", {}, ["dem"]))
    assert list(tmp_path.iterdir()) == []


def test_a_call_is_a_value_that_tells_what_it_does():
    call = calls.generate({}, ["dem"], seed=7)
    assert (call.method, call.path, call.repeat) == ("POST", "/v1/generate", Repeat.ALWAYS)
    assert ("seed", 7) in call.fields
    assert calls.model().read({}, _body(ModelInfo)).serving is None


def _body(kind):
    limits = {"max_side_px": 9, "max_samples": 1, "max_queued": 1, "max_body_bytes": 1}
    record = {"serving": None, "modalities": [], "refused": [], "registry_error": None}
    info = kind.model_validate({**record, "limits": {**limits, "deadline_s": 1}})
    return io.BytesIO(info.model_dump_json().encode())


def test_many_callers_share_an_asynchronous_client():
    script = Script(READY)

    async def run(url):
        async with AsyncClient(url) as speaker:
            return await asyncio.gather(*(speaker.ready() for _ in range(20)))

    with script.serving() as url:
        assert asyncio.run(run(url)) == ["3"] * 20
    assert len(script.got) == 20
