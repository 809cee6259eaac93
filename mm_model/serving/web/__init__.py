"""The page at `/`: files as they are, no build step. It speaks the public HTTP interface.

`static/index.html` is what people see, `static/main.js` what happens; `vendor/` holds what is not
ours, put there by npm (`package.json` beside this file says what and how).
"""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

from mm_model.serving.access import PAGE_FILES

FOLDER = Path(__file__).parent / "static"


def mount(app: Starlette) -> None:
    """Have the application answer `/` with the page."""
    app.add_route("/", _index, include_in_schema=False)
    app.mount(PAGE_FILES, StaticFiles(directory=FOLDER))


async def _index(_: Request) -> FileResponse:
    return FileResponse(FOLDER / "index.html")
