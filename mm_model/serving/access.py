"""Who may ask: API keys with scopes; what every answer says to browsers; the log of who asked what.

A key is 256 random bits. Only its SHA-256 is kept: what was drawn at random and is that long needs
no slow hash, and comparing digests tells nobody anything about a key.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm_model.api import PROBLEM, RETRY_AFTER_S, problem_of
from mm_model.errors import (
    ConfigError,
    ForbiddenError,
    MMError,
    OverloadedError,
    UnauthenticatedError,
)
from mm_model.serving.front import request_id_of

KEYS, KEYS_FILE = "MM_API_KEYS", "MM_API_KEYS_FILE"
"""Variables that hold the lines of keys (";" stands for a line's end), or name their file."""

PAGE_FILES = "/page"
"""Where the files of the page at "/" lie."""

AUDIT = logging.getLogger("mm_model.audit")
"""A record for each request, its facts as attributes: who, what, how it ended; nothing of what was
sent."""

_OPEN = frozenset({"/healthz", "/readyz"})  # probes ask them, and they tell nothing
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_NEVER = "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
SECURITY_HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": f"default-src 'none'; style-src 'unsafe-inline'; {_NEVER}",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
# The page at "/" runs its own scripts, asks its own endpoint, and turns no text into markup.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    f"require-trusted-types-for 'script'; {_NEVER}"
)
_JOB_PATH = re.compile(r"^/v1/jobs/[0-9a-f]{32}(/result)?$")
_PROGRESS = "/v1/progress/"
_LINE = re.compile(r"(?P<name>[\w.-]{1,64})\s+(?P<scopes>[a-z,]+)\s+(?P<digest>[0-9a-f]{64})")


class KeyScope(StrEnum):
    """What a key may be for. Models, modalities and documentation are shown to any key."""

    GENERATE = "generate"
    EMBED = "embed"
    METRICS = "metrics"


_JOBS = "/v1/jobs"
_NEEDED: Mapping[str, KeyScope] = {
    _JOBS: KeyScope.GENERATE,
    "/v1/generate": KeyScope.GENERATE,
    "/v1/align": KeyScope.GENERATE,
    "/v1/fill": KeyScope.GENERATE,
    "/v1/embed": KeyScope.EMBED,
    "/metrics": KeyScope.METRICS,
}
_WORK = frozenset({KeyScope.GENERATE, KeyScope.EMBED})
_KNOWN = {
    *(_JOBS + "/{job_id}", _JOBS + "/{job_id}/result"),
    *_OPEN,
    *_NEEDED,
    *("/v1/model", "/v1/modalities", "/docs", "/openapi.json", _PROGRESS),
}


@dataclass(frozen=True)
class Key:
    """Who holds a key, and what it is for."""

    name: str
    scopes: frozenset[KeyScope]


Keys = Mapping[str, Key]
"""SHA-256 of a key, in hexadecimal → whose it is."""


def new_key(name: str, scopes: frozenset[KeyScope]) -> tuple[str, str]:
    """A key, to be given to its holder, and the line by which the endpoint knows it."""
    key = "mm_" + secrets.token_urlsafe(32)
    line = f"{name} {','.join(sorted(scopes))} {_digest(key)}"
    parse_keys(line, "new key")
    return key, line


def parse_keys(text: str, where: str) -> Keys:
    """Lines of name, scopes and digest; "#" begins a comment.

    Raises:
        ConfigError: a line is malformed, or a name or digest is there twice.
    """
    found: dict[str, Key] = {}
    for number, raw in enumerate(re.split(r"[\n;]", text), 1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        scopes = match["scopes"].split(",") if match else []
        if match is None or not set(scopes) <= set(KeyScope):
            # Not the line itself: somebody may have put a key there.
            raise ConfigError(
                f"{where}, line {number}, is no API key",
                allowed=f"NAME SCOPE,… SHA-256, of the scopes {', '.join(KeyScope)}",
                remedy="make one with `mm key new`",
            )
        if match["digest"] in found or match["name"] in {key.name for key in found.values()}:
            raise ConfigError(f"{where}, line {number}: {match['name']} is there twice")
        found[match["digest"]] = Key(match["name"], frozenset(map(KeyScope, scopes)))
    return found


def configured_keys(environment: Mapping[str, str]) -> str:
    """The lines of keys that the environment holds or names, checked; "" for none.

    Raises:
        ConfigError: they, or their file, cannot be used.
    """
    if environment.get(KEYS) and environment.get(KEYS_FILE):
        raise ConfigError(f"both {KEYS} and {KEYS_FILE} are set", allowed="one of them")
    text, where = environment.get(KEYS, ""), KEYS
    if environment.get(KEYS_FILE):
        where = environment[KEYS_FILE]
        try:
            text = Path(where).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where} cannot be read", got=error, allowed="API keys") from error
        if not parse_keys(text, where):
            raise ConfigError(f"{where} holds no API key", remedy="make one with `mm key new`")
    return text if parse_keys(text, where) else ""


def check_exposure(host: str, keys: Keys, remedy: str = "make a key with `mm key new`") -> None:
    """Refuse to listen where others can ask without a key.

    Args:
        host: the address that is listened on.
        keys: who may ask.
        remedy: what the error tells to do.

    Raises:
        ConfigError: the address is not this machine's own, and there is no key.
    """
    if keys or host == "localhost":
        return
    try:
        alone = ipaddress.ip_address(host).is_loopback
    except ValueError:
        alone = False
    if not alone:
        raise ConfigError(
            "the endpoint listens to others and has no API key",
            got=host,
            allowed=f"127.0.0.1, or keys in {KEYS_FILE} or {KEYS}",
            remedy=remedy,
        )


def check_kept(locked: Sequence[Path], keys: Keys) -> None:
    """Refuse to open without a word what asked for keys.

    Args:
        locked: records of what was deployed here with keys.
        keys: those to be deployed now.

    Raises:
        ConfigError: there were keys, and are none now.
    """
    if locked and not keys:
        files = ", ".join(map(str, locked))
        raise ConfigError(
            "the endpoint was deployed with API keys, and would answer anybody now",
            got=f"no key, and {files}",
            allowed=f"keys in {KEYS_FILE} or {KEYS}",
            remedy="set it as where it was deployed; to open it, `mm down` and remove the records",
        )


class Guard:
    """ASGI middleware: asks for a key, where there are any; adds headers; writes the audit log.

    Args:
        app: what answers.
        keys: who may ask; empty: anybody, but no page of somebody else in a browser.
        max_per_key: most requests of one key that are worked on at once; None is no limit.
        on_refused: told the code of each problem that a request is refused with here.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        max_per_key: int | None = None,
        on_refused: Callable[[str], object] = lambda _: None,
    ) -> None:
        self._app, self._keys, self._on_refused = app, keys, on_refused
        self._max_per_key = max_per_key
        self._in_progress: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = _Seen(scope)

        async def counted() -> Message:
            message = await receive()
            seen.received += len(message.get("body", b""))
            return message

        async def secured(message: Message) -> None:
            if message["type"] == "http.response.start":
                seen.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(SECURITY_HEADERS)
                if _is_page(seen.path):
                    headers["Content-Security-Policy"] = _PAGE_POLICY
            seen.sent += len(message.get("body", b""))
            await send(message)

        try:
            try:
                key = self._key(scope)
                seen.key = key.name if key else None
                self._check(seen.path, key)
                if not self._keys and seen.path not in _OPEN:
                    _check_browser(scope["method"], Headers(scope=scope))
                scope[_HOLDER] = seen.key or ""
                with self._place(seen.path, key):
                    await self._app(scope, counted, secured)
            except MMError as error:  # of this guard: the application answers its own
                self._on_refused(error.code)
                await _refusal(error, scope)(scope, counted, secured)
        finally:
            seen.log()

    @contextmanager
    def _place(self, path: str, key: Key | None) -> Iterator[None]:
        """One of the places that a key has for requests that are work."""
        if key is None or self._max_per_key is None or _NEEDED.get(path) not in _WORK:
            yield
            return
        if self._in_progress[key.name] >= self._max_per_key:
            raise OverloadedError(
                f"too many requests of the API key {key.name} are in progress",
                got=self._in_progress[key.name],
                allowed=self._max_per_key,
                remedy="wait for one of them",
            )
        self._in_progress[key.name] += 1
        try:
            yield
        finally:
            self._in_progress[key.name] -= 1

    def _key(self, scope: Scope) -> Key | None:
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            return None
        return self._keys.get(_digest(given.strip()))

    def _check(self, path: str, key: Key | None) -> None:
        if not self._keys or path in _OPEN or _is_page(path):
            return
        if key is None:
            raise UnauthenticatedError(
                "no API key that is known here",
                allowed="the header Authorization: Bearer <key>",
                remedy="ask who runs the endpoint for a key",
            )
        is_job = path.startswith(_JOBS + "/")
        needed = KeyScope.GENERATE if is_job else _NEEDED.get(path)
        if needed is not None and needed not in key.scopes:
            raise ForbiddenError(
                "the API key is for something else",
                got=", ".join(sorted(key.scopes)),
                allowed=f"a key with the scope {needed}",
            )


def _check_browser(method: str, headers: Headers) -> None:
    """Refuse what a page of somebody else has the browser of a caller ask, where no key is asked.

    Such a page may post wherever it likes, though it cannot read the answer; but if its own name
    comes to mean this machine (DNS rebinding), it can. That name has a dot, as all public ones; a
    browser tells it in Host, and where a page is from in Origin.

    Raises:
        ForbiddenError: it is so.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    remedy = "ask by 127.0.0.1 or localhost, or have the endpoint set API keys"
    if not _is_local(host):
        raise ForbiddenError(
            "without API keys, the endpoint is not asked by a public name",
            got=f"Host: {host[:80]}",
            allowed="an IP address, or a name without a dot",
            remedy=remedy,
        )
    if origin is None or method in _READING:
        return
    if origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
        raise ForbiddenError(
            "without API keys, no page but the endpoint's own may change anything here",
            got=f"Origin: {origin[:80]}",
            allowed=f"http://{host[:80]}",
            remedy=remedy,
        )


def _is_local(host: str) -> bool:
    """Whether a header Host holds an address, or a name that no public one can be."""
    name = re.sub(r":\d*$", "", host)
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") else name)
    except ValueError:
        return "." not in name
    return True


def _is_page(path: str) -> bool:
    """Whether it is of the page, whose files are no secret: it asks for a key itself."""
    return path in ("", "/") or path.startswith(f"{PAGE_FILES}/")


_HOLDER = "mm_model.holder"


def holder_of(scope: Scope) -> str:
    """Name of the key that a request came with; "" where there are none."""
    return str(scope.get(_HOLDER, ""))


class _Seen:
    """What the audit log tells of a request."""

    def __init__(self, scope: Scope) -> None:
        root, path = scope.get("root_path", ""), scope["path"]
        self.path = path[len(root) :] if root and path.startswith(root) else path
        self._shown = _JOB_PATH.sub(r"/v1/jobs/{job_id}\1", self.path)
        if self.path.startswith(_PROGRESS):
            self._shown = _PROGRESS
        self._scope, self._began = scope, time.perf_counter()
        self.key: str | None = None
        self.status, self.received, self.sent = 499, 0, 0  # as where the caller leaves

    def log(self) -> None:
        client = self._scope.get("client")
        AUDIT.info(
            "answered",
            extra={
                "request_id": request_id_of(self._scope),
                "client": client[0] if client else None,
                "key": self.key,
                "method": self._scope["method"] if self._shown_path() != "other" else "other",
                "path": self._shown_path(),
                "status": self.status,
                "received_bytes": self.received,
                "sent_bytes": self.sent,
                "seconds": round(time.perf_counter() - self._began, 4),
            },
        )

    def _shown_path(self) -> str:
        """A path that nobody declared is something that the caller wrote."""
        if _is_page(self.path):
            return "/"
        return self._shown if self._shown in _KNOWN else "other"


def _refusal(error: MMError, scope: Scope) -> JSONResponse:
    problem = problem_of(error, request_id_of(scope))
    headers = {"WWW-Authenticate": "Bearer"} if problem.status == 401 else {}
    if problem.status in RETRY_AFTER_S:
        headers["Retry-After"] = str(RETRY_AFTER_S[problem.status])
    return JSONResponse(
        problem.model_dump(exclude_none=True),
        status_code=problem.status,
        media_type=PROBLEM,
        headers=headers,
    )


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
