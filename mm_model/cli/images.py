"""`mm generate`, `mm fill`, `mm embed` and `mm show`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mm_model.api import ModelIdentity, SceneOrigin
from mm_model.bundle import Bundle, load_bundle
from mm_model.conditions import Conditions, parse_conditions
from mm_model.data import raster
from mm_model.data.store import PatchStore
from mm_model.data.strips import thumbnail
from mm_model.errors import ConfigError, DataError
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES, Modality
from mm_model.pictures import Amount, Panel, save_amounts, save_sheet
from mm_model.pretrained import NAME, PRETRAINED
from mm_model.serving.bands import bands_of, missing_bands, numbers_of
from mm_model.serving.overlay import labelled

if TYPE_CHECKING:
    from mm_model.serving.requests import Aligned, SceneRequest

_PANEL_PX = 1024  # longest side of a panel
_MAX_SAMPLES = 1024  # they are drawn one after another
_LINE_S = 60  # between lines of progress
_SHOWN_SCENES = 3  # sets that `mm show BUNDLE` generates from nothing


def generate(
    *,
    observe: Sequence[str],
    targets: Sequence[str],
    samples: int,
    seed: int,
    steps: int,
    size: tuple[int | None, int | None],
    like: Path | None,
    conditions: Conditions,
    uncertainty: bool,
    out: Path,
    bundle: Path | None,
    endpoint: str | None,
) -> None:
    """Generate through a bundle or an endpoint; write GeoTIFFs and a picture into `out`.

    `observe` holds "modality=file" each; `size` is (height, width) in pixels where nothing is
    observed; `like` is a GeoTIFF on whose grid the result shall lie. Without bundle and endpoint it
    is models/bundle here or, if there is none, the pretrained one.
    """
    files = _observations(observe, bundle, endpoint)
    if (files or like) and size != (None, None):
        raise ConfigError(
            "--height and --width",
            got=f"{size[0]}, {size[1]}",
            remedy="leave them out: what is observed, or --like, says how large the result is",
        )
    grid = None if like is None else _grid_of(like, bool(files))
    if endpoint:
        from mm_model.client import Client

        with Client(endpoint) as client:
            height, width = grid.shape if grid else size
            answer = client.generate_to(
                out, files, targets=targets, samples=samples, seed=seed, steps=steps,
                height=height, width=width, crs=grid.crs if grid and grid.crs else None,
                transform=grid.transform if grid and grid.crs else None,
                uncertainty=uncertainty, conditions=conditions,
            )  # fmt: skip
            written = list(answer.paths)
    else:
        from mm_model.serving.requests import SceneRequest

        folder = bundle or _bundle_at_hand()
        request = SceneRequest(
            files, tuple(targets), samples, seed, steps, grid=grid, conditions=conditions,
            uncertainty=uncertainty,
        )  # fmt: skip
        written = _through_bundle(folder, request, out, size)
    _draw(files, written, f"from {', '.join(files) or 'nothing'}, seed {seed}", out)


def fill(
    *,
    layer: str,
    observe: Sequence[str],
    samples: int,
    seed: int,
    steps: int,
    conditions: Conditions,
    uncertainty: bool,
    out: Path,
    bundle: Path | None,
    endpoint: str | None,
) -> None:
    """Complete a layer, "modality=file", guided by what is observed of it and of others.

    Further files of the layer, among what is observed, are laid below the first one.
    """
    name, _ = _observation(layer, "the layer to fill:")
    files = _observations([layer, *observe], bundle, endpoint)
    if endpoint:
        from mm_model.client import Client

        with Client(endpoint) as client:
            answer = client.fill_to(
                out, name, files, samples=samples, seed=seed, steps=steps,
                uncertainty=uncertainty, conditions=conditions,
            )  # fmt: skip
            written = list(answer.paths)
    else:
        from mm_model.serving.requests import SceneRequest

        request = SceneRequest(
            files, samples=samples, seed=seed, steps=steps, conditions=conditions, fill=name,
            uncertainty=uncertainty,
        )  # fmt: skip
        written = _through_bundle(bundle or _bundle_at_hand(), request, out)
    _draw(files, written, f"{name} filled, seed {seed}", out)


def _grid_of(like: Path, beside_layers: bool) -> Grid:
    """The grid of a GeoTIFF; layers can only be warped onto one that lies somewhere."""
    grid = raster.read_header(like).grid
    if beside_layers and not grid.crs:
        raise ConfigError(
            f"--like {like} has no reference system, and layers are warped onto its grid",
            remedy="write the CRS into the file, as gdal_edit -a_srs does",
        )
    return grid


def _draw(
    files: Mapping[str, Sequence[Path]], written: Sequence[Path], title: str, out: Path
) -> None:
    """A picture of what was given and what came of it, and the paths of all."""
    picture = out / "picture.png"
    # What the caller calls them; a file of a satellite may name its bands otherwise, or not at all.
    seen = [
        panel_of(path, label, MODALITIES.get(name))
        for name, paths in files.items()
        for label, path in labelled("observed", paths)
    ]
    rows = [seen] if seen else []
    gathered = [path for path in written if path.stem.endswith("_uncertainty")]
    rows.append([panel_of(path, path.stem) for path in written if path not in gathered])
    save_sheet(picture, rows, title)
    if gathered:
        amounts = [amount_of(path) for path in gathered]
        save_amounts(out / "uncertainty.png", amounts, f"uncertainty, {title}")
        written = [*written, out / "uncertainty.png"]
    _say([*written, picture])


def amount_of(path: Path) -> Amount:
    """What `Moments` wrote, as one number a pixel: the bands' mean spread, or the entropy."""
    header = raster.read_header(path)
    values, _ = thumbnail(path, _PANEL_PX)
    name = header.tags["MM_UNCERTAINTY_OF"]
    if MODALITIES[name].is_categorical:
        return Amount(values[-1], f"{name}: entropy of the classes", header.units[-1])
    half = len(values) // 2
    of_bands = ", mean of the bands" if half > 1 else ""
    return Amount(values[half:].mean(axis=0), f"{name}: spread{of_bands}", header.units[-1])


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
            written = list(client.embed_to(out, files, conditions=conditions).paths)
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
) -> dict[str, list[Path]]:
    """Modality → files in turn, and a check that not both a bundle and an endpoint are named."""
    if bundle and endpoint:
        raise ConfigError("--bundle and --endpoint", remedy="name one of them")
    files: dict[str, list[Path]] = {}
    for text in observe:
        name, path = _observation(text)
        files.setdefault(name, []).append(path)
    return files


def _observation(text: str, option: str = "--observe") -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals or not Path(file).is_file():
        raise ConfigError(
            f"{option} {text}", allowed="MODALITY=FILE, an existing GeoTIFF, as sar=scene.tif"
        )
    return name, Path(file)


def _through_bundle(
    folder: Path,
    request: SceneRequest,
    out: Path,
    size: tuple[int | None, int | None] = (None, None),
) -> list[Path]:
    from mm_model.serving.generator import Generator
    from mm_model.serving.scenes import MAX_SIDE_PX, write_scene

    loaded = load_bundle(folder)
    side = loaded.manifest.patch_px
    generator = Generator(loaded, max_side_px=MAX_SIDE_PX, max_samples=_MAX_SAMPLES)
    if not request.observed and request.grid is None:
        grid = Grid("", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), size[0] or side, size[1] or side)
        request = replace(request, grid=grid)
    model = ModelIdentity(
        name=NAME if folder == PRETRAINED else str(folder),
        version=loaded.manifest.bundle_id[:12],
        run_id=str(loaded.manifest.provenance.get("mlflow_run_id") or ""),
    )
    with _windows_done() as progress:
        return write_scene(generator, request, model, out, progress)


@contextmanager
def _windows_done() -> Iterator[Callable[[int, int], None]]:
    """On standard error, windows that are computed: a bar, or a line a minute where none can be."""
    console = Console(stderr=True, soft_wrap=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("windows"), TimeRemainingColumn())
    disable = not console.is_terminal
    said = time.monotonic()
    with Progress(*columns, console=console, transient=True, disable=disable) as bar:
        task = bar.add_task("", total=None)

        def tell(done: int, total: int) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total)
            if disable and time.monotonic() - said > _LINE_S:
                said = time.monotonic()
                console.print(f"{done} of {total} windows")

        yield tell


def _embed_through_bundle(
    folder: Path, files: Mapping[str, Sequence[Path]], conditions: Conditions, out: Path
) -> list[Path]:
    from mm_model.serving.answers import write_embedding
    from mm_model.serving.generator import EmbedRequest, Generator
    from mm_model.serving.uploads import read_layers

    loaded = load_bundle(folder)
    generator = Generator(loaded)
    contents = {name: [path.read_bytes() for path in paths] for name, paths in files.items()}
    request = EmbedRequest(read_layers(contents, generator), conditions)
    prepared = generator.prepare_embedding(request)
    (embedding,) = generator.scenes([prepared])
    origin = SceneOrigin(**_origin(folder, loaded, prepared), bundle_id=loaded.manifest.bundle_id)
    return write_embedding(embedding, origin, out)


def _origin(folder: Path, loaded: Bundle, prepared: Aligned) -> dict[str, Any]:
    return {
        "model": NAME if folder == PRETRAINED else str(folder),
        "model_version": loaded.manifest.bundle_id[:12],
        "run_id": str(loaded.manifest.provenance.get("mlflow_run_id") or ""),
        "observed": tuple(prepared.observed),
        "estimated_bands": prepared.estimated,
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
    shown = fits[0]
    values, valid = thumbnail(path, _PANEL_PX)
    named, numbers = bands_of(header, shown), numbers_of(header, shown)
    if missing_bands(header, shown) and named:  # what is estimated is no picture of the file
        (band, *_) = (b for b in shown.bands if b.name in named)
        shown = replace(shown, name=f"{shown.name}_{band.name}", bands=(band,))
    # A filled layer has one band more.
    return Panel(values[[n - 1 for n in numbers[: len(shown.bands)]]], valid, shown, title)


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
