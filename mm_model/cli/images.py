"""`mm generate`, `mm embed` and `mm show`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from mm_model.api import Provenance, SceneOrigin
from mm_model.bundle import Bundle, load_bundle
from mm_model.conditions import Conditions, parse_conditions
from mm_model.data import raster
from mm_model.data.store import PatchStore
from mm_model.errors import ConfigError, DataError
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES, Modality
from mm_model.pictures import Panel, save_sheet
from mm_model.pretrained import NAME, PRETRAINED

if TYPE_CHECKING:
    from mm_model.serving.generator import Generator, ObservedLayer
    from mm_model.serving.requests import Aligned

_SHOWN_SCENES = 3  # sets that `mm show BUNDLE` generates from nothing


def generate(
    *,
    observe: Sequence[str],
    targets: Sequence[str],
    samples: int,
    seed: int,
    steps: int,
    size: tuple[int | None, int | None],
    conditions: Conditions,
    out: Path,
    bundle: Path | None,
    endpoint: str | None,
) -> None:
    """Generate through a bundle or an endpoint; write GeoTIFFs and a picture into `out`.

    `observe` holds "modality=file" each; `size` is (height, width) in pixels where nothing is
    observed. Without bundle and endpoint it is models/bundle here or, if there is none, the
    pretrained one.
    """
    files = _observations(observe, bundle, endpoint)
    if endpoint:
        from mm_model.client import Client

        with Client(endpoint) as client:
            answer = client.generate(
                files, targets=targets, samples=samples, seed=seed, steps=steps,
                height=size[0], width=size[1], conditions=conditions,
            )  # fmt: skip
            written = answer.save(out)
    else:
        folder = bundle or _bundle_at_hand()
        written = _through_bundle(
            folder, files, targets, samples, seed, steps, size, conditions, out
        )
    picture = out / "picture.png"
    # What the caller calls them; a file of a satellite may name its bands otherwise, or not at all.
    seen = [panel_of(path, "observed", MODALITIES.get(name)) for name, path in files.items()]
    rows = [seen] if seen else []
    rows.append([panel_of(path, path.stem) for path in written])
    save_sheet(picture, rows, f"from {', '.join(files) or 'nothing'}, seed {seed}")
    _say([*written, picture])


def embed(
    *,
    observe: Sequence[str],
    conditions: Conditions,
    out: Path,
    bundle: Path | None,
    endpoint: str | None,
) -> None:
    """Write scene.tif and vector.json of what is observed into `out`, as `generate` finds it."""
    files = _observations(observe, bundle, endpoint)
    if endpoint:
        from mm_model.client import Client

        with Client(endpoint) as client:
            written = client.embed(files, conditions=conditions).save(out)
    else:
        written = _embed_through_bundle(bundle or _bundle_at_hand(), files, conditions, out)
    _say(written)


def conditions_of(
    date: str | None,
    sun_elevation: float | None,
    sun_azimuth: float | None,
    latitude: float | None,
    gsd: float | None,
) -> Conditions:
    """Conditions from a command's options; None is unknown."""
    given = {
        "date": date,
        "sun_elevation_deg": sun_elevation,
        "sun_azimuth_deg": sun_azimuth,
        "latitude_deg": latitude,
        "gsd_m": gsd,
    }
    return parse_conditions({name: str(v) for name, v in given.items() if v is not None})


def _say(paths: Sequence[Path]) -> None:
    console = Console(soft_wrap=True)
    for path in paths:
        console.print(str(path))


def _bundle_at_hand() -> Path:
    trained = Path("models/bundle")
    if trained.exists():
        return trained
    Console(stderr=True, soft_wrap=True).print(f"no {trained} here: through the {NAME} bundle")
    return PRETRAINED


def _observations(
    observe: Sequence[str], bundle: Path | None, endpoint: str | None
) -> dict[str, Path]:
    """Modality → file, and a check that not both a bundle and an endpoint are named."""
    if bundle and endpoint:
        raise ConfigError("--bundle and --endpoint", remedy="name one of them")
    files: dict[str, Path] = {}
    for text in observe:
        name, path = _observation(text)
        if name in files:
            raise ConfigError(f"--observe {name} is there twice", remedy="name one file of each")
        files[name] = path
    return files


def _observation(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals or not Path(file).is_file():
        raise ConfigError(
            f"--observe {text}", allowed="MODALITY=FILE, an existing GeoTIFF, as sar=scene.tif"
        )
    return name, Path(file)


def _through_bundle(
    folder: Path,
    files: dict[str, Path],
    targets: Sequence[str],
    samples: int,
    seed: int,
    steps: int,
    size: tuple[int | None, int | None],
    conditions: Conditions,
    out: Path,
) -> list[Path]:
    from mm_model.serving.answers import write_answer
    from mm_model.serving.generator import Generator, Request

    loaded = load_bundle(folder)
    generator = Generator(loaded)
    side = loaded.manifest.patch_px
    height, width = size[0] or side, size[1] or side
    request = Request(
        observed=_layers(files, generator),
        targets=tuple(targets),
        samples=samples,
        seed=seed,
        steps=steps,
        grid=None if files else Grid("", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), height, width),
        conditions=conditions,
    )
    prepared = generator.prepare(request)
    (result,) = generator.sample([prepared])
    provenance = Provenance(
        **_origin(folder, loaded, prepared),
        targets=tuple(result.values),
        samples=samples,
        seed=seed,
        steps=steps,
    )
    return write_answer(result, generator.modalities, provenance, out)


def _embed_through_bundle(
    folder: Path, files: dict[str, Path], conditions: Conditions, out: Path
) -> list[Path]:
    from mm_model.serving.answers import write_embedding
    from mm_model.serving.generator import EmbedRequest, Generator

    loaded = load_bundle(folder)
    generator = Generator(loaded)
    request = EmbedRequest(_layers(files, generator), conditions)
    prepared = generator.prepare_embedding(request)
    (embedding,) = generator.scenes([prepared])
    origin = SceneOrigin(**_origin(folder, loaded, prepared), bundle_id=loaded.manifest.bundle_id)
    return write_embedding(embedding, origin, out)


def _layers(files: dict[str, Path], generator: Generator) -> dict[str, ObservedLayer]:
    from mm_model.serving.uploads import read_layer

    return {
        name: read_layer(path.read_bytes(), generator.modality(name), generator)
        for name, path in files.items()
    }


def _origin(folder: Path, loaded: Bundle, prepared: Aligned) -> dict[str, Any]:
    return {
        "model": NAME if folder == PRETRAINED else str(folder),
        "model_version": loaded.manifest.bundle_id[:12],
        "run_id": str(loaded.manifest.provenance.get("mlflow_run_id") or ""),
        "observed": tuple(prepared.observed),
        "conditions": prepared.conditions,
    }


def panel_of(path: Path, title: str, modality: Modality | None = None) -> Panel:
    """A picture of a GeoTIFF; its modality is known by its bands, if it is not told."""
    header = raster.read_header(path)
    fits = [modality] if modality else []
    if not fits:
        fits = [m for m in MODALITIES.values() if m.band_names == header.band_names]
    if not fits:
        fits = [m for m in MODALITIES.values() if path.stem.split("_")[0] == m.name]
    if not fits:
        raise ConfigError(
            f"{path} is of no known modality",
            got=", ".join(header.band_names),
            allowed="bands or a file name of one of " + ", ".join(MODALITIES),
        )
    found = raster.read_raster(path)
    return Panel(found.values, found.valid, fits[0], title)


def show(what: str, out: Path, pipeline: Path) -> None:
    """Draw a patch of the store, what a bundle makes of nothing, or the GeoTIFFs of a folder."""
    place = PRETRAINED if what == NAME else Path(what)
    parts = (place / "manifest.json", place / "weights.safetensors")
    if what == NAME or all(part.is_file() for part in parts):
        rows, title = _bundle_rows(place), f"{what}: generated from nothing"
    elif place.is_dir() or place.suffix == ".tif":
        files = [place] if place.is_file() else sorted(place.glob("*.tif"))
        if not files:
            raise ConfigError(f"{place} holds no .tif", remedy="name a folder of GeoTIFFs")
        rows, title = [[panel_of(path, path.stem) for path in files]], str(place)
    else:
        rows, title = _patch_rows(what, pipeline / "data" / "patches")
    save_sheet(out, rows, title)
    Console(soft_wrap=True).print(str(out))


def _bundle_rows(folder: Path) -> list[list[Panel | None]]:
    from mm_model.serving.generator import Generator, Request

    loaded = load_bundle(folder)
    generator = Generator(loaded)
    side = loaded.manifest.patch_px
    grid = Grid("", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), side, side)
    (result,) = generator.generate([Request(samples=_SHOWN_SCENES, grid=grid)])
    return [
        [Panel(result.values[name][k], result.valid, modality, f"sample {k}")
         for name, modality in generator.modalities.items()]
        for k in range(_SHOWN_SCENES)
    ]  # fmt: skip


def _patch_rows(what: str, folder: Path) -> tuple[list[list[Panel | None]], str]:
    store = PatchStore(folder)
    if what.isdigit() and int(what) < len(store):
        position = int(what)
    elif what in store.patch_ids:
        position = store.patch_ids.index(what)
    else:
        raise DataError(
            f"no patch, bundle or folder {what!r}",
            allowed=f"0 to {len(store) - 1}, a patch id as {store.patch_ids[0]}, or a folder",
        )
    patch = store.read(position)
    panels: list[Panel | None] = [
        Panel(layer.values, layer.valid, MODALITIES[name], layer.acquired_at or "")
        for name, layer in patch.layers.items()
    ]
    return [panels], f"{patch.patch_id} ({patch.source}, {patch.gsd_m:g} m)"
