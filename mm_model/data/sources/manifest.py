"""The manifest of real rasters: which file holds what (docs/manifest.md explains every key)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import date as calendar_date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from mm_model.config import PositiveFloat, Section, parse, read_yaml
from mm_model.data.storage import raster_root
from mm_model.errors import ConfigError
from mm_model.modalities import MODALITIES, Modality, Quantity

LINEAR_POWER = "power"
TIMELESS = "none"


def _as_text(value: object) -> object:
    # YAML reads an unquoted 2020-06-04 as a date.
    return value.isoformat() if isinstance(value, calendar_date) else value


Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Day = Annotated[
    str, BeforeValidator(_as_text), StringConstraints(pattern=r"^\d{4}(-\d{2}(-\d{2})?)?$")
]
LayerDate = Annotated[
    str,
    BeforeValidator(_as_text),
    StringConstraints(pattern=r"^(none|tag:\w+|\d{4}(-\d{2}(-\d{2})?)?)$"),
]


class BandOf(Section):
    """A band of a file other than the layer's own."""

    file: str
    band: int | str


class LayerEntry(Section):
    """Where a modality's values are, and what they mean."""

    file: str | None = Field(None, description="GeoTIFF, relative to the scene's folder")
    bands: tuple[int | str | BandOf, ...] | None = Field(
        None, description="one a band of the modality; all bands of the file if left out"
    )
    scale: float | None = Field(None, description="physical = stored * scale + offset")
    offset: float | None = None
    unit: str = Field(description="unit of stored * scale + offset")
    nodata: tuple[float, ...] = Field((), description="beside the file's own")
    classes: dict[int, int] | None = Field(None, description="code in the file → code, or 0")
    out_of_range: Literal["error", "clip", "mask"] = "error"
    date: LayerDate | None = Field(None, description="else the scene's")
    native_gsd_m: PositiveFloat | None = Field(
        None, description="of the measurement, where the file's pixels are finer"
    )


class SceneEntry(Section):
    """One co-registered set of files."""

    place: Name | None = None
    date: Day | None = None
    without: tuple[str, ...] = ()
    layers: dict[str, dict[str, Any]] = Field({}, description="keys that differ for this scene")


class SourceEntry(Section):
    """Scenes of one layout."""

    licence: str
    attribution: str | None = None
    folder: str = Field(description="folder of a scene, relative to root; {scene} is its name")
    grid: str = Field(description="the modality whose file gives the grid")
    gsd_m: PositiveFloat | None = None
    crs: str | None = None
    place: Name | None = None
    layers: dict[str, LayerEntry]
    scenes: dict[Name, SceneEntry | None]


class ManifestFile(Section):
    """The whole file."""

    root: str = Field(description="folder, seen from the manifest, or s3://bucket/folder")
    root_variable: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9_]*$")] | None = None
    sources: dict[Name, SourceEntry]

    @model_validator(mode="after")
    def _has_scenes(self) -> ManifestFile:
        empty = [name for name, source in self.sources.items() if not source.scenes]
        if not self.sources or empty:
            raise ValueError(f"no scene in {empty or 'the manifest'}")
        return self


class SceneSpec(Section):
    """A scene with all that its source says of it filled in.

    Attributes:
        source, scene: names; together unique.
        place_id: shared by scenes of one ground.
        folder: absolute.
        grid: the modality whose file gives the grid.
        gsd_m: of the patches; None for that of params.yaml.
        crs: to reproject to; None for the file's own, "utm" for the zone of its centre.
        layers: modality name → entry, with its date resolved where it is not in a tag.
    """

    source: str
    scene: str
    place_id: str
    folder: Path
    grid: str
    gsd_m: float | None
    crs: str | None
    layers: dict[str, LayerEntry]


def load_manifest(
    path: Path, declared: Mapping[str, Modality] = MODALITIES
) -> tuple[SceneSpec, ...]:
    """The scenes of a manifest, sorted by source and name.

    Raises:
        ConfigError: the file is missing, is no YAML, or says something that cannot be; the message
            names the key.
    """
    manifest = parse(ManifestFile, read_yaml(path), str(path))
    root = _root(path, manifest)
    return tuple(
        _scene(f"{path}: {name}.{scene}", source, name, scene, root, declared)
        for name, source in sorted(manifest.sources.items())
        for scene in sorted(source.scenes)
    )


def _root(path: Path, manifest: ManifestFile) -> Path:
    given = (manifest.root_variable and os.environ.get(manifest.root_variable)) or None
    if "://" in (given or manifest.root):
        return raster_root(given or manifest.root)
    root = (Path(given) if given else path.parent / manifest.root).resolve()
    if not root.is_dir():
        raise ConfigError(
            f"{path}: root",
            got=root,
            allowed="a folder",
            remedy=f"set {manifest.root_variable}" if manifest.root_variable else "edit it",
        )
    return root


def _scene(
    where: str,
    source: SourceEntry,
    name: str,
    scene: str,
    root: Path,
    declared: Mapping[str, Modality],
) -> SceneSpec:
    entry = source.scenes[scene] or SceneEntry()
    unknown = [n for n in (*entry.without, *entry.layers) if n not in source.layers]
    if unknown:
        raise ConfigError(where, got=f"layers {unknown}", allowed=sorted(source.layers))
    layers = {}
    for layer_name, layer in source.layers.items():
        if layer_name in entry.without:
            continue
        merged = {"date": entry.date, **_given(layer), **entry.layers.get(layer_name, {})}
        layers[layer_name] = parse(LayerEntry, merged, f"{where}.{layer_name}")
        _check_layer(f"{where}.{layer_name}", layer_name, layers[layer_name], declared)
    if source.grid not in layers:
        raise ConfigError(f"{where}: grid", got=source.grid, allowed=sorted(layers))
    return SceneSpec(
        source=name,
        scene=scene,
        place_id=f"{name}/{entry.place or source.place or scene}",
        folder=root / source.folder.replace("{scene}", scene),
        grid=source.grid,
        gsd_m=source.gsd_m,
        crs=source.crs,
        layers=layers,
    )


def _given(layer: LayerEntry) -> dict[str, Any]:
    return layer.model_dump(exclude_unset=True)


def _check_layer(
    where: str, name: str, layer: LayerEntry, declared: Mapping[str, Modality]
) -> None:
    """What the schema alone cannot say, since it depends on the modality."""
    if name not in declared:
        raise ConfigError(where, got="unknown modality", allowed=sorted(declared))
    modality = declared[name]
    units = [modality.unit]
    if modality.quantity is Quantity.BACKSCATTER:
        units.append(LINEAR_POWER)
    if layer.unit not in units:
        raise ConfigError(f"{where}.unit", got=layer.unit, allowed=units)
    if (layer.classes is not None) != modality.is_categorical:
        raise ConfigError(f"{where}.classes", allowed="for categorical modalities, and only there")
    codes = {0, *modality.class_codes}
    wrong = sorted(set((layer.classes or {}).values()) - codes)
    if wrong:
        raise ConfigError(f"{where}.classes", got=wrong, allowed=sorted(codes))
    if modality.is_categorical and (layer.scale is not None or layer.offset is not None):
        raise ConfigError(f"{where}.scale", allowed="no scale or offset for class codes")
    if layer.bands is not None and len(layer.bands) != len(modality.bands):
        raise ConfigError(
            f"{where}.bands", got=len(layer.bands), allowed=f"{len(modality.bands)} bands"
        )
    if layer.file is None and not all(isinstance(b, BandOf) for b in layer.bands or (None,)):
        raise ConfigError(f"{where}.file", got="none", allowed="a file, or one for each band")
