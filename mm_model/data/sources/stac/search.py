"""Which items a request gets: asked of the catalogue once, then read from the lock."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

import pystac
import requests
import shapely
from pystac_client import Client
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from rich.progress import Progress
from shapely import make_valid
from shapely.geometry import shape
from urllib3.util.retry import Retry

from mm_model.data.remote import Patience
from mm_model.data.sources.stac.lock import (
    Lock,
    PinnedAcquisition,
    PinnedItem,
    PinnedPlace,
    asked,
    read_lock,
    write_lock,
)
from mm_model.data.sources.stac.offsets import baseline_of, find_offset
from mm_model.data.sources.stac.places import Place
from mm_model.data.sources.stac.reading import clear_share
from mm_model.data.sources.stac.request import Request
from mm_model.data.sources.stac.signing import Signer
from mm_model.errors import ConfigError, DataError, ServiceError

_AT_ONCE = 8  # places; a search waits for distant servers most of its time
_SAVE_EVERY = 20  # places, of which a kill may cost the answers
_CANDIDATES = 5  # whose clouds over the place are looked at, for one choice
_WHOLE = 0.99
_SLIVER = 1e-4  # of a place; an item that adds less is not worth a request
_PAGE = 100
_CLOUD = "eo:cloud_cover"
_ORBIT = ("sat:relative_orbit", "landsat:wrs_path")


@dataclass(frozen=True)
class _Pass:
    """Items of one collection that were taken in one pass over a place."""

    items: tuple[Mapping[str, Any], ...]
    at: dt.datetime
    coverage: float
    cloud: float

    @property
    def name(self) -> str:
        return str(self.items[0]["id"])


def pinned(request: Request, places: Sequence[Place], patience: Patience) -> Lock:
    """The items of every place, from the lock where it has them, else searched and written there.

    Raises:
        ServiceError: the catalogue or a server of images does not answer; what was found until
            then is in the lock.
        ConfigError: the catalogue does not have a collection.
        DataError: nothing was found of a product, for no place.
    """
    lock = read_lock(request)
    keys = {place.name: asked(request, place) for place in places}
    excluded = set(request.search.exclude)
    found = {
        name: pins
        for name, pins in lock.places.items()
        if pins.asked == keys.get(name) and not pins.ids & excluded
    }
    missing = [place for place in places if place.name not in found]

    def now() -> Lock:
        return Lock(catalogue=request.catalogue_name, url=request.catalogue.url, places=found)

    if missing:
        finder = _Finder(request, patience)
        with Progress() as progress, ThreadPoolExecutor(_AT_ONCE) as pool:
            task = progress.add_task("searching", total=len(missing))
            searches = {pool.submit(finder.find, p, keys[p.name]): p.name for p in missing}
            try:
                for count, search in enumerate(as_completed(searches), 1):
                    found[searches[search]] = search.result()
                    progress.advance(task)
                    if count % _SAVE_EVERY == 0:
                        write_lock(request.folder, now())
            finally:
                pool.shutdown(cancel_futures=True)
                found |= {n: s.result() for s, n in searches.items() if _succeeded(s)}
                write_lock(request.folder, now())
    elif found.keys() != lock.places.keys():
        write_lock(request.folder, now())
    _check_found(request, found)
    return now()


def _succeeded(search: Future[PinnedPlace]) -> bool:
    return not search.cancelled() and search.exception() is None


def _check_found(request: Request, found: Mapping[str, PinnedPlace]) -> None:
    for entry, product in request.products.items():
        if product.timeless:
            there = any(entry in p.timeless for p in found.values())
        else:
            there = any(entry in a.images for p in found.values() for a in p.acquisitions)
        if not there:
            search = request.search
            passed = {k: v for p in found.values() for k, v in p.passed_over.items()}
            example = next((f", such as {k}: {v}" for k, v in passed.items()), "")
            raise DataError(
                f"{request.catalogue_name}: images of {entry}",
                got=f"none for any of {len(found)} places, {len(passed)} passed over{example}",
                remedy=f"widen dates ({search.dates[0]} to {search.dates[1]}), max_cloud, min_clear"
                " or tolerance_days, choose another area, or leave the product out",
            )


class _Finder:
    """Asks one catalogue; everything about one request."""

    def __init__(self, request: Request, patience: Patience) -> None:
        self._request, self._patience = request, patience
        self._signer = Signer(request.catalogue.sign, patience)
        self._client = self._open()
        self._can_query = bool(self._client.conforms_to("QUERY"))

    def find(self, place: Place, key: str) -> PinnedPlace:
        request, search = self._request, self._request.search
        timeless: dict[str, tuple[PinnedItem, ...]] = {}
        passes: dict[str, list[_Pass]] = {}
        passed_over: dict[str, str] = {}
        for entry in dict.fromkeys(request.layers.values()):
            if not request.products[entry].timeless:
                passes[entry] = self._passes(entry, place)
                continue
            items, _ = _covering(list(self._items(entry, place, None)), place)
            made = self._pin(entry, items)
            if isinstance(made, str):
                passed_over |= {str(item["id"]): made for item in items}
            elif made:
                timeless[entry] = made
        acquisitions: list[PinnedAcquisition] = []
        if request.reference is not None:
            for first, last in _parts(search.dates, search.acquisitions):
                inside = [p for p in passes[request.reference] if first <= p.at < last]
                ranked = sorted(inside, key=lambda p: (p.coverage < _WHOLE, p.cloud, p.at, p.name))
                chosen = self._clearest(request.reference, ranked, place, passed_over)
                if chosen is None:
                    continue
                images = {request.reference: chosen[1]}
                for entry, others in passes.items():
                    if entry == request.reference:
                        continue
                    near = self._near(others, chosen[0].at)
                    paired = self._clearest(entry, near, place, passed_over)
                    if paired is not None:
                        images[entry] = paired[1]
                date = chosen[0].at.date().isoformat()
                clear = None if chosen[2] is None else round(chosen[2], 4)
                acquisitions.append(PinnedAcquisition(date=date, clear=clear, images=images))
        return PinnedPlace(
            asked=key,
            timeless=timeless,
            acquisitions=tuple(acquisitions),
            passed_over=passed_over,
        )

    def _near(self, passes: Sequence[_Pass], at: dt.datetime) -> list[_Pass]:
        most = dt.timedelta(days=self._request.search.tolerance_days)
        near = [p for p in passes if abs(p.at - at) <= most]
        return sorted(near, key=lambda p: (p.coverage < _WHOLE, abs(p.at - at), p.name))

    def _clearest(
        self,
        entry: str,
        ranked: Sequence[_Pass],
        place: Place,
        passed_over: dict[str, str],
    ) -> tuple[_Pass, tuple[PinnedItem, ...], float | None] | None:
        """The first that shows enough of the place, else the one that shows most of it."""
        product, enough = self._request.products[entry], self._request.search.min_clear
        best: tuple[_Pass, tuple[PinnedItem, ...], float | None] | None = None
        looked = 0
        for candidate in ranked:
            items = self._pin(entry, candidate.items)
            if isinstance(items, str):
                passed_over[candidate.name] = items
                continue
            if product.hidden is None:
                return candidate, items, None
            share = clear_share(items, product, place, self._sign_of(entry), self._patience)
            looked += 1
            if share > (best[2] or 0.0 if best else 0.0):
                best = (candidate, items, share)
            if share >= enough or looked == _CANDIDATES:
                break
            passed_over[candidate.name] = f"{share:.0%} of {place.name} clear"
        if best is not None:
            passed_over.pop(best[0].name, None)
        return best

    def _pin(self, entry: str, items: Sequence[Mapping[str, Any]]) -> tuple[PinnedItem, ...] | str:
        """Or why not: what the numbers of one of them mean cannot be told."""
        request, made = self._request, []
        product, collection = request.products[entry], request.collections[entry]
        for item in items:
            hrefs = {b: self._href(item, collection.assets[b]) for b in request.bands(entry)}
            offset, why = request.search.offsets.get(str(item["id"])), "search.yaml"
            if product.baseline_offset is not None and offset is None:
                extra = {
                    name: self._href(item, name)
                    for name in [collection.metadata or ""]
                    if name in item["assets"]
                }
                told = find_offset(
                    item,
                    {**hrefs, **extra},
                    product,
                    collection,
                    self._sign_of(entry),
                    self._patience,
                )
                if told is None:
                    return "nothing tells the offset of its numbers"
                offset, why = told
            sine_of = product.divide_by_sine_of
            elevation = None if sine_of is None else item["properties"].get(sine_of)
            if sine_of is not None and (elevation is None or elevation <= 0):
                return f"its {sine_of} is {elevation}"
            made.append(
                PinnedItem(
                    collection=collection.collection,
                    id=item["id"],
                    datetime=_time(item).isoformat(),
                    baseline=baseline_of(item),
                    cloud=item["properties"].get(_CLOUD),
                    offset=offset,
                    offset_from=why if offset is not None else None,
                    sun_elevation=elevation,
                    assets=hrefs,
                )
            )
        return tuple(made)

    def _sign_of(self, entry: str) -> Any:
        return self._signer.of(self._request.collections[entry].collection)

    def _href(self, item: Mapping[str, Any], asset: str) -> str:
        name, hash_, number = asset.partition("#")
        own = next((x["href"] for x in item.get("links", []) if x.get("rel") == "self"), "")
        href = urljoin(own, str(item["assets"][name]["href"]))
        for beginning, other in self._request.catalogue.rewrite.items():
            if href.startswith(beginning):
                href = other + href.removeprefix(beginning)
        return f"{href}{hash_}{number}"

    def _passes(self, entry: str, place: Place) -> list[_Pass]:
        """All passes over a place, in the order of time."""
        search, product = self._request.search, self._request.products[entry]
        slack = search.tolerance_days if entry != self._request.reference else 0.0
        groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
        for item in self._items(entry, place, slack):
            says = item["properties"]
            cloud = says.get(_CLOUD)
            if product.hidden is not None and cloud is not None and cloud > search.max_cloud:
                continue
            orbit = next((str(says[n]) for n in _ORBIT if n in says), "")
            key = (_time(item).date().isoformat(), str(says.get("platform", "")), orbit)
            groups.setdefault(key, []).append(item)
        found = []
        for group in groups.values():
            items, share = _covering(group, place)
            clouds = [float(item["properties"].get(_CLOUD) or 0.0) for item in items]
            if items:
                found.append(_Pass(tuple(items), _time(items[0]), share, max(clouds)))
        return sorted(found, key=lambda p: (p.at, p.name))

    def _items(
        self, entry: str, place: Place, slack_days: float | None
    ) -> Iterator[Mapping[str, Any]]:
        """Items over a place that have all that is needed; at any time if `slack_days` is None."""
        request, product = self._request, self._request.products[entry]
        collection, search = request.collections[entry], request.search
        needed = {collection.assets[b].partition("#")[0] for b in request.bands(entry)}
        arguments: dict[str, Any] = {}
        if slack_days is not None:
            slack = dt.timedelta(days=slack_days)
            first, last = _parts(search.dates, 1)[0]
            arguments["datetime"] = [first - slack, last + slack]
            if product.hidden is not None and self._can_query:
                arguments["query"] = {_CLOUD: {"lte": search.max_cloud}}
        for item in self._ask(collection.collection, place, arguments):
            says = item["properties"]
            fits = all(says.get(name) == value for name, value in product.where.items())
            if item["id"] in search.exclude:
                continue
            if fits and needed <= item["assets"].keys() and item.get("geometry"):
                yield item

    def _ask(
        self, collection: str, place: Place, arguments: Mapping[str, Any]
    ) -> Sequence[Mapping[str, Any]]:
        """All pages of an answer."""
        patience, cause = self._patience, ""
        for attempt in range(1, patience.attempts + 1):
            try:
                found = self._client.search(
                    collections=[collection], intersects=place.geojson, limit=_PAGE, **arguments
                )
                return [item for item in found.items_as_dicts() if _is_item(item)]
            except (APIError, requests.RequestException, json.JSONDecodeError) as error:
                cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                status = getattr(error, "status_code", None)
                if status is not None and 400 <= status < 500 and status not in {408, 425, 429}:
                    raise ConfigError(
                        f"{self._request.catalogue.url}: search in {collection}",
                        got=cause,
                        remedy="look at the catalogue's collections and mend its entry",
                    ) from None
            if attempt < patience.attempts:
                patience.wait(attempt)
        raise self._down(cause)

    def _open(self) -> Client:
        patience, url = self._patience, self._request.catalogue.url
        retry = Retry(
            total=2,
            backoff_factor=patience.first_wait_s,
            backoff_max=60,
            status_forcelist=[408, 425, 429, 500, 502, 503, 504],
            allowed_methods=None,  # a search changes nothing, POST or not
        )
        cause = ""
        for attempt in range(1, patience.attempts + 1):
            try:
                io = StacApiIO(timeout=patience.timeout_s, max_retries=retry)
                client = Client.open(url, stac_io=io)
                if not client.conforms_to("ITEM_SEARCH"):
                    raise ConfigError(f"{url}", got="no item search", allowed="a STAC API")
                return client
            except (
                APIError,
                requests.RequestException,
                json.JSONDecodeError,
                pystac.STACError,
            ) as error:
                cause = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if attempt < patience.attempts:
                patience.wait(attempt)
        raise self._down(cause)

    def _down(self, cause: str) -> ServiceError:
        return ServiceError(
            f"catalogue {self._request.catalogue_name} ({self._request.catalogue.url})",
            got=cause,
            remedy="run it again later: what was found is kept in the lock file",
        )


def _covering(
    items: Sequence[Mapping[str, Any]], place: Place
) -> tuple[list[Mapping[str, Any]], float]:
    """Those that show ground of the place which none before shows, and the share they cover.

    Of a scene that was processed twice, the newer comes first; of tiles that overlap, the one that
    shows most.
    """
    outline = place.outline
    shown = {str(i["id"]): make_valid(shape(i["geometry"])).intersection(outline) for i in items}
    order = sorted(items, key=lambda item: (-shown[str(item["id"])].area, str(item["id"])))
    order.sort(key=lambda item: baseline_of(item) or "", reverse=True)
    kept, covered = [], shapely.Polygon()
    for item in order:
        added = shown[str(item["id"])].difference(covered)
        if added.area > _SLIVER * outline.area:
            kept.append(item)
            covered = covered.union(added)
    return kept, float(covered.area / outline.area)


def _is_item(item: Mapping[str, Any]) -> bool:
    return bool(item.get("id") and item.get("assets") and "properties" in item)


def _time(item: Mapping[str, Any]) -> dt.datetime:
    says = item["properties"]
    text = says.get("datetime") or says.get("start_datetime")
    if not text:
        raise DataError(f"item {item['id']}", got="no datetime", remedy="tell the catalogue")
    at = dt.datetime.fromisoformat(str(text))
    return at if at.tzinfo else at.replace(tzinfo=dt.UTC)


def _parts(dates: tuple[dt.date, dt.date], count: int) -> list[tuple[dt.datetime, dt.datetime]]:
    """The time from the first day to the end of the last, in equal parts."""
    begin = dt.datetime.combine(dates[0], dt.time(), dt.UTC)
    end = dt.datetime.combine(dates[1], dt.time(), dt.UTC) + dt.timedelta(days=1)
    step = (end - begin) / count
    return [(begin + k * step, begin + (k + 1) * step) for k in range(count)]
