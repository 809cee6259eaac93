"""`mm`: errors of one line, images through a bundle, pictures of what there is."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import rasterio

sys.path.insert(0, str(Path(__file__).parent / "serving"))
from serving_fixtures import (
    GRID,
    NAMES,
    geotiff,
    listening,
    make_bundle,
    make_layer,
    serve_config,
)

from mm_model import cli
from mm_model.api import ModelIdentity, SceneVector
from mm_model.bundle import load_bundle, load_manifest, save_bundle
from mm_model.cli.images import panel_of
from mm_model.data import raster
from mm_model.errors import LayerError
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES
from mm_model.serving.app import build_app
from mm_model.serving.batching import FixedModel, Served
from mm_model.serving.generator import Generator
from mm_model.serving.jobs.store import JobStore

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "bundle"
    made = make_bundle()
    save_bundle(folder, made.model, made.manifest)
    return folder


@pytest.fixture
def mm(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs `mm` in this process; returns exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mm", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capfd.readouterr()

    return run


def test_every_verb_is_on_the_help_page(mm) -> None:
    status, text, _ = mm("--help")
    assert status == 0
    verbs = """doctor up down status serve demo prepare split catalogue validate stats train
    evaluate register promote challenge rollback generate embed fill show"""
    for verb in verbs.split():
        assert f" {verb} " in text


def test_help_imports_no_vendor() -> None:
    import subprocess

    code = (
        "import sys; sys.argv = ['mm', '--help']\n"
        "from mm_model import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'prefect', 'rasterio', 'pandas', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_error_is_one_line_that_says_what_to_do(mm, tmp_path: Path) -> None:
    status, out, err = mm("split", "--pipeline", tmp_path)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert "params.yaml" in err
    assert "--pipeline" in err


def test_debug_shows_the_trace(mm, tmp_path: Path) -> None:
    from mm_model.errors import ConfigError

    with pytest.raises(ConfigError):
        mm("split", "--pipeline", tmp_path, "--debug")


def test_generate_through_a_bundle(mm, bundle: Path, tmp_path: Path) -> None:
    observed = tmp_path / "scene.tif"
    observed.write_bytes(geotiff("sar"))
    out = tmp_path / "answers"
    arguments = ("--bundle", bundle, "--observe", f"sar={observed}", "--target", "dem", "--target",
                 "map", "--samples", 2, "--seed", 7, "--steps", 2, "--out", out)  # fmt: skip
    status, text, err = mm("generate", *arguments)
    assert (status, err) == (0, "")
    written = sorted(p.name for p in out.iterdir())
    names = ["dem_0.tif", "dem_1.tif", "map_0.tif", "map_1.tif"]
    assert written == sorted([*names, "map_0.tif.aux.xml", "map_1.tif.aux.xml", "picture.png"])
    assert all(name in text for name in (*names, "picture.png"))
    for path in out.glob("*.tif"):
        answer = raster.read_raster(path)
        assert answer.grid == GRID  # to the last digit
        assert answer.tags["MM_OBSERVED"] == "sar"
        assert answer.tags["MM_SEED"] == "7"
    first = (out / "dem_0.tif").read_bytes()
    assert first != (out / "dem_1.tif").read_bytes()
    shutil.rmtree(out)
    mm("generate", *arguments)
    assert (out / "dem_0.tif").read_bytes() == first


def test_an_observed_file_may_name_nothing(mm, bundle: Path, tmp_path: Path) -> None:
    """Neither its bands nor its name say what it is: the caller does."""
    observed = tmp_path / "S1A_20200604.tif"
    observed.write_bytes(geotiff("sar"))
    with rasterio.open(observed, "r+") as dataset:
        dataset.descriptions = (None, None)
    out = tmp_path / "answers"
    status, _, err = mm(
        "generate", "--bundle", bundle, "--observe", f"sar={observed}", "--target", "dem",
        "--steps", 1, "--out", out,
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert {p.name for p in out.iterdir()} == {"dem.tif", "picture.png"}


def test_fill_completes_a_layer_and_tells_how_sure_it_is(mm, bundle: Path, tmp_path: Path) -> None:
    given = {name: tmp_path / f"{name}.tif" for name in ("sar", "rgb")}
    for name, path in given.items():
        path.write_bytes(geotiff(name))
    out = tmp_path / "filled"
    status, text, err = mm(
        "fill", f"rgb={given['rgb']}", "--observe", f"sar={given['sar']}", "--bundle", bundle,
        "--steps", 2, "--samples", 2, "--uncertainty", "--out", out,
    )  # fmt: skip
    assert (status, err) == (0, "")
    written = ["picture.png", "rgb_0.tif", "rgb_1.tif", "rgb_uncertainty.tif", "uncertainty.png"]
    assert sorted(p.name for p in out.iterdir()) == written
    assert all(name in text for name in written)
    before, after = (raster.read_raster(p) for p in (given["rgb"], out / "rgb_0.tif"))
    assert not before.valid.all()
    assert np.array_equal(after.values[:3, before.valid], before.values[:, before.valid])
    assert np.array_equal(after.values[3] == 1, ~before.valid)
    spread = raster.read_raster(out / "rgb_uncertainty.tif").values[3:]
    assert (spread[:, before.valid] == 0).all()
    assert spread[:, ~before.valid].max() > 0
    status, _, err = mm("fill", "rgb", "--bundle", bundle)
    assert status == 1
    assert "MODALITY=FILE" in err


def test_generate_from_nothing_has_the_size_asked_for(mm, bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers"
    status, _, err = mm(
        "generate", "--bundle", bundle, "--width", 40, "--height", 24, "--steps", 1, "--out", out
    )
    assert (status, err) == (0, "")
    assert {p.stem for p in out.glob("*.tif")} == set(NAMES)
    assert raster.read_header(out / "dem.tif").grid.shape == (24, 40)


def test_generate_lies_on_the_grid_of_a_file_that_is_named(mm, bundle, tmp_path: Path) -> None:
    observed, like = tmp_path / "scene.tif", tmp_path / "like.tif"
    observed.write_bytes(geotiff("sar"))
    grid = Grid(GRID.crs, (17.3, 0, GRID.transform[2] - 51.9, 0, -16.1, GRID.transform[5]), 16, 19)
    like.write_bytes(geotiff("map", grid))
    arguments = ("generate", "--bundle", bundle, "--target", "dem", "--steps", 1, "--like", like)
    status, _, err = mm(*arguments, "--observe", f"sar={observed}", "--out", tmp_path / "out")
    assert (status, err) == (0, "")
    found = raster.read_raster(tmp_path / "out" / "dem.tif")
    assert found.grid == grid
    assert not found.valid[:, :2].any()  # beside the layer
    assert found.valid[6:14, 4:].all()
    status, _, err = mm(*arguments, "--out", tmp_path / "invented")
    assert (status, err) == (0, "")
    invented = raster.read_raster(tmp_path / "invented" / "dem.tif")
    assert invented.grid == grid
    assert invented.valid.all()
    like.write_bytes(geotiff("map", replace(grid, crs="")))
    status, _, err = mm(*arguments, "--observe", f"sar={observed}", "--out", tmp_path / "no")
    assert (status, "no reference system" in err) == (1, True)


@contextmanager
def endpoint(bundle: Path) -> Iterator[str]:
    """The address of the application with a bundle, listening on this machine."""
    served = Served(
        Generator(load_bundle(bundle), max_side_px=96), ModelIdentity(name="mm-test", version="1")
    )
    app = build_app(FixedModel(served), serve_config(max_side_px=96))
    with listening(app) as url:
        yield url


def test_an_endpoint_makes_of_a_grid_and_of_two_dates_what_the_library_makes(
    mm, bundle: Path, tmp_path: Path
) -> None:
    grid = Grid(GRID.crs, (17.3, 0, GRID.transform[2], 0, -16.1, GRID.transform[5]), 16, 19)
    for name, content in (
        ("june", geotiff("rgb")),
        ("august", geotiff("rgb", seed=1)),
        ("like", geotiff("map", grid)),
    ):
        (tmp_path / f"{name}.tif").write_bytes(content)
    dates = ("--observe", f"rgb={tmp_path}/june.tif", "--observe", f"rgb={tmp_path}/august.tif")
    like = ("--like", tmp_path / "like.tif")
    with endpoint(bundle) as url:
        for number, arguments in enumerate(
            (
                ("generate", *dates, *like, "--target", "dem", "--steps", 1),
                ("generate", *like, "--target", "dem", "--steps", 1),
                ("fill", f"rgb={tmp_path}/june.tif", *dates[2:], "--steps", 1),
                ("embed", *dates),
            )
        ):
            found = []
            for where in (("--bundle", bundle), ("--endpoint", url)):
                out = tmp_path / f"{number}{where[0]}"
                status, _, err = mm(*arguments, *where, "--out", out)
                assert (status, err) == (0, ""), arguments
                (path,) = out.glob("*.tif")
                found.append(raster.read_raster(path))
            here, there = found
            assert here.grid == there.grid
            assert (here.grid == grid) == ("--like" in arguments)
            assert np.array_equal(here.valid, there.valid)
            # In memory levels are means of other sums than in strips, and warps are less exact.
            off = np.abs(here.values - there.values)[:, here.valid]
            assert np.median(off) <= 1e-3 * np.abs(here.values[:, here.valid]).max()


def test_several_dates_of_a_modality_are_one_layer(mm, bundle: Path, tmp_path: Path) -> None:
    june, august = tmp_path / "june.tif", tmp_path / "august.tif"
    august.write_bytes(geotiff("rgb", seed=2, hole=False))
    cloudy = make_layer("rgb", seed=1)
    cloudy.valid[:, 30:] = False
    raster.write_geotiff(june, cloudy.values, cloudy.valid, GRID, MODALITIES["rgb"])
    both = ("--observe", f"rgb={june}", "--observe", f"rgb={august}")
    run = ("--bundle", bundle, "--steps", 1, "--out")
    assert mm("generate", *both, "--target", "dem", *run, tmp_path / "made")[::2] == (0, "")
    made = raster.read_raster(tmp_path / "made" / "dem.tif")
    assert made.valid.all()
    assert made.tags["MM_OBSERVED"] == "rgb"
    assert mm("embed", *both, "--bundle", bundle, "--out", tmp_path / "scene")[::2] == (0, "")
    assert raster.read_raster(tmp_path / "scene" / "scene.tif").valid.all()
    status, _, err = mm("fill", f"rgb={june}", *both[2:], *run, tmp_path / "filled")
    assert (status, "no hole" in err) == (1, True)
    august.write_bytes(geotiff("rgb", seed=2))  # the corner is known to neither
    status, _, err = mm("fill", f"rgb={june}", *both[2:], *run, tmp_path / "filled")
    assert (status, err) == (0, "")
    filled, known = raster.read_raster(tmp_path / "filled" / "rgb.tif"), make_layer("rgb", seed=2)
    assert np.array_equal(filled.values[3] == 1, ~(cloudy.valid | known.valid))
    second = known.valid & ~cloudy.valid
    assert np.array_equal(filled.values[:3, cloudy.valid], cloudy.values[:, cloudy.valid])
    assert np.array_equal(filled.values[:3, second], known.values[:, second])


def test_what_is_known_of_a_picture_is_taken_and_recorded(mm, bundle: Path, tmp_path: Path) -> None:
    observed = tmp_path / "scene.tif"
    observed.write_bytes(geotiff("sar"))
    made = {}
    for name, known in {
        "as it is": (),
        "in winter": ("--date", "2024-01-15"),
        "all told": ("--date", "2024-01-15", "--sun-elevation", 15.5, "--sun-azimuth", 160,
                     "--latitude", "-33", "--gsd", 30),
    }.items():  # fmt: skip
        status, _, err = mm(
            "generate", "--bundle", bundle, "--observe", f"sar={observed}", "--target", "dem",
            "--steps", 2, "--out", tmp_path / name, *known,
        )  # fmt: skip
        assert (status, err) == (0, "")
        made[name] = raster.read_raster(tmp_path / name / "dem.tif")
    assert made["all told"].tags["MM_CONDITIONS"] == (
        "gsd_m=30.0,date=2024-01-15,sun_elevation_deg=15.5,sun_azimuth_deg=160.0,latitude_deg=-33.0"
    )
    assert made["in winter"].tags["MM_CONDITIONS"].startswith("gsd_m=9.99")
    assert "date" not in made["as it is"].tags["MM_CONDITIONS"]
    assert len({answer.values.tobytes() for answer in made.values()}) == 3


def test_embed_through_a_bundle(mm, bundle: Path, tmp_path: Path) -> None:
    grid = replace(GRID, height=27, width=45)  # no side is a multiple of 8
    observed, out = tmp_path / "scene.tif", tmp_path / "scene"
    observed.write_bytes(geotiff("sar", grid))
    status, text, err = mm(
        "embed", "--bundle", bundle, "--observe", f"sar={observed}", "--out", out
    )
    assert (status, err) == (0, "")
    assert text.split() == [str(out / "scene.tif"), str(out / "vector.json")]
    scene = raster.read_raster(out / "scene.tif")
    assert scene.grid == grid.coarser(8)
    assert scene.values.shape[1:] == (4, 6)
    vector = SceneVector.model_validate_json((out / "vector.json").read_bytes())
    assert len(vector.vector) == 2 * len(scene.values)
    assert vector.bundle_id == scene.tags["MM_BUNDLE_ID"] == load_manifest(bundle).bundle_id
    assert scene.tags["MM_OBSERVED"] == "sar"
    means = scene.values[:, scene.valid].mean(axis=1)
    assert vector.vector[: len(means)] == pytest.approx(means, abs=1e-5)


@pytest.fixture
def nothing_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bundle: Path) -> Path:
    """An empty folder to be in, and the test's bundle in the place of the pretrained one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mm_model.cli.images.PRETRAINED", bundle)
    return tmp_path


def test_without_a_bundle_the_pretrained_one_generates_and_says_so(
    mm, bundle: Path, nothing_here: Path
) -> None:
    arguments = ("generate", "--target", "dem", "--steps", 1, "--out", "made")
    status, _, err = mm(*arguments)
    assert status == 0
    assert err == "no models/bundle here: through the pretrained bundle\n"
    assert raster.read_raster(Path("made/dem.tif")).tags["MM_MODEL"] == "pretrained"
    shutil.copytree(bundle, "models/bundle")
    status, _, err = mm(*arguments)
    assert (status, err) == (0, "")
    assert raster.read_raster(Path("made/dem.tif")).tags["MM_MODEL"] == "models/bundle"


def test_show_pretrained(mm, nothing_here: Path) -> None:
    status, text, err = mm("show", "pretrained")
    assert (status, err) == (0, "")
    assert text.strip() == str(nothing_here / "show.png")
    assert Path("show.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--observe", "sar"), "MODALITY=FILE"),
        (("--like", __file__), "cannot be read as GeoTIFF"),
        (("--like", "/nowhere.tif"), "does not exist"),
        (("--like", __file__, "--width", "64"), "leave them out"),
        (("--observe", "sar=/nowhere.tif"), "existing GeoTIFF"),
        (("--observe", f"sar={__file__}", "--width", "64"), "leave them out"),
        (("--bundle", "a", "--endpoint", "http://127.0.0.1:1"), "one of them"),
        (("--date", "15.1.2024"), "YYYY-MM-DD"),
        (("--latitude", "95"), "-90 to 90"),
        (("--sun-elevation", "40"), "both, or neither"),
        (("--endpoint", "http://127.0.0.1:1"), "mm up"),
    ],
)
def test_wrong_use_of_generate(mm, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    status, _, err = mm("generate", *arguments, "--out", tmp_path / "out")
    assert status == 1
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_filling_asks_the_endpoint_that_is_named(mm, tmp_path: Path) -> None:
    layer = tmp_path / "dem.tif"
    layer.write_bytes(geotiff("dem"))
    arguments = ("fill", f"dem={layer}", "--endpoint", "http://127.0.0.1:1", "--out")
    status, _, err = mm(*arguments, tmp_path / "out")
    assert (status, "mm up" in err) == (1, True)
    assert mm(*arguments, tmp_path / "out", "--bundle", "a")[0] == 1


def test_show_a_bundle_and_an_answer(mm, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "layers").mkdir()
    for name in ("sar", "map"):
        (tmp_path / "layers" / f"{name}.tif").write_bytes(geotiff(name))
    for what in (bundle, tmp_path / "layers", tmp_path / "layers" / "sar.tif"):
        picture = tmp_path / "picture.png"
        status, text, err = mm("show", what, "--out", picture)
        assert (status, err) == (0, "")
        assert str(picture) in text
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()


def test_show_names_what_there_is(mm, tmp_path: Path) -> None:
    status, _, err = mm("show", "17", "--pipeline", tmp_path)
    assert status == 1
    assert str(tmp_path) in err


def test_who_runs_the_endpoint_sees_its_jobs_and_ends_one(mm, tmp_path, monkeypatch):
    monkeypatch.setenv("MM_PROJECT", str(tmp_path))
    monkeypatch.delenv("MM_JOBS_URL", raising=False)
    ask = ("jobs", "-C", ROOT)
    assert "no jobs" in mm(*ask)[1]
    assert not (tmp_path / "var").exists()

    folder = tmp_path / "var" / "jobs" / "mm-scene"
    ids = {name: name[0] * 32 for name in ("a queued", "b running", "c failed")}
    for job_id in ids.values():
        (folder / job_id / "uploads").mkdir(parents=True)
    store = JobStore(f"sqlite:///{folder / 'jobs.db'}", "mm-scene")
    for owner, job_id in (("anna", ids["c failed"]), ("bo", ids["b running"])):
        store.add(job_id, owner, [], ["sar"], 2_500_000)
        held = store.claim()
        assert held is not None
        if owner == "anna":
            store.finish(held, LayerError("layer sar: unit"), 0, 60)
        else:
            store.renew(held, 1, 4)
    store.add(ids["a queued"], "", [], ["sar"], 1_000_000)

    status, said, _ = mm(*ask)
    lines = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert status == 0
    assert "anna" in lines[ids["c failed"]]
    assert "layer sar: unit" in lines[ids["c failed"]]
    assert "running" in lines[ids["b running"]]
    assert "25%" in lines[ids["b running"]]
    assert "1.0 MB" in lines[ids["a queued"]]

    assert "ended" in mm(*ask, "--cancel", ids["a queued"])[1]
    assert not (folder / ids["a queued"]).exists()
    mm(*ask, "--cancel", ids["b running"])
    assert (folder / ids["b running"]).exists()  # who works on it cleans up
    assert [job.id for job in store.all()] == [ids["c failed"]]
    for wrong in (ids["a queued"], "../../etc", "x"):
        status, _, error = mm(*ask, "--cancel", wrong)
        assert status == 1
        assert "no job" in error
    assert tmp_path.exists()
    store.close()


def test_a_file_that_lacks_a_band_is_generated_from_and_shown_by_the_one_it_has(
    mm, tmp_path, bundle
):
    path = tmp_path / "descending.tif"
    path.write_bytes(geotiff("sar", bands=("VH",)))
    out = tmp_path / "out"
    asked = ("--observe", f"sar={path}", "--target", "dem", "--steps", 1, "--bundle", bundle)
    status, said, error = mm("generate", *asked, "--out", out)
    assert (status, error) == (0, ""), said
    assert raster.read_header(out / "dem.tif").tags["MM_ESTIMATED_BANDS"] == "sar:VV"
    assert (out / "picture.png").stat().st_size > 0
    panel = panel_of(path, "observed", MODALITIES["sar"])
    layer = make_layer("sar")
    assert panel.modality.band_names == ("VH",)
    assert np.array_equal(panel.values[0][layer.valid], layer.values[1][layer.valid])

    turned = tmp_path / "turned.tif"  # bands go by their names
    turned.write_bytes(geotiff("sar", bands=("VH", "VV")))
    panel = panel_of(turned, "observed", MODALITIES["sar"])
    assert np.array_equal(panel.values[:, layer.valid], layer.values[:, layer.valid])
