"""What is wanted (search.yaml) and what products and catalogues mean (products.yaml), checked."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from mm_model.config import Fraction, PositiveFloat, PositiveInt, Section, parse, read_yaml
from mm_model.data.align import OutOfRange
from mm_model.data.sources.manifest import LINEAR_POWER
from mm_model.errors import ConfigError
from mm_model.modalities import MODALITIES, Modality, Quantity

SEARCH_FILE, LOCK_FILE = "search.yaml", "items.lock.json"
_DECLARED = Path(__file__).with_name("products.yaml")

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
OffsetRule = Literal["declared", "baseline", "product_metadata", "applied_flag", "darkest_pixels"]


class BaselineOffset(Section):
    """The offset that a product's numbers have from a processing baseline on."""

    from_: Annotated[str, StringConstraints(pattern=r"^\d\d\.\d\d$")] = Field(alias="from")
    offset: float


class Hidden(Section):
    """What covers the ground: codes of a band, or bits of it."""

    band: str
    classes: tuple[int, ...] = ()
    bits: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _says_one(self) -> Hidden:
        if bool(self.classes) == bool(self.bits):
            raise ValueError("either classes or bits")
        return self


class Product(Section):
    """What the numbers of a product mean, wherever they are served.

    Attributes:
        unit: of stored * scale + offset; "power" for linear backscatter.
        nodata: stored values that mean nothing, beside what the file declares.
        baseline_offset: of numbers that change with the processing baseline.
        divide_by_sine_of: property of an item with an elevation in degrees; for reflectance that
            is stored as if the sun stood overhead.
        native_gsd_m: distance at which it was measured, where the files' pixels are finer.
        hidden: where something is in the way.
        where: properties that an item must have.
        classes: code in the file → code of the modality, 0 for none.
        layers: modality → the product's bands, in the modality's order.
    """

    licence: str
    attribution: str
    unit: str
    nodata: tuple[float, ...] = ()
    scale: float = 1.0
    offset: float = 0.0
    baseline_offset: BaselineOffset | None = None
    divide_by_sine_of: str | None = None
    native_gsd_m: PositiveFloat | None = None
    hidden: Hidden | None = None
    where: dict[str, Any] = Field({})
    timeless: bool = False
    classes: dict[int, int] | None = None
    out_of_range: OutOfRange = "error"
    layers: dict[str, tuple[str, ...]]


class Sign(Section):
    """Where a token comes from that is appended to addresses."""

    token_url: str = Field(description="{collection} stands for the collection's id")
    key_header: str | None = None
    key_variable: str | None = Field(None, description="environment variable with the key")


class Collection(Section):
    """Where a catalogue keeps a product.

    Attributes:
        product: its name under `products`; that of this entry if left out.
        collection: id in the catalogue.
        assets: band of the product → asset, or asset#number for one of its bands.
        offset: how to tell which numbers are served, the first rule that can tell; for products
            with a `baseline_offset`.
        metadata: asset of the product's own XML, for the rule `product_metadata`.
        applied_flag: property that is true where the offset was taken off.
    """

    product: str | None = None
    collection: str
    assets: dict[str, str]
    offset: tuple[OffsetRule, ...] = ()
    metadata: str | None = None
    applied_flag: str | None = None


class Catalogue(Section):
    """A STAC API."""

    url: Annotated[str, StringConstraints(pattern=r"^https?://")]
    sign: Sign | None = None
    rewrite: dict[str, str] = Field({}, description="beginning of an address → what replaces it")
    collections: dict[Name, Collection]


class Declared(Section):
    """products.yaml, and what search.yaml adds to it."""

    products: dict[Name, Product] = Field({})
    catalogues: dict[Name, Catalogue] = Field({})


class SearchFile(Section):
    """search.yaml."""

    catalogue: Name
    products: Annotated[dict[str, Name], Field(min_length=1)] = Field(
        description="modality → entry under the catalogue's collections"
    )
    area: Path | None = Field(None, description="GeoJSON, relative to search.yaml")
    places: dict[Name, tuple[float, float]] = Field({}, description="name → longitude, latitude")
    side_m: PositiveFloat = Field(description="side of the square that a place is")
    dates: tuple[dt.date, dt.date] = Field(description="first and last day")
    acquisitions: PositiveInt = Field(description="of each place, spread over the dates")
    max_cloud: Annotated[float, Field(ge=0, le=100)] = Field(description="of a scene, percent")
    min_clear: Fraction = Field(description="clear share of the place that is enough")
    tolerance_days: Annotated[float, Field(ge=0)] = Field(description="between paired images")
    offsets: dict[str, float] = Field({}, description="item id → offset, where nothing else tells")
    exclude: tuple[str, ...] = Field((), description="ids of items that are not to be used")
    declare: Declared = Declared()

    @field_validator("dates")
    @classmethod
    def _in_order(cls, dates: tuple[dt.date, dt.date]) -> tuple[dt.date, dt.date]:
        if dates[0] > dates[1]:
            raise ValueError(f"the first day is after the last: {dates[0]}, {dates[1]}")
        return dates

    @model_validator(mode="after")
    def _is_somewhere(self) -> SearchFile:
        if bool(self.area) == bool(self.places):
            raise ValueError("either area (a GeoJSON file) or places (name: [longitude, latitude])")
        return self


class Request(Section):
    """A search with everything that it names resolved.

    Attributes:
        folder: of search.yaml, and of the lock.
        catalogue_name, catalogue: where to search.
        collections: entry → what the catalogue says of it, for those that are used.
        products: entry → its product.
        layers: modality → entry, the reference first: the first whose images can be cloudy, else
            the first that is not timeless.
    """

    folder: Path
    search: SearchFile
    catalogue_name: str
    catalogue: Catalogue
    collections: dict[str, Collection]
    products: dict[str, Product]
    layers: dict[str, str]

    @property
    def reference(self) -> str | None:
        """The entry whose acquisitions the others are paired with; None if all is timeless."""
        moving = [e for e in dict.fromkeys(self.layers.values()) if not self.products[e].timeless]
        cloudy = [entry for entry in moving if self.products[entry].hidden is not None]
        return next(iter([*cloudy, *moving]), None)

    def bands(self, entry: str) -> tuple[str, ...]:
        """All bands of an entry that are needed, those that hide included."""
        product = self.products[entry]
        wanted = [b for m, e in self.layers.items() if e == entry for b in product.layers[m]]
        hidden = [product.hidden.band] if product.hidden else []
        return tuple(dict.fromkeys([*wanted, *hidden]))


def load_request(
    folder: Path,
    modalities: Sequence[Modality],
    declared: Mapping[str, Modality] = MODALITIES,
) -> Request:
    """Read and check search.yaml of a folder, for the active modalities.

    Raises:
        ConfigError: it is missing, is no YAML, or says something that cannot be.
    """
    path = folder / SEARCH_FILE
    search = parse(SearchFile, read_yaml(path), str(path))
    known = declared_products()
    products = {**known.products, **search.declare.products}
    catalogues = {**known.catalogues, **search.declare.catalogues}
    catalogue = _pick(catalogues, search.catalogue, f"{path}: catalogue")
    unknown = sorted(set(search.products) - set(declared))
    if unknown:
        raise ConfigError(f"{path}: products", got=unknown, allowed=sorted(declared))
    layers = {m.name: search.products[m.name] for m in modalities if m.name in search.products}
    if not layers:
        raise ConfigError(
            f"{path}: products",
            got=sorted(search.products),
            allowed=f"one of the active modalities {[m.name for m in modalities]}",
        )
    collections, used = {}, {}
    for name, entry in layers.items():
        where = f"{path}: products.{name}"
        collection = _pick(catalogue.collections, entry, where)
        product = _pick(products, collection.product or entry, where)
        _check(where, declared[name], product, collection)
        collections[entry], used[entry] = collection, product
    return Request(
        folder=folder,
        search=search,
        catalogue_name=search.catalogue,
        catalogue=catalogue,
        collections=collections,
        products=used,
        layers=layers,
    )


def licences(folder: Path, modalities: Sequence[Modality]) -> dict[str, dict[str, str]]:
    """Product → its licence and attribution, of a folder with search.yaml."""
    request = load_request(folder, modalities)
    return {
        entry: {"licence": product.licence, "attribution": product.attribution}
        for entry, product in request.products.items()
    }


@cache
def declared_products() -> Declared:
    """products.yaml."""
    return parse(Declared, read_yaml(_DECLARED), str(_DECLARED))


def _pick(choices: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in choices:
        raise ConfigError(where, got=name, allowed=sorted(choices))
    return choices[name]


def _check(where: str, modality: Modality, product: Product, collection: Collection) -> None:
    """What the schema cannot say, since it depends on the modality."""
    if modality.name not in product.layers:
        raise ConfigError(where, got="a product without it", allowed=sorted(product.layers))
    bands = product.layers[modality.name]
    if len(bands) != len(modality.bands):
        raise ConfigError(where, got=f"bands {list(bands)}", allowed=f"{len(modality.bands)} bands")
    needed = [*bands, *([product.hidden.band] if product.hidden else [])]
    missing = sorted(set(needed) - set(collection.assets))
    if missing:
        raise ConfigError(where, got=f"no asset for {missing}", remedy="declare it under assets")
    units = [modality.unit, *([LINEAR_POWER] if _is_radar(modality) else [])]
    if product.unit not in units:
        raise ConfigError(f"{where}: unit", got=product.unit, allowed=units)
    if (product.classes is not None) != modality.is_categorical:
        raise ConfigError(f"{where}: classes", allowed="for categorical modalities, and only there")
    wrong = sorted(set((product.classes or {}).values()) - {0, *modality.class_codes})
    if wrong:
        raise ConfigError(f"{where}: classes", got=wrong, allowed=modality.class_codes)
    if (product.baseline_offset is not None) != bool(collection.offset):
        raise ConfigError(
            f"{where}: offset", allowed="rules if and only if the product has a baseline_offset"
        )


def _is_radar(modality: Modality) -> bool:
    return modality.quantity is Quantity.BACKSCATTER
