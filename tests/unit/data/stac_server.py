"""A STAC API and a file server with byte ranges on loopback, both of which can be made to fail."""

from __future__ import annotations

import datetime as dt
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from shapely.geometry import shape

CONFORMS = [
    "https://api.stacspec.org/v1.0.0/core",
    "https://api.stacspec.org/v1.0.0/collections",
    "https://api.stacspec.org/v1.0.0/item-search",
    "https://api.stacspec.org/v1.0.0/item-search#query",
]
PAGE = 2  # however many are asked for: every search has pages


@dataclass
class Fault:
    """What goes wrong the next `times` times that a path matches.

    Attributes:
        what: a status, "truncate" (half of the body, though all is promised) or "drop" (nothing).
        skip: how many matching requests go well before.
        method: the only one that it is about, if any.
    """

    path: str
    what: int | str
    times: int = 1
    skip: int = 0
    method: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Asked:
    method: str
    path: str
    query: dict[str, list[str]]
    status: int
    sent: int


class StacServer:
    """Serves items, and the files of a folder under /files/.

    Args:
        folder: of the files.
        items: STAC items; `{base}` in addresses becomes that of the server.
        token_s: files want a token that is good for so many seconds; None for none.
        latency_s: of every answer.
    """

    def __init__(
        self,
        folder: Path,
        items: list[dict],
        token_s: float | None = None,
        latency_s: float = 0.0,
    ) -> None:
        self.folder, self.items, self.token_s, self.latency_s = folder, items, token_s, latency_s
        self.faults: list[Fault] = []
        self.asked: list[Asked] = []
        self.tokens: list[str] = []
        self.revoked: set[str] = set()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (_Answer,), {"site": self}))
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a reader that hangs up is no news
        self.base = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> StacServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def fail(self, path: str, what: int | str, times: int = 1, **options) -> None:
        self.faults.append(Fault(path, what, times, **options))

    def count(self, path: str, method: str | None = None) -> int:
        return sum(bool(re.search(path, a.path)) and method in (None, a.method) for a in self.asked)

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                fits = re.search(fault.path, path) and fault.method in (None, method)
                if fits and fault.times > 0:
                    if fault.skip > 0:
                        fault.skip -= 1
                        return None
                    fault.times -= 1
                    return fault
        return None

    def new_token(self) -> dict[str, str]:
        expires = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=self.token_s or 0)
        self.tokens.append(f"t{len(self.tokens)}")
        return {"token": f"sig={self.tokens[-1]}", "msft:expiry": expires.isoformat()}

    def admits(self, query: dict[str, list[str]]) -> bool:
        token = query.get("sig", [""])[0]
        return self.token_s is None or (token in self.tokens and token not in self.revoked)

    def search(self, body: dict) -> dict:
        found = [i for i in self.items if i["collection"] in body["collections"]]
        if "intersects" in body:
            place = shape(body["intersects"])
            found = [i for i in found if shape(i["geometry"]).intersects(place)]
        if body.get("datetime"):
            first, last = (dt.datetime.fromisoformat(t) for t in body["datetime"].split("/"))
            found = [
                i
                for i in found
                if first <= dt.datetime.fromisoformat(i["properties"]["datetime"]) <= last
            ]
        for name, rule in body.get("query", {}).items():
            found = [i for i in found if i["properties"].get(name, 0) <= rule["lte"]]
        start = int(body.get("token", 0))
        links = []
        if start + PAGE < len(found):
            more = {**body, "token": str(start + PAGE)}
            link = {"rel": "next", "method": "POST", "href": f"{self.base}/search", "body": more}
            links.append(link)
        page = json.dumps(found[start : start + PAGE]).replace("{base}", self.base)
        return {"type": "FeatureCollection", "features": json.loads(page), "links": links}

    def landing(self) -> dict:
        def link(rel: str, path: str, **more: str) -> dict:
            return {"rel": rel, "href": f"{self.base}{path}", "type": "application/json", **more}

        return {
            "type": "Catalog", "id": "loopback", "description": "for tests",
            "stac_version": "1.0.0",
            "conformsTo": CONFORMS,
            "links": [
                link("root", "/"), link("self", "/"), link("conformance", "/conformance"),
                link("data", "/collections"), link("search", "/search", method="GET"),
                link("search", "/search", method="POST"),
            ],
        }  # fmt: skip


class _Answer(BaseHTTPRequestHandler):
    site: StacServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self._answer("GET", parts.path, parse_qs(parts.query), None)

    def do_HEAD(self) -> None:
        parts = urlsplit(self.path)
        self._answer("HEAD", parts.path, parse_qs(parts.query), None)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer("POST", self.path, {}, body)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, method: str, path: str, query: dict, body: dict | None) -> None:
        site = self.site
        time.sleep(site.latency_s)
        fault = site.take_fault(method, path)
        self._path, self._method, self._query = path, method, query
        if fault is not None and isinstance(fault.what, int):
            return self._send(fault.what, b"no", fault.headers)
        if fault is not None and fault.what == "drop":
            self.close_connection = True
            return None
        truncate = fault is not None
        if path.startswith("/files/"):
            return self._file(path.removeprefix("/files/"), query, truncate)
        made = self._document(method, path, body)
        if made is None:
            return self._send(404, b"{}")
        return self._send(200, json.dumps(made).encode(), truncate=truncate)

    def _document(self, method: str, path: str, body: dict | None) -> dict | None:
        site = self.site
        if path == "/search" and body is not None:
            return site.search(body)
        if path in ("", "/"):
            return site.landing()
        if path == "/conformance":
            return {"conformsTo": CONFORMS}
        if path.startswith("/token/"):
            return site.new_token()
        if path == "/collections":
            ids = sorted({i["collection"] for i in site.items})
            return {"collections": [{"id": i} for i in ids], "links": []}
        return None

    def _file(self, name: str, query: dict, truncate: bool) -> None:
        file = self.site.folder / name
        if not self.site.admits(query):
            return self._send(403, b"expired")
        if not file.is_file():
            return self._send(404, b"none")
        length = file.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, file.read_bytes(), truncate=truncate)
        first = int(wanted[1])
        last = min(int(wanted[2] or length - 1), length - 1)
        if first >= length:
            return self._send(416, b"")
        headers = {"Content-Range": f"bytes {first}-{last}/{length}"}
        with file.open("rb") as opened:
            opened.seek(first)
            content = opened.read(last + 1 - first)
        return self._send(206, content, headers, truncate=truncate)

    def _send(
        self, status: int, content: bytes, headers: dict | None = None, truncate: bool = False
    ) -> None:
        sent = content[: len(content) // 2] if truncate else content
        sent = b"" if self._method == "HEAD" else sent
        self.site.asked.append(Asked(self._method, self._path, self._query, status, len(sent)))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)
        self.close_connection = self.close_connection or truncate
