"""`mm generate` and `mm show`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mm_model.api import Provenance
from mm_model.bundle import load_bundle
from mm_model.data import raster
from mm_model.data.store import PatchStore
from mm_model.errors import ConfigError, DataError
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES, Modality
from mm_model.pictures import Panel, save_sheet

_SHOWN_SCENES = 3  # sets that `mm show BUNDLE` generates from nothing


def generate(
    *,
    observe: Sequence[str],
    targets: Sequence[str],
    samples: int,
    seed: int,
    steps: int,
    size: tuple[int | None, int | None],
    out: Path,
    bundle: Path | None,
    endpoint: str | None,
) -> None:
    """Generate through a bundle or an endpoint; write GeoTIFFs and a picture into `out`.

    `observe` holds "modality=file" each; `size` is (height, width) in pixels where nothing is
    observed.
    """
    if bundle and endpoint:
        raise ConfigError("--bundle and --endpoint", remedy="name one of them")
    files: dict[str, Path] = {}
    for text in observe:
        name, path = _observation(text)
        if name in files:
            raise ConfigError(f"--observe {name} is there twice", remedy="name one file of each")
        files[name] = path
    if endpoint:
        from mm_model.client import Client

        with Client(endpoint) as client:
            answer = client.generate(
                files, targets=targets, samples=samples, seed=seed, steps=steps,
                height=size[0], width=size[1],
            )  # fmt: skip
            written = answer.save(out)
    else:
        written = _through_bundle(
            bundle or Path("models/bundle"), files, targets, samples, seed, steps, size, out
        )
    picture = out / "picture.png"
    # What the caller calls them; a file of a satellite may name its bands otherwise, or not at all.
    seen = [panel_of(path, "observed", MODALITIES.get(name)) for name, path in files.items()]
    rows = [seen] if seen else []
    rows.append([panel_of(path, path.stem) for path in written])
    save_sheet(picture, rows, f"from {', '.join(files) or 'nothing'}, seed {seed}")
    console = Console(soft_wrap=True)
    for path in [*written, picture]:
        console.print(str(path))


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
    out: Path,
) -> list[Path]:
    from mm_model.serving.answers import write_answer
    from mm_model.serving.generator import Generator, Request
    from mm_model.serving.uploads import read_layer

    loaded = load_bundle(folder)
    generator = Generator(loaded)
    side = loaded.manifest.patch_px
    height, width = size[0] or side, size[1] or side
    request = Request(
        observed={
            name: read_layer(path.read_bytes(), generator.modality(name), generator)
            for name, path in files.items()
        },
        targets=tuple(targets),
        samples=samples,
        seed=seed,
        steps=steps,
        grid=None if files else Grid("", (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), height, width),
    )
    (result,) = generator.generate([request])
    provenance = Provenance(
        model=str(folder),
        model_version=loaded.manifest.bundle_id[:12],
        run_id=str(loaded.manifest.provenance.get("mlflow_run_id") or ""),
        observed=tuple(files),
        targets=tuple(result.values),
        samples=samples,
        seed=seed,
        steps=steps,
    )
    return write_answer(result, generator.modalities, provenance, out)


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
    place = Path(what)
    if (place / "manifest.json").is_file() and (place / "weights.safetensors").is_file():
        rows, title = _bundle_rows(place), f"{place}: generated from nothing"
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
