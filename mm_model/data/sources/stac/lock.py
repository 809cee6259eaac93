"""items.lock.json: which items a search has chosen, so that preparing again reads the same ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from mm_model.config import Section
from mm_model.data.files import write_atomically
from mm_model.data.sources.stac.places import Place
from mm_model.data.sources.stac.request import LOCK_FILE, Request
from mm_model.errors import ConfigError

_FORMAT: Literal[1] = 1


class PinnedItem(Section):
    """An item of a catalogue, as far as it is needed to read it again.

    Attributes:
        collection, id, datetime: in the catalogue.
        baseline: processing baseline, where the catalogue says it.
        cloud: of the scene, percent, where the catalogue says it.
        offset, offset_from: of its numbers, and what told that; None for the product's own.
        sun_elevation: by whose sine reflectance is divided, degrees; None where it is not.
        assets: band of the product → address without signature; "#n" behind it is a band's number.
    """

    collection: str
    id: str
    datetime: str
    baseline: str | None = None
    cloud: float | None = None
    offset: float | None = None
    offset_from: str | None = None
    sun_elevation: float | None = None
    assets: dict[str, str]


class PinnedAcquisition(Section):
    """Images of one place that belong together.

    Attributes:
        date: of the reference image, ISO 8601.
        clear: share of the place that the reference shows; None where nothing hides the ground.
        images: entry → its items; where they overlap, the first that knows a pixel gives it.
    """

    date: str
    clear: float | None
    images: dict[str, tuple[PinnedItem, ...]]


class PinnedPlace(Section):
    """What was found for one place.

    Attributes:
        asked: digest of what was asked; another question is another search.
        timeless: entry → items.
        acquisitions: by date.
        passed_over: items that would have been taken, and why they were not.
    """

    asked: str
    timeless: dict[str, tuple[PinnedItem, ...]]
    acquisitions: tuple[PinnedAcquisition, ...]
    passed_over: dict[str, str] = Field({})

    @property
    def ids(self) -> set[str]:
        """Of all items."""
        groups = [self.timeless, *(a.images for a in self.acquisitions)]
        return {item.id for images in groups for items in images.values() for item in items}


class Lock(Section):
    """The file."""

    format: Literal[1] = _FORMAT
    catalogue: str
    url: str
    places: dict[str, PinnedPlace]


def read_lock(request: Request) -> Lock:
    """The lock beside search.yaml; an empty one if there is none.

    Raises:
        ConfigError: it is damaged, or of another format.
    """
    path = request.folder / LOCK_FILE
    if not path.is_file():
        return Lock(catalogue=request.catalogue_name, url=request.catalogue.url, places={})
    try:
        return Lock.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(
            f"{path}",
            got=" ".join(str(error).split())[:200],
            allowed=f"a lock of format {_FORMAT}",
            remedy="restore it from version control, or delete it to search again",
        ) from None


def write_lock(folder: Path, lock: Lock) -> None:
    """Replace the lock as a whole, with its places in order."""
    content = lock.model_dump(mode="json", exclude_none=True)
    content["places"] = dict(sorted(content["places"].items()))
    for place in content["places"].values():
        for acquisition in place["acquisitions"]:
            acquisition.setdefault("clear", None)
    write_atomically(folder / LOCK_FILE, f"{json.dumps(content, indent=1)}\n".encode())


def asked(request: Request, place: Place) -> str:
    """Digest of all that decides which items are chosen for a place."""
    search = request.search
    entries = dict.fromkeys(request.layers.values())
    content = {
        "place": [place.crs, place.left, place.top, place.side_m],
        "url": request.catalogue.url,
        "rewrite": request.catalogue.rewrite,
        "entries": {e: request.collections[e].model_dump(mode="json") for e in entries},
        "bands": {e: request.bands(e) for e in entries},
        "where": {e: request.products[e].where for e in entries},
        "timeless": {e: request.products[e].timeless for e in entries},
        "sine": {e: request.products[e].divide_by_sine_of for e in entries},
        "search": search.model_dump(
            mode="json",
            exclude={"catalogue", "products", "area", "places", "side_m", "declare", "exclude"},
        ),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
