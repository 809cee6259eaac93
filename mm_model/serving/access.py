"""Who may ask: API keys with scopes; what every answer says to browsers; the log of who asked what.

A key is 256 random bits. Only its SHA-256 is kept: what was drawn at random and is that long needs
no slow hash, and comparing digests tells nobody anything about a key.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import logging
import re
import secrets
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm_model.api import PROBLEM, problem_of
from mm_model.errors import ConfigError, ForbiddenError, MMError, UnauthenticatedError

KEYS, KEYS_FILE = "MM_API_KEYS", "MM_API_KEYS_FILE"
"""Variables that hold the lines of keys (";" stands for a line's end), or name their file."""

AUDIT = logging.getLogger("mm_model.audit")
"""A line of JSON for each request: who, what, how it ended; nothing of what was sent."""

_OPEN = frozenset({"/healthz", "/readyz"})  # probes ask them, and they tell nothing
_HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_JOB_PATH = re.compile(r"^/v1/jobs/[0-9a-f]{32}(/result)?$")
_LINE = re.compile(r"(?P<name>[\w.-]{1,64})\s+(?P<scopes>[a-z,]+)\s+(?P<digest>[0-9a-f]{64})")


class KeyScope(StrEnum):
    """What a key may be for. Models, modalities and documentation are shown to any key."""

    GENERATE = "generate"
    EMBED = "embed"
    METRICS = "metrics"


_NEEDED: Mapping[str, KeyScope] = {
    "/v1/generate": KeyScope.GENERATE,
    "/v1/fill": KeyScope.GENERATE,
    "/v1/embed": KeyScope.EMBED,
    "/metrics": KeyScope.METRICS,
}
_JOBS = "/v1/jobs"
_KNOWN = {
    _JOBS,
    _JOBS + "/{job_id}",
    _JOBS + "/{job_id}/result",
    *_OPEN,
    *_NEEDED,
    "/v1/model",
    "/v1/modalities",
    "/docs",
    "/openapi.json",
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
    parse_keys(text, where)
    return text


def check_exposure(host: str, keys: Keys) -> None:
    """Refuse to listen where others can ask without a key.

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
            remedy="make a key with `mm key new`",
        )


class Guard:
    """ASGI middleware: asks for a key, where there are any; adds headers; writes the audit log.

    Args:
        app: what answers.
        keys: who may ask; empty: anybody.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app, self._keys = app, keys

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
                MutableHeaders(scope=message).update(_HEADERS)
            seen.sent += len(message.get("body", b""))
            await send(message)

        try:
            key = self._key(scope)
            seen.key = key.name if key else None
            self._check(seen.path, key)
            scope[_HOLDER] = seen.key or ""
        except MMError as error:
            answer = JSONResponse(
                problem_of(error).model_dump(exclude_none=True),
                status_code=problem_of(error).status,
                media_type=PROBLEM,
                headers={"WWW-Authenticate": "Bearer"},
            )
            app: ASGIApp = answer
        else:
            app = self._app
        try:
            await app(scope, counted, secured)
        finally:
            seen.log()

    def _key(self, scope: Scope) -> Key | None:
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            return None
        return self._keys.get(_digest(given.strip()))

    def _check(self, path: str, key: Key | None) -> None:
        if not self._keys or path in _OPEN:
            return
        if key is None:
            raise UnauthenticatedError(
                "no API key that is known here",
                allowed="the header Authorization: Bearer <key>",
                remedy="ask who runs the endpoint for a key",
            )
        is_job = path == _JOBS or path.startswith(_JOBS + "/")
        needed = KeyScope.GENERATE if is_job else _NEEDED.get(path)
        if needed is not None and needed not in key.scopes:
            raise ForbiddenError(
                "the API key is for something else",
                got=", ".join(sorted(key.scopes)),
                allowed=f"a key with the scope {needed}",
            )


_HOLDER = "mm_model.holder"


def holder_of(scope: Mapping[str, Any]) -> str:
    """Name of the key that a request came with; "" where there are none."""
    return str(scope.get(_HOLDER, ""))


class _Seen:
    """What the audit log tells of a request."""

    def __init__(self, scope: Scope) -> None:
        root, path = scope.get("root_path", ""), scope["path"]
        self.path = path[len(root) :] if root and path.startswith(root) else path
        self._shown = _JOB_PATH.sub(r"/v1/jobs/{job_id}\1", self.path)
        self._scope, self._began = scope, time.perf_counter()
        self.key: str | None = None
        self.status, self.received, self.sent = 499, 0, 0  # as where the caller leaves

    def log(self) -> None:
        client = self._scope.get("client")
        line: MutableMapping[str, Any] = {
            "client": client[0] if client else None,
            "key": self.key,
            "method": self._scope["method"] if self._shown in _KNOWN else "other",
            # A path that nobody declared is something that the caller wrote.
            "path": self._shown if self._shown in _KNOWN else "other",
            "status": self.status,
            "received_bytes": self.received,
            "sent_bytes": self.sent,
            "seconds": round(time.perf_counter() - self._began, 4),
        }
        AUDIT.info(json.dumps(line))


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
