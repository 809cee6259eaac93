"""Bodies between a proxy and a replica, passed on as Ray does: by queues that have no end."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from mm_model.serving import ahead
from mm_model.serving.ahead import MAX_AHEAD_BYTES, ProxyEnd, ReplicaEnd

PIECE = 64 * 1024
BODY = [bytes([n % 251]) * PIECE for n in range(5 * MAX_AHEAD_BYTES // PIECE)]
MOST = MAX_AHEAD_BYTES + PIECE
GONE = {"type": "http.disconnect"}


def scope():
    return {"type": "http", "method": "POST", "path": "/", "headers": []}


class Caller:
    """Sends pieces as fast as they are taken, and reads an answer as it is let."""

    def __init__(self, pieces=()):
        self.pieces, self.sent = list(pieces), 0
        self.got, self.types = [], set()
        self.reads, self.leaves = asyncio.Event(), asyncio.Event()
        self.reads.set()

    async def receive(self):
        if self.sent < max(1, len(self.pieces)):
            self.sent += 1
            piece = self.pieces[self.sent - 1] if self.pieces else b""
            more = self.sent < len(self.pieces)
            return {"type": "http.request", "body": piece, "more_body": more}
        await self.leaves.wait()
        return GONE

    async def send(self, message):
        await self.reads.wait()
        self.types.add(message["type"])
        self.got.append(message.get("body", b""))


def passed_on(application, seen):
    """What Ray is between both ends: takes all that comes, and passes it on."""

    async def ray(scope, receive, send):
        up, down = asyncio.Queue(), asyncio.Queue()

        async def take():
            while (message := await receive()) != GONE:
                seen.append(message)
                up.put_nowait(message)
            up.put_nowait(GONE)

        async def put(message):
            seen.append(message)
            down.put_nowait(message)

        async def answer():
            try:
                await ReplicaEnd(application)(scope, up.get, put)
            finally:
                down.put_nowait(None)

        tasks = [asyncio.create_task(take()), asyncio.create_task(answer())]
        try:
            while (message := await down.get()) is not None:
                await send(message)
        finally:
            for task in tasks:
                task.cancel()
        await tasks[1]

    return ProxyEnd(ray)


def run(caller_of, application, meanwhile=None):
    """What the caller got, and all that passed between both ends."""

    async def bounded():
        async with asyncio.timeout(20):
            caller, seen = caller_of(), []
            asked = asyncio.create_task(
                passed_on(application, seen)(scope(), caller.receive, caller.send)
            )
            if meanwhile is not None:
                await meanwhile(caller)
            await asked
            return caller, seen

    return asyncio.run(bounded())


async def settled(figure):
    """A figure once it does not change any more."""
    for _ in itertools.count():
        before = figure()
        await asyncio.sleep(0.05)
        if figure() == before:
            return before


async def read_all(receive):
    pieces, more = [], True
    while more:
        message = await receive()
        assert message["type"] == "http.request"
        pieces.append(message["body"])
        more = message["more_body"]
    return pieces


async def say(send, pieces):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for piece in pieces:
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def test_a_body_waits_for_who_takes_it_and_arrives_whole():
    taken, begins = [], asyncio.Event()

    async def slow(scope, receive, send):
        await begins.wait()
        taken.extend(await read_all(receive))
        await say(send, [b"thanks"])

    async def watched(caller):
        assert PIECE * await settled(lambda: caller.sent) <= MOST
        begins.set()

    caller, _ = run(lambda: Caller(BODY), slow, watched)
    assert taken == BODY
    assert b"".join(caller.got) == b"thanks"


def test_an_answer_waits_for_who_reads_it_and_arrives_whole():
    said = 0

    async def fast(scope, receive, send):
        async def counted(message):
            nonlocal said
            await send(message)
            said += len(message.get("body", b""))

        # As a file's answer listens for who leaves.
        listening = asyncio.create_task(read_all(receive))
        await say(counted, BODY)
        await listening

    async def watched(caller):
        caller.reads.clear()
        assert await settled(lambda: said) <= MOST
        caller.reads.set()

    caller, _ = run(Caller, fast, watched)
    assert b"".join(caller.got) == b"".join(BODY)
    assert caller.types == {"http.response.start", "http.response.body"}


def test_an_answer_does_not_wait_for_a_body_that_nobody_takes():
    begins = asyncio.Event()

    async def deaf(scope, receive, send):
        await begins.wait()
        await say(send, BODY)

    async def watched(caller):
        assert PIECE * await settled(lambda: caller.sent) >= MAX_AHEAD_BYTES
        begins.set()

    caller, _ = run(lambda: Caller(BODY), deaf, watched)
    assert b"".join(caller.got) == b"".join(BODY)
    assert caller.sent * PIECE <= MOST


def test_who_leaves_is_not_waited_for():
    ended = False

    async def fast(scope, receive, send):
        nonlocal ended
        await say(send, BODY)
        assert await receive() != GONE  # the body
        assert await receive() == await receive() == GONE
        ended = True

    async def watched(caller):
        caller.reads.clear()
        await asyncio.sleep(0.05)
        caller.leaves.set()
        while not ended:
            await asyncio.sleep(0.01)
        caller.reads.set()

    run(Caller, fast, watched)


def test_who_reads_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(ahead, "_PATIENCE_S", 0.2)
    ended = False

    async def fast(scope, receive, send):
        nonlocal ended
        await read_all(receive)
        await say(send, BODY)
        ended = await receive() == GONE

    async def watched(caller):
        caller.reads.clear()

    caller, _ = run(Caller, fast, watched)
    assert ended
    assert caller.got == []


def test_what_is_short_costs_no_message():
    async def echo(scope, receive, send):
        await say(send, await read_all(receive))

    few = BODY[: MAX_AHEAD_BYTES // 4 // PIECE - 1]
    caller, seen = run(lambda: Caller(few), echo)
    assert b"".join(caller.got) == b"".join(few)
    assert {m["type"] for m in seen} <= {
        "http.request", "http.response.start", "http.response.body",
    }  # fmt: skip


@pytest.mark.parametrize("given", [scope(), {"type": "lifespan"}])
def test_without_a_proxy_that_hears_it_a_replica_says_nothing_of_its_own(given):
    async def echo(scope, receive, send):
        await say(send, await read_all(receive))

    async def ask():
        caller = Caller(BODY)
        await ReplicaEnd(echo)(given, caller.receive, caller.send)
        return caller

    caller = asyncio.run(ask())
    assert b"".join(caller.got) == b"".join(BODY)
    assert caller.types == {"http.response.start", "http.response.body"}
