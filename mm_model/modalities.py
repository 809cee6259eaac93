"""The modalities, declared once; shapes, units, losses, files and legends are derived from here.

Behaviour differs by `Quantity` (what a band measures) and `Kind` (number or class), never by a
modality's name. To add one, add an entry to `MODALITIES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from types import MappingProxyType, ModuleType
from typing import Any

from mm_model.errors import ConfigError

# Side of the box whose mean is the level of a quantity that `splits_relief`; odd, so that it has a
# middle. Chosen, not measured: half of a training patch of 64 px.
LEVEL_PX = 33


class Kind(StrEnum):
    """How values may be treated: averaged and regressed, or counted and classified."""

    CONTINUOUS = "continuous"
    CATEGORICAL = "categorical"


class Transform(StrEnum):
    """Variance-stabilising map from physical units to model space, before standardisation."""

    LINEAR = "linear"
    SQRT = "sqrt"
    ASINH = "asinh"
    ONE_HOT = "one_hot"

    def forward(self, values: Any, center: Any, scale: Any, xp: ModuleType) -> Any:
        """Stabilised values; `xp` is numpy or torch, so that the formula stands once.

        Only ASINH uses `center` and `scale` (physical units). Not defined for ONE_HOT.
        """
        if self is Transform.SQRT:
            return xp.sqrt(xp.clip(values, 0, None))
        if self is Transform.ASINH:
            return xp.asinh((values - center) / scale)
        return values

    def inverse(self, values: Any, center: Any, scale: Any, xp: ModuleType) -> Any:
        """Physical values again; the inverse of `forward` on the valid range."""
        if self is Transform.SQRT:
            return xp.square(xp.clip(values, 0, None))
        if self is Transform.ASINH:
            return center + scale * xp.sinh(values)
        return values


class Quantity(StrEnum):
    """What a modality's bands measure."""

    REFLECTANCE = "reflectance"
    BACKSCATTER = "backscatter"
    ELEVATION = "elevation"
    TEMPERATURE = "temperature"
    LAND_COVER = "land_cover"

    @property
    def traits(self) -> QuantityTraits:
        return _TRAITS[self]


@dataclass(frozen=True)
class QuantityTraits:
    """Facts that hold for every modality of one quantity.

    Attributes:
        unit: the physical unit, as written into files ("1" is dimensionless).
        valid_range: least and greatest physical value; what lies outside is an error.
        plausible_median: where the median of a layer of some size lies; it tells linear power from
            dB, digital numbers from reflectance and Celsius from kelvin.
        transform: how model space sees it.
        splits_relief: whether model space has two channels a band, its level (the mean over a box
            of `LEVEL_PX`) and its relief (what that leaves). For quantities whose texture is small
            beside their range; the transform must take negative values, too.
    """

    unit: str
    kind: Kind
    valid_range: tuple[float, float]
    plausible_median: tuple[float, float]
    transform: Transform
    splits_relief: bool = False


_TRAITS: Mapping[Quantity, QuantityTraits] = MappingProxyType(
    {
        Quantity.REFLECTANCE: QuantityTraits(
            "1", Kind.CONTINUOUS, (0.0, 2.0), (0.0, 1.3), Transform.SQRT
        ),
        Quantity.BACKSCATTER: QuantityTraits(
            "dB", Kind.CONTINUOUS, (-60.0, 40.0), (-45.0, -1.0), Transform.LINEAR
        ),
        Quantity.ELEVATION: QuantityTraits(
            "m",
            Kind.CONTINUOUS,
            (-500.0, 9000.0),
            (-500.0, 9000.0),
            Transform.ASINH,
            splits_relief=True,
        ),
        Quantity.TEMPERATURE: QuantityTraits(
            "K", Kind.CONTINUOUS, (150.0, 400.0), (180.0, 350.0), Transform.LINEAR
        ),
        Quantity.LAND_COVER: QuantityTraits(
            "class", Kind.CATEGORICAL, (1, 255), (1, 255), Transform.ONE_HOT
        ),
    }
)


@dataclass(frozen=True)
class Band:
    """One band of a modality.

    Attributes:
        name: short name, as written into files.
        center_nm, width_nm: centre and full width of an optical or thermal band.
        polarisation: transmit and receive polarisation of a radar band.
    """

    name: str
    center_nm: float | None = None
    width_nm: float | None = None
    polarisation: str | None = None


@dataclass(frozen=True)
class LandCoverClass:
    """A class of a categorical modality: its code on disk, its name and its colour (#rrggbb)."""

    code: int
    name: str
    color: str


@dataclass(frozen=True)
class Modality:
    """A kind of image of the ground, with all that is derived from knowing it.

    Attributes:
        name: identifier in parameters, files and the HTTP interface.
        title: how people call it.
        gsd_m: native ground sampling distance, in metres.
        display_range: physical values shown as black and white (or the ends of the colour map).
        color_map: a matplotlib colour map, for single continuous bands.
        classes: for categorical modalities, every class; code 0 is nodata and no class.
    """

    name: str
    title: str
    quantity: Quantity
    bands: tuple[Band, ...]
    gsd_m: float
    display_range: tuple[float, float]
    color_map: str = "gray"
    classes: tuple[LandCoverClass, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ConfigError("modality name", got=self.name, allowed="an identifier")
        if not self.bands or len({b.name for b in self.bands}) != len(self.bands):
            raise ConfigError(
                f"bands of {self.name}", got=self.band_names, allowed="one or more, unique"
            )
        codes = [c.code for c in self.classes]
        if (self.kind is Kind.CATEGORICAL) != bool(codes):
            raise ConfigError(
                f"classes of {self.name}", got=codes, allowed="classes if and only if categorical"
            )
        if codes and (len(self.bands) != 1 or len(set(codes)) != len(codes) or min(codes) < 1):
            raise ConfigError(
                f"classes of {self.name}",
                got=codes,
                allowed="one band, unique codes from 1 to 255 (0 is nodata)",
            )
        low, high = self.display_range
        if not low < high:
            raise ConfigError(f"display_range of {self.name}", got=(low, high), allowed="low<high")

    @property
    def kind(self) -> Kind:
        return self.quantity.traits.kind

    @property
    def is_categorical(self) -> bool:
        return self.kind is Kind.CATEGORICAL

    @property
    def unit(self) -> str:
        return self.quantity.traits.unit

    @property
    def transform(self) -> Transform:
        return self.quantity.traits.transform

    @property
    def splits_relief(self) -> bool:
        return self.quantity.traits.splits_relief

    @property
    def valid_range(self) -> tuple[float, float]:
        return self.quantity.traits.valid_range

    @property
    def band_names(self) -> tuple[str, ...]:
        return tuple(b.name for b in self.bands)

    @property
    def class_codes(self) -> tuple[int, ...]:
        """Codes in the order of the model's class channels."""
        return tuple(c.code for c in self.classes)

    @property
    def channels(self) -> int:
        """Number of channels in model space: one a class, or one a band.

        Where the quantity `splits_relief`, two a band: all levels, then all reliefs.
        """
        if self.is_categorical:
            return len(self.classes)
        return len(self.bands) * (2 if self.splits_relief else 1)

    @property
    def dtype(self) -> str:
        """NumPy type of values on disk and over HTTP."""
        return "uint8" if self.is_categorical else "float32"

    @property
    def nodata(self) -> float:
        """What files hold where nothing is known (in memory it is a mask)."""
        return 0 if self.is_categorical else float("nan")

    @property
    def color_table(self) -> dict[int, tuple[int, int, int, int]]:
        """Red, green, blue and opacity by code; empty where values are numbers."""
        shades = {c.code: bytes.fromhex(c.color[1:]) for c in self.classes}
        return {code: (shade[0], shade[1], shade[2], 255) for code, shade in shades.items()}

    @property
    def file_tags(self) -> dict[str, str]:
        """Tags that tell what a file holds."""
        classes = {"CLASSES": ",".join(f"{c.code} {c.name}" for c in self.classes)}
        return {"MODALITY": self.name, **(classes if self.classes else {})}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy, from which `from_dict` rebuilds an equal modality."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Modality:
        """Rebuild from `to_dict`; raises ConfigError that names an unknown or missing key."""
        try:
            return cls(
                **{
                    **data,
                    "quantity": Quantity(data["quantity"]),
                    "bands": tuple(Band(**b) for b in data["bands"]),
                    "display_range": tuple(data["display_range"]),
                    "classes": tuple(LandCoverClass(**c) for c in data["classes"]),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("modality record", got=error, allowed="what to_dict wrote") from error


# ESA WorldCover v200: codes, names and colours of its product user manual.
WORLDCOVER = (
    LandCoverClass(10, "tree cover", "#006400"),
    LandCoverClass(20, "shrubland", "#ffbb22"),
    LandCoverClass(30, "grassland", "#ffff4c"),
    LandCoverClass(40, "cropland", "#f096ff"),
    LandCoverClass(50, "built-up", "#fa0000"),
    LandCoverClass(60, "bare or sparse vegetation", "#b4b4b4"),
    LandCoverClass(70, "snow and ice", "#f0f0f0"),
    LandCoverClass(80, "permanent water", "#0064c8"),
    LandCoverClass(90, "herbaceous wetland", "#0096a0"),
    LandCoverClass(95, "mangroves", "#00cf75"),
    LandCoverClass(100, "moss and lichen", "#fae6a0"),
)

_DECLARED = (
    Modality(
        "rgb",
        "Surface reflectance, red green blue",
        Quantity.REFLECTANCE,
        # Sentinel-2 MSI bands B04, B03, B02: centre and width of S2A.
        (Band("red", 664.6, 31), Band("green", 559.8, 36), Band("blue", 492.4, 66)),
        gsd_m=10,
        display_range=(0.0, 0.35),
    ),
    Modality(
        "nir",
        "Surface reflectance, near infrared",
        Quantity.REFLECTANCE,
        (Band("nir", 832.8, 106),),
        gsd_m=10,
        display_range=(0.0, 0.6),
    ),
    Modality(
        "sar",
        "Radar backscatter, C band",
        Quantity.BACKSCATTER,
        (Band("VV", polarisation="VV"), Band("VH", polarisation="VH")),
        gsd_m=10,
        display_range=(-25.0, 0.0),
    ),
    Modality(
        "dem",
        "Elevation above sea level",
        Quantity.ELEVATION,
        (Band("elevation"),),
        gsd_m=30,
        display_range=(0.0, 600.0),
        color_map="cividis",
    ),
    Modality(
        "map",
        "Land cover (ESA WorldCover classes)",
        Quantity.LAND_COVER,
        (Band("class"),),
        gsd_m=10,
        display_range=(0, 100),
        classes=WORLDCOVER,
    ),
    Modality(
        "pan",
        "Surface reflectance, panchromatic",
        Quantity.REFLECTANCE,
        # Landsat 8 OLI band 8.
        (Band("pan", 590, 172),),
        gsd_m=15,
        display_range=(0.0, 0.35),
    ),
    Modality(
        "tir",
        "Brightness temperature, thermal infrared",
        Quantity.TEMPERATURE,
        # Landsat 8 TIRS band 10.
        (Band("tir", 10895, 590),),
        gsd_m=100,
        display_range=(260.0, 325.0),
        color_map="inferno",
    ),
    Modality(
        "ms",
        "Surface reflectance, red edge and short-wave infrared",
        Quantity.REFLECTANCE,
        # Sentinel-2 MSI bands of 20 m: B05, B06, B07, B8A, B11, B12.
        (
            Band("B05", 704.1, 15),
            Band("B06", 740.5, 15),
            Band("B07", 782.8, 20),
            Band("B8A", 864.7, 21),
            Band("B11", 1613.7, 91),
            Band("B12", 2202.4, 175),
        ),
        gsd_m=20,
        display_range=(0.0, 0.5),
    ),
)

MODALITIES: Mapping[str, Modality] = MappingProxyType({m.name: m for m in _DECLARED})


def select(
    names: Sequence[str], declared: Mapping[str, Modality] = MODALITIES
) -> tuple[Modality, ...]:
    """The named modalities, in the order given.

    Raises:
        ConfigError: a name is unknown or given twice, or there is none.
    """
    unknown = [n for n in names if n not in declared]
    if unknown or not names or len(set(names)) != len(names):
        raise ConfigError(
            "modalities", got=list(names), allowed=f"one or more of {sorted(declared)}, each once"
        )
    return tuple(declared[n] for n in names)


def channel_slices(modalities: Iterable[Modality]) -> dict[str, slice]:
    """Where each modality's channels lie in the stacked model-space tensor [B, C, H, W]."""
    slices, start = {}, 0
    for modality in modalities:
        slices[modality.name] = slice(start, start + modality.channels)
        start += modality.channels
    return slices
