"""`mm`: the verbs of the platform, for people.

Only typer is imported here; a command imports what it needs, so that help is quick. Errors end as
one line that says what to do; `--debug` shows the trace.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from mm_model import __version__
from mm_model.errors import MMError

app = typer.Typer(
    name="mm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="One scene from whatever modalities are observed; every other modality from that scene.",
)

SERVICES, STAGES, MODELS, IMAGES = "Services", "Pipeline stages", "Models", "Images"

PipelineOption = Annotated[
    Path,
    typer.Option("--pipeline", "-C", help="Folder that holds params.yaml.", show_default="."),
]
HERE = Path()


def main() -> None:
    """Entry point of `mm`: runs a command; an error becomes one line and exit status 1."""
    # Read here, so that it is understood before and after the verb.
    debug = "--debug" in sys.argv
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    from mm_model.adapters import environment

    environment.enter()
    try:
        app(args=arguments, prog_name="mm")
    except MMError as error:
        if debug:
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted", status=130)
    except Exception as error:
        if debug:
            raise
        text = " ".join(str(error).split()) or "no message"
        _fail(f"unexpected {type(error).__name__}: {text:.300}; run again with --debug for a trace")


def _fail(message: str, status: int = 1) -> None:
    typer.secho(f"error: {message}", fg="red", err=True)
    raise SystemExit(status)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the trace of an error.")] = False,
) -> None:
    """See `main` for --debug; it is named here for the help page."""


def _enter(pipeline: Path) -> None:
    """Stages read and write relative to their pipeline folder."""
    if not (pipeline / "params.yaml").is_file():
        from mm_model.errors import ConfigError

        raise ConfigError(
            f"{pipeline.resolve()} holds no params.yaml",
            remedy="go to a pipeline folder or name one with --pipeline",
        )
    os.chdir(pipeline)


# ------------------------------------------------------------------------------------- services


@app.command(rich_help_panel=SERVICES)
def doctor() -> None:
    """What is installed, reachable and wrong, and what to do about it."""
    from mm_model.cli.doctor import examine

    raise SystemExit(examine())


@app.command(rich_help_panel=SERVICES)
def up() -> None:
    """Start MLflow, Prefect, Ray and the endpoint under a supervisor; deploy the flows."""
    from mm_model.adapters import services

    services.up()


@app.command(rich_help_panel=SERVICES)
def down() -> None:
    """Stop all that `mm up` started; nothing is left behind but var/."""
    from mm_model.adapters import services

    services.down()


@app.command(rich_help_panel=SERVICES)
def status() -> None:
    """Services: state, address and memory."""
    from mm_model.adapters import services

    services.status()


@app.command(rich_help_panel=SERVICES)
def jobs(
    cancel: Annotated[
        str | None, typer.Option(metavar="ID", help="End and forget this one.")
    ] = None,
    pipeline: PipelineOption = HERE,
) -> None:
    """The endpoint's jobs, of all owners: how far they are, and why they failed."""
    from mm_model.cli.jobs import jobs as run

    _enter(pipeline)
    run(cancel)


@app.command(rich_help_panel=SERVICES)
def serve(pipeline: PipelineOption = HERE) -> None:
    """Serve the champion over HTTP on the local Ray, until stopped."""
    _enter(pipeline)
    from mm_model.adapters import ray_serve
    from mm_model.config import load_params

    params = load_params()
    ray_serve.serve_forever(params.serve, params.register_.model)


key_app = typer.Typer(no_args_is_help=True, help="API keys of the endpoint.")
app.add_typer(key_app, name="key", rich_help_panel=SERVICES)


@key_app.command()
def new(
    name: Annotated[str, typer.Argument(help="Who holds it; stands in the audit log.")],
    scopes: Annotated[
        str, typer.Option(help="What it is for, by commas: generate, embed, metrics.")
    ] = "generate,embed",
    file: Annotated[
        Path | None, typer.Option(help="Append it to this file, to be named MM_API_KEYS_FILE.")
    ] = None,
) -> None:
    """Make an API key: it is shown once, and only its hash is kept."""
    from mm_model.cli.key import make

    make(name, scopes, file)


@app.command(rich_help_panel=SERVICES)
def demo(pipeline: PipelineOption = HERE) -> None:
    """Start everything, run the release flow, ask the endpoint, and draw what it answers."""
    from mm_model.cli.demo import run

    run(pipeline)


# --------------------------------------------------------------------------------------- stages


@app.command(rich_help_panel=STAGES)
def prepare(pipeline: PipelineOption = HERE) -> None:
    """Rasters, or the synthetic Earth, to co-registered patches."""
    _enter(pipeline)
    from mm_model.stages import prepare as stage

    stage.main()


@app.command(rich_help_panel=STAGES)
def split(pipeline: PipelineOption = HERE) -> None:
    """Places to training, validation and test."""
    _enter(pipeline)
    from mm_model.stages import split as stage

    stage.main()


@app.command(rich_help_panel=STAGES)
def catalogue(pipeline: PipelineOption = HERE) -> None:
    """Describe the patches for others: STAC, a data card, a page to look at."""
    _enter(pipeline)
    from mm_model.stages import catalogue as stage

    stage.main()


@app.command(rich_help_panel=STAGES)
def validate(pipeline: PipelineOption = HERE) -> None:
    """Check the index of patches; write Data Docs."""
    _enter(pipeline)
    from mm_model.stages import validate as stage

    stage.main()


@app.command(rich_help_panel=STAGES)
def stats(pipeline: PipelineOption = HERE) -> None:
    """Statistics of the training split."""
    _enter(pipeline)
    from mm_model.stages import stats as stage

    stage.main()


@app.command(rich_help_panel=STAGES)
def train(
    add: Annotated[
        str | None,
        typer.Option(help="Modality that joins the bundle at train.start; all else in it stays."),
    ] = None,
    pipeline: PipelineOption = HERE,
) -> None:
    """Train the scene model on Ray; resumes from the last checkpoint of the same run."""
    _enter(pipeline)
    from mm_model.stages import train as stage

    stage.main(add)


@app.command(rich_help_panel=STAGES)
def evaluate(pipeline: PipelineOption = HERE) -> None:
    """Measure the bundle on held-out places; draw sheets."""
    _enter(pipeline)
    from mm_model.stages import evaluate as stage

    stage.main()


data_app = typer.Typer(no_args_is_help=True, help="Look at data beside the pipeline.")
app.add_typer(data_app, name="data", rich_help_panel=STAGES)


@data_app.command()
def drift(
    batch: Annotated[Path, typer.Argument(help="Folder of a patch store, as prepare writes it.")],
    pipeline: PipelineOption = HERE,
) -> None:
    """Compare a batch with the training set, by band and class; status 1 if it has drifted."""
    batch = batch.resolve()
    _enter(pipeline)
    from mm_model.cli.data import show_drift

    show_drift(batch)


# --------------------------------------------------------------------------------------- models


@app.command(rich_help_panel=MODELS)
def register(pipeline: PipelineOption = HERE) -> None:
    """Register the evaluated bundle and judge it; passing the gate makes it champion."""
    _enter(pipeline)
    from mm_model.cli.models import register_and_promote

    register_and_promote()


@app.command(rich_help_panel=MODELS)
def promote(version: int, pipeline: PipelineOption = HERE) -> None:
    """Make a version that passed its gate the champion; the endpoint follows."""
    _enter(pipeline)
    from mm_model.cli.models import promote as promote_version

    promote_version(version)


@app.command(rich_help_panel=MODELS)
def challenge(
    version: Annotated[int | None, typer.Argument(show_default=False)] = None,
    end: Annotated[bool, typer.Option("--end", help="There is no challenger any more.")] = False,
    pipeline: PipelineOption = HERE,
) -> None:
    """Try a version that passed its gate beside the champion; `serve.challenger` says how."""
    if (version is None) != end:
        raise typer.BadParameter("name a version, or --end")
    _enter(pipeline)
    from mm_model.cli.models import challenge as challenge_by

    challenge_by(version)


@app.command(rich_help_panel=MODELS)
def rollback(pipeline: PipelineOption = HERE) -> None:
    """Give the alias back to the champion before this one; the endpoint follows."""
    _enter(pipeline)
    from mm_model.cli.models import rollback as roll_back

    roll_back()


# --------------------------------------------------------------------------------------- images

BundleOption = Annotated[
    Path | None,
    typer.Option(
        "--bundle", help="Bundle folder.", show_default="models/bundle, else the pretrained one"
    ),
]
EndpointOption = Annotated[
    str | None,
    typer.Option("--endpoint", help="Ask this endpoint (http://host:port) instead of a bundle."),
]
UncertaintyOption = Annotated[
    bool,
    typer.Option("--uncertainty", help="Mean and spread, class probabilities and entropy, too."),
]
DateOption = Annotated[
    str | None, typer.Option("--date", help="YYYY-MM-DD: season and, with a latitude, sun.")
]
SunElevationOption = Annotated[
    float | None, typer.Option("--sun-elevation", help="Degrees above the horizon.")
]
SunAzimuthOption = Annotated[
    float | None, typer.Option("--sun-azimuth", help="Degrees clockwise from north.")
]
LatitudeOption = Annotated[
    float | None,
    typer.Option("--latitude", help="Degrees, north positive.", show_default="the grid's"),
]
SeedOption = Annotated[int, typer.Option(help="The same seed gives the same images.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Sampling steps; 1: the best estimate.")]
OutOption = Annotated[Path, typer.Option(help="Folder for the GeoTIFFs and a picture.")]
GsdOption = Annotated[
    float | None,
    typer.Option("--gsd", help="Metres a pixel on the ground.", show_default="the grid's"),
]


@app.command(rich_help_panel=IMAGES)
def generate(
    observe: Annotated[
        list[str] | None,
        typer.Option(
            help="MODALITY=FILE, repeatable, also for one modality: of other dates or neighbouring "
            "tiles each pixel is taken from the first file that knows it; none: out of nothing."
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Modality to generate, repeatable; default: all not observed."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of each target.")] = 1,
    seed: SeedOption = 0,
    steps: StepsOption = 4,
    width: Annotated[int | None, typer.Option(help="Pixels, when nothing is observed.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, when nothing is observed.")] = None,
    like: Annotated[
        Path | None,
        typer.Option(help="GeoTIFF on whose grid the result shall lie.", show_default="the finest"),
    ] = None,
    uncertainty: UncertaintyOption = False,
    out: OutOption = Path("out"),
    bundle: BundleOption = None,
    endpoint: EndpointOption = None,
    date: DateOption = None,
    sun_elevation: SunElevationOption = None,
    sun_azimuth: SunAzimuthOption = None,
    latitude: LatitudeOption = None,
    gsd: GsdOption = None,
) -> None:
    """GeoTIFFs of any modality from GeoTIFFs of any others, of any size."""
    from mm_model.cli.images import conditions_of
    from mm_model.cli.images import generate as run

    run(
        observe=observe or [],
        targets=target or [],
        samples=samples,
        seed=seed,
        steps=steps,
        size=(height, width),
        like=like,
        conditions=conditions_of(date, sun_elevation, sun_azimuth, latitude, gsd),
        uncertainty=uncertainty,
        out=out,
        bundle=bundle,
        endpoint=endpoint,
    )


@app.command(rich_help_panel=IMAGES)
def fill(
    layer: Annotated[str, typer.Argument(help="MODALITY=FILE with holes (nodata, mask or NaN).")],
    observe: Annotated[
        list[str] | None,
        typer.Option(
            help="MODALITY=FILE that guides it, repeatable; of the layer itself: another date or "
            "tile, whose pixels go into the holes before anything is generated."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples of what is missing.")] = 1,
    seed: SeedOption = 0,
    steps: StepsOption = 4,
    uncertainty: UncertaintyOption = False,
    out: OutOption = Path("out"),
    bundle: BundleOption = None,
    endpoint: EndpointOption = None,
    date: DateOption = None,
    sun_elevation: SunElevationOption = None,
    sun_azimuth: SunAzimuthOption = None,
    latitude: LatitudeOption = None,
    gsd: GsdOption = None,
) -> None:
    """A layer without its holes: observed pixels untouched, a last band says what was generated."""
    from mm_model.cli.images import conditions_of
    from mm_model.cli.images import fill as run

    run(
        layer=layer,
        observe=observe or [],
        samples=samples,
        seed=seed,
        steps=steps,
        conditions=conditions_of(date, sun_elevation, sun_azimuth, latitude, gsd),
        uncertainty=uncertainty,
        out=out,
        bundle=bundle,
        endpoint=endpoint,
    )


@app.command(rich_help_panel=IMAGES)
def embed(
    observe: Annotated[
        list[str], typer.Option(help="MODALITY=FILE, repeatable, also for one modality.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for scene.tif and vector.json.")] = Path("out"),
    bundle: BundleOption = None,
    endpoint: EndpointOption = None,
    date: DateOption = None,
    sun_elevation: SunElevationOption = None,
    sun_azimuth: SunAzimuthOption = None,
    latitude: LatitudeOption = None,
    gsd: GsdOption = None,
) -> None:
    """The scene of GeoTIFFs as numbers: a map of 8 x 8 pixel cells, and one vector."""
    from mm_model.cli.images import conditions_of
    from mm_model.cli.images import embed as run

    run(
        observe=observe,
        conditions=conditions_of(date, sun_elevation, sun_azimuth, latitude, gsd),
        out=out,
        bundle=bundle,
        endpoint=endpoint,
    )


@app.command(rich_help_panel=IMAGES)
def show(
    what: Annotated[
        str,
        typer.Argument(
            help="`data`, a patch id or number, a bundle folder, `pretrained`, or GeoTIFFs' folder."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="PNG to write; of `data`, a copy of the page.", show_default="show.png"),
    ] = None,
    pipeline: PipelineOption = HERE,
) -> None:
    """A page of all data, or a picture of a patch, of what a bundle generates, of an answer."""
    if what == "data":
        from mm_model.cli.data import show_data

        show_data(pipeline, out)
        return
    from mm_model.cli.images import show as run

    run(what, (out or Path("show.png")).resolve(), pipeline)
