"""Squares of ground to look for: around named points, or all over an area."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shapely
from shapely.geometry import mapping, shape
from shapely.geometry.base import BaseGeometry

from mm_model.data.georeference import transform_xy, utm_zone
from mm_model.data.sources.stac.request import NAME_PATTERN, Request
from mm_model.errors import ConfigError
from mm_model.geo.grid import Grid

# An area of a whole country is a mistake in side_m, or a job to be split.
_MOST_PLACES = 20_000


@dataclass(frozen=True)
class Place:
    """A square on the lattice of its UTM zone.

    Attributes:
        name: unique; of a lattice square, its zone and corner.
        crs: the UTM zone.
        left, top: corner in metres.
        side_m: of the square.
    """

    name: str
    crs: str
    left: float
    top: float
    side_m: float

    def grid(self, gsd_m: float) -> Grid:
        side = round(self.side_m / gsd_m)
        return Grid(self.crs, (gsd_m, 0.0, self.left, 0.0, -gsd_m, self.top), side, side)

    @property
    def outline(self) -> BaseGeometry:
        """In degrees of longitude and latitude."""
        grid = self.grid(self.side_m)
        corners = [grid.xy(r, c) for r, c in ((0, 0), (0, 1), (1, 1), (1, 0))]
        xs, ys = transform_xy(self.crs, "EPSG:4326", *zip(*corners, strict=True))
        return shapely.Polygon(list(zip(xs, ys, strict=True)))

    @property
    def geojson(self) -> dict[str, Any]:
        return dict(mapping(self.outline))


def places_of(request: Request) -> tuple[Place, ...]:
    """All places of a request, sorted by name.

    Raises:
        ConfigError: the area is no GeoJSON, lies nowhere on Earth, or makes no or too many places.
    """
    search, side = request.search, request.search.side_m
    if search.area is None:
        found = {n: _around(n, lon, lat, side) for n, (lon, lat) in search.places.items()}
    else:
        path = request.folder / search.area
        found = {}
        for index, feature in enumerate(_features(path)):
            for place in _of_feature(feature, index, side, path):
                if found.setdefault(place.name, place) != place:
                    raise ConfigError(
                        f"{path}: name of a place",
                        got=f"{place.name} twice",
                        allowed="each name once",
                    )
                if len(found) > _MOST_PLACES:
                    raise ConfigError(
                        f"{path}: places",
                        got=f"more than {_MOST_PLACES} of {side:g} m",
                        remedy="choose a smaller area or a larger side_m",
                    )
    return tuple(found[name] for name in sorted(found))


def _around(name: str, lon: float, lat: float, side_m: float) -> Place:
    """The square around a point, moved so that its corner is a multiple of 60 m.

    That is a pixel's corner at 10, 20, 30 and 60 m, where Sentinel-2's own pixels begin, too.
    """
    _check_lonlat(name, lon, lat)
    crs = _zone(lon, lat)
    (x,), (y,) = transform_xy("EPSG:4326", crs, [lon], [lat])
    left = round((x - side_m / 2) / 60) * 60
    top = round((y + side_m / 2) / 60) * 60
    return Place(name, crs, float(left), float(top), side_m)


def _of_feature(
    feature: Mapping[str, Any], index: int, side_m: float, path: Path
) -> Iterator[Place]:
    try:
        area = shape(feature["geometry"])
    except (KeyError, TypeError, ValueError, AttributeError, shapely.errors.ShapelyError) as error:
        raise ConfigError(f"{path}: feature {index}", got=error, allowed="a geometry") from None
    if area.is_empty:
        raise ConfigError(f"{path}: feature {index}", got="nothing", allowed="a geometry")
    west, south, east, north = area.bounds
    _check_lonlat(f"{path}: feature {index}", west, south)
    _check_lonlat(f"{path}: feature {index}", east, north)
    if area.geom_type == "Point":
        name = str((feature.get("properties") or {}).get("name") or f"point-{index:04d}")
        if not re.fullmatch(NAME_PATTERN, name):
            raise ConfigError(
                f"{path}: name of feature {index}",
                got=repr(name[:80]),
                allowed="letters, digits, and . _ - behind the first",
            )
        yield _around(name, area.x, area.y, side_m)
        return
    crs = _zone(area.centroid.x, area.centroid.y)
    plane = shapely.transform(area, lambda at: _project(at, crs))
    left, bottom, right, top = plane.bounds
    shapely.prepare(plane)
    for row in range(math.floor(bottom / side_m), math.ceil(top / side_m)):
        for col in range(math.floor(left / side_m), math.ceil(right / side_m)):
            x, y = col * side_m, (row + 1) * side_m
            if plane.intersects(shapely.box(x, y - side_m, x + side_m, y)):
                name = f"{crs.removeprefix('EPSG:')}-{x:07.0f}-{y:08.0f}"
                yield Place(name, crs, float(x), float(y), side_m)


def _project(at: Any, crs: str) -> Any:
    xs, ys = transform_xy("EPSG:4326", crs, at[:, 0].tolist(), at[:, 1].tolist())
    return list(zip(xs, ys, strict=True))


def _features(path: Path) -> list[Mapping[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", remedy="mend `area` in search.yaml") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not GeoJSON", got=error) from None
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "FeatureCollection" and content.get("features"):
        return list(content["features"])
    if kind == "Feature":
        return [content]
    if kind in {"Point", "Polygon", "MultiPolygon"}:
        return [{"geometry": content}]
    raise ConfigError(
        f"{path}: GeoJSON",
        got=kind or "no type",
        allowed="a FeatureCollection, Feature, Point, Polygon or MultiPolygon",
    )


def _zone(lon: float, lat: float) -> str:
    return utm_zone(Grid("EPSG:4326", (1e-6, 0.0, lon, 0.0, -1e-6, lat), 1, 1))


def _check_lonlat(name: str, lon: float, lat: float) -> None:
    if not (-180 <= lon <= 180 and -80 <= lat <= 84):
        raise ConfigError(
            f"{name}: position",
            got=f"{lon:g}, {lat:g}",
            allowed="longitude -180 to 180, latitude -80 to 84 (UTM), in this order",
        )
