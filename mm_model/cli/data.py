"""What `mm data` does."""

from __future__ import annotations

import json
import os
import sys
import webbrowser
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mm_model.catalogue.write import page_of
from mm_model.config import load_params
from mm_model.data.drift import HEADS, MOST_DISTANCE, drift
from mm_model.data.files import write_atomically
from mm_model.data.store import PatchStore
from mm_model.errors import DataError


def show_data(pipeline: Path, out: Path | None) -> None:
    """Say where the page of the data lies, and open it where there is a screen.

    Args:
        pipeline: folder that holds params.yaml.
        out: file to copy the page to; it needs nothing but itself.

    Raises:
        DataError: there is no catalogue, or it describes other data.
    """
    data = pipeline / "data"
    page = page_of(data / "catalogue", data / "patches", data / "splits.parquet").resolve()
    if out is not None:
        write_atomically(out, page.read_bytes())
        page = out.resolve()
    Console(soft_wrap=True).print(str(page))
    has_screen = sys.platform != "linux" or any(map(os.environ.get, ("DISPLAY", "WAYLAND_DISPLAY")))
    if sys.stdout.isatty() and has_screen:
        webbrowser.open(page.as_uri())


def show_drift(batch: Path) -> None:
    """A table of distances and a verdict; raises DataError if a band or a legend has drifted."""
    statistics = Path("data/stats.json")
    if not statistics.is_file():
        raise DataError(f"{statistics} does not exist", remedy="run the stage stats")
    found = drift(PatchStore(batch), json.loads(statistics.read_text()), load_params().selected)
    if not found:
        raise DataError(f"drift of {batch}", got="no valid pixel of an active modality")
    table = Table(*HEADS)
    for one in found:
        table.add_row(*one.cells)
    Console().print(table)
    drifted = [f"{d.modality} {d.what} ({d.distance:.2f})" for d in found if d.has_drifted]
    if drifted:
        raise DataError(
            f"{batch} has drifted from the training set",
            got=", ".join(drifted),
            allowed=f"distances up to {MOST_DISTANCE:g}",
            remedy="look at its units and places, or train on patches like it",
        )
