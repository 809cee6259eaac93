"""Clients of the endpoint, for threads and for event loops: files in, files out, the library's own
errors.

What is asked and how answers are read is said once, in `mm_model.calls`; here are network and time.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Concatenate, Generic, ParamSpec, Self, TypeVar

import httpx
from pydantic import ValidationError

from mm_model import calls
from mm_model.api import PROBLEM, REQUEST_ID, ModelInfo, Problem, error_of
from mm_model.calls import Call, Embedded, Generated, Repeat, Saved, not_this_endpoint
from mm_model.errors import DeadlineError, MMError, NotReadyError, ServiceError

__all__ = ["AsyncClient", "Client", "Embedded", "Generated", "Saved"]

_CONNECT_S = 10.0
_PAUSE_S = 0.5  # between two looks whether it is ready, and before the first reconnection
_RECONNECTIONS = 3
_LONGEST_PAUSE_S = 4.0
_HTTP_REFUSALS = (429, 503)  # of somebody who did nothing yet

P = ParamSpec("P")
T = TypeVar("T")
H = TypeVar("H", httpx.Client, httpx.AsyncClient)


class _Speaker(Generic[H]):
    """What both clients hold."""

    def __init__(self, url: str, http: H, patience_s: float) -> None:
        self._url, self._patience_s = url.rstrip("/"), patience_s
        self._http: H = http
        self._known = False  # whether somebody has answered there

    def _attempts(self, call: Call[Any]) -> _Attempts:
        return _Attempts(call, self._url, self._patience_s, self._known)

    @contextmanager
    def _request(self, call: Call[Any], request_id: str) -> Iterator[httpx.Request]:
        """The request of a call; its files are open for as long as it takes."""
        with ExitStack() as stack:
            parts: list[Any] = [
                # Without a file name, so that a form without any file is multipart too.
                (name, (None, str(value).encode()))
                for name, value in call.fields
                if value is not None
            ]
            for name, file in call.files:
                content = file if isinstance(file, bytes) else stack.enter_context(file.open("rb"))
                parts.append((name, (f"{name}.tif", content)))
            headers = {**call.headers, REQUEST_ID: request_id}
            yield self._http.build_request(
                call.method, self._url + call.path, files=parts or None, headers=headers
            )


class _Attempts:
    """Whether a call is made once more, and when."""

    def __init__(self, call: Call[Any], url: str, patience_s: float, known: bool) -> None:
        self._repeat, self._url, self._known = call.repeat, url, known
        self._give_up = time.monotonic() + patience_s
        self._lost = self._failed = 0

    def after_error(self, error: httpx.HTTPError) -> float:
        """Seconds to wait after a connection that failed; raises where that was the last try."""
        if isinstance(error, httpx.ReadTimeout):
            raise DeadlineError(f"{self._url} took too long", got=error) from error
        never_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        lost = isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError)
        pause = self._reconnection(never_sent, lost)
        if pause is None:
            raise ServiceError(
                f"nobody answers at {self._url}", got=error, remedy="start it with `mm up`"
            ) from error
        return pause

    def after_answer(self, response: httpx.Response, body: BinaryIO) -> float:
        """Seconds to wait after an answer of failure; raises what it tells of if it is final."""
        body.seek(0)
        content = body.read()
        pause: float | None = None
        if response.status_code in _HTTP_REFUSALS:
            pause = self._wait(response.headers.get("retry-after", ""))
        elif response.status_code >= 500 and not _is_problem(response):
            # A proxy that has lost the replica which it had asked.
            pause = self._reconnection(never_sent=False, lost=True)
        if pause is not None:
            return pause
        try:
            problem = Problem.model_validate_json(content)
        except ValidationError:
            got = f"{response.status_code} {content[:200].decode(errors='replace')}"
            raise not_this_endpoint(self._url, got) from None
        raise error_of(problem)

    def _reconnection(self, never_sent: bool, lost: bool) -> float | None:
        may = never_sent or (lost and self._repeat is Repeat.ALWAYS)
        if self._repeat is Repeat.NEVER or not may:
            return None
        # Who was there comes back; but what was sent may be the reason that it went.
        if not (never_sent and self._known):
            self._lost += 1
            if self._lost > _RECONNECTIONS:
                return None
        self._failed += 1
        return self._in_time(min(_PAUSE_S * 2 ** (self._failed - 1), _LONGEST_PAUSE_S))

    def _wait(self, told: str) -> float | None:
        if self._repeat is Repeat.NEVER or not told.isdecimal():
            return None
        return self._in_time(float(told))

    def _in_time(self, pause: float) -> float | None:
        # Callers who were all told the same do not come back all at once.
        pause *= random.uniform(1.0, 1.5)
        return pause if time.monotonic() + pause < self._give_up else None


def _is_problem(response: httpx.Response) -> bool:
    return str(response.headers.get("content-type", "")).startswith(PROBLEM)


def _blocking(build: Callable[P, Call[T]]) -> Callable[Concatenate[Client, P], T]:
    """A call as a method of `Client`, with its arguments and documentation."""

    def ask(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._ask(build(*args, **kwargs))

    return _named(ask, build)


def _blocking_to(build: Callable[P, Call[Any]]) -> Callable[Concatenate[Client, Path, P], Saved]:
    """The same, whose answer is written below a folder while it comes: memory does not grow."""

    def ask(self: Client, folder: Path, /, *args: P.args, **kwargs: P.kwargs) -> Saved:
        return self._ask(build(*args, **kwargs).into(folder))

    return _named(ask, build, "folder")


def _awaited(
    build: Callable[P, Call[T]],
) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    """A call as a method of `AsyncClient`, with its arguments and documentation."""

    async def ask(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._ask(build(*args, **kwargs))

    return _named(ask, build)


def _awaited_to(
    build: Callable[P, Call[Any]],
) -> Callable[Concatenate[AsyncClient, Path, P], Awaitable[Saved]]:
    """The same, whose answer is written below a folder while it comes."""

    async def ask(self: AsyncClient, folder: Path, /, *args: P.args, **kwargs: P.kwargs) -> Saved:
        return await self._ask(build(*args, **kwargs).into(folder))

    return _named(ask, build, "folder")


def _named(method: T, build: Callable[..., Any], *before: str) -> T:
    """`help` and editors show a method with the arguments of the call that it makes."""
    functools.update_wrapper(method, build, assigned=("__doc__",))  # type: ignore[arg-type]
    shown: Any = method
    shown.__name__ = f"{build.__name__}_to" if before else build.__name__
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    own = [inspect.Parameter(name, kind) for name in ("self", *before)]
    asked = inspect.signature(build)
    shown.__signature__ = asked.replace(
        parameters=[*own, *asked.parameters.values()], return_annotation=inspect.Signature.empty
    )
    return method


class Client(_Speaker[httpx.Client]):
    """Speaks to one endpoint.

    A call is repeated where that is safe: after 429 and 503, when the endpoint says; and, since
    what is generated is a function of what is sent, after a connection that was lost. An endpoint
    that has answered before and is not there is waited for as long. All tries of a call carry one
    id, which the endpoint's logs and its errors name.

    Args:
        url: its root, such as http://127.0.0.1:8000.
        timeout_s: longest wait for an answer; the endpoint has a deadline of its own.
        api_key: where the endpoint asks for one; the variable MM_API_KEY by default.
        patience_s: how long a call is repeated; with 0 the first refusal is raised.
        transport: for tests, an application in this process.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 150.0,
        api_key: str | None = None,
        patience_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        http = httpx.Client(timeout=_timeout(timeout_s), transport=transport, headers=_key(api_key))
        super().__init__(url, http, patience_s)

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

    generate = _blocking(calls.generate)
    generate_to = _blocking_to(calls.generate)
    embed = _blocking(calls.embed)
    embed_to = _blocking_to(calls.embed)
    fill = _blocking(calls.fill)
    fill_to = _blocking_to(calls.fill)
    start_job = _blocking(calls.start_job)
    job = _blocking(calls.job)
    save_result = _blocking(calls.save_result)
    delete_job = _blocking(calls.delete_job)
    model = _blocking(calls.model)
    modalities = _blocking(calls.modalities)
    ready = _blocking(calls.ready)

    def wait_ready(self, timeout_s: float, version: int | str | None = None) -> str:
        """Wait until a version (or the named one) serves; returns it.

        Raises:
            NotReadyError: it does not serve in time; the message says what was refused.
            ServiceError: nobody answers in time.
        """
        give_up = time.monotonic() + timeout_s
        while True:
            try:
                serves = self.ready()
                if _is_it(serves, version):
                    return serves
                error: MMError = _other_version(serves, version, self.model())
            except (NotReadyError, ServiceError) as not_yet:
                error = not_yet
            if time.monotonic() >= give_up:
                raise error
            time.sleep(_PAUSE_S)

    def _ask(self, call: Call[T]) -> T:
        attempts = self._attempts(call)
        request_id = uuid.uuid4().hex
        while True:
            with self._request(call, request_id) as request:
                try:
                    response = self._http.send(request, stream=True)
                    self._known = True
                    try:
                        with call.body(response.is_success) as body:
                            for piece in response.iter_bytes():
                                body.write(piece)
                            if response.is_success:
                                return call.understood(response.headers, body, self._url)
                            pause = attempts.after_answer(response, body)
                    finally:
                        response.close()
                except httpx.HTTPError as error:
                    pause = attempts.after_error(error)
            time.sleep(pause)


class AsyncClient(_Speaker[httpx.AsyncClient]):
    """`Client` for event loops: the same calls, awaited.

    Args:
        url: as of `Client`, like all others.
        timeout_s: longest wait for an answer.
        api_key: where the endpoint asks for one.
        patience_s: how long a call is repeated.
        transport: for tests, an application in this process.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 150.0,
        api_key: str | None = None,
        patience_s: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        http = httpx.AsyncClient(
            timeout=_timeout(timeout_s), transport=transport, headers=_key(api_key)
        )
        super().__init__(url, http, patience_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    generate = _awaited(calls.generate)
    generate_to = _awaited_to(calls.generate)
    embed = _awaited(calls.embed)
    embed_to = _awaited_to(calls.embed)
    fill = _awaited(calls.fill)
    fill_to = _awaited_to(calls.fill)
    start_job = _awaited(calls.start_job)
    job = _awaited(calls.job)
    save_result = _awaited(calls.save_result)
    delete_job = _awaited(calls.delete_job)
    model = _awaited(calls.model)
    modalities = _awaited(calls.modalities)
    ready = _awaited(calls.ready)

    async def wait_ready(self, timeout_s: float, version: int | str | None = None) -> str:
        """Wait until a version (or the named one) serves; raises as that of `Client` does."""
        give_up = time.monotonic() + timeout_s
        while True:
            try:
                serves = await self.ready()
                if _is_it(serves, version):
                    return serves
                error: MMError = _other_version(serves, version, await self.model())
            except (NotReadyError, ServiceError) as not_yet:
                error = not_yet
            if time.monotonic() >= give_up:
                raise error
            await asyncio.sleep(_PAUSE_S)

    async def _ask(self, call: Call[T]) -> T:
        attempts = self._attempts(call)
        request_id = uuid.uuid4().hex
        while True:
            with self._request(call, request_id) as request:
                try:
                    response = await self._http.send(request, stream=True)
                    self._known = True
                    try:
                        with call.body(response.is_success) as body:
                            async for piece in response.aiter_bytes():
                                body.write(piece)
                            if response.is_success:
                                return await asyncio.to_thread(
                                    call.understood, response.headers, body, self._url
                                )
                            pause = attempts.after_answer(response, body)
                    finally:
                        await response.aclose()
                except httpx.HTTPError as error:
                    pause = attempts.after_error(error)
            await asyncio.sleep(pause)


def _timeout(seconds: float) -> httpx.Timeout:
    return httpx.Timeout(seconds, connect=_CONNECT_S)


def _key(given: str | None) -> Mapping[str, str]:
    key = given or os.environ.get("MM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _is_it(serves: str, version: int | str | None) -> bool:
    return version is None or serves == str(version)


def _other_version(serves: str, version: int | str | None, info: ModelInfo) -> NotReadyError:
    refused = [r.reason for r in info.refused if r.version == str(version)]
    return NotReadyError(
        f"version {version} does not serve",
        got=f"version {serves}",
        remedy=f"it was refused: {refused[0]}" if refused else "look at its log",
    )
