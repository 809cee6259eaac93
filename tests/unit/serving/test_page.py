"""The files of the page at `/`, and what only the page's interface has: layers on one grid."""

import asyncio
import fnmatch
import io
import re
import tomllib
import zipfile
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from serving_fixtures import (
    GRID,
    NAMES,
    ask,
    form,
    geotiff,
    make_layer,
    make_source,
    refused,
    serve_config,
)

from mm_model import pictures
from mm_model.api import AlignedManifest, ModalityList, Origin
from mm_model.data import georeference, raster
from mm_model.modalities import MODALITIES
from mm_model.serving import web
from mm_model.serving.access import KeyScope, new_key, parse_keys
from mm_model.serving.app import build_app
from mm_model.serving.layers import onto

ROOT = Path(__file__).parents[3]
FILES = sorted(p.relative_to(web.FOLDER).as_posix() for p in web.FOLDER.rglob("*") if p.is_file())
KEY, LINE = new_key("metrics-only", frozenset({KeyScope.METRICS}))


@pytest.fixture(scope="module")
def app():
    return build_app(make_source(max_side_px=96), serve_config(max_side_px=96))


def get(app, path):
    (answer,) = ask(app, ("GET", path, {}))
    return answer


def test_the_page_and_its_files_are_shown_without_a_key_under_a_policy_of_their_own():
    app = build_app(
        make_source(max_side_px=96), serve_config(max_side_px=96), parse_keys(LINE, "test")
    )
    policies = set()
    for path in ("/", *(f"/page/{name}" for name in FILES)):
        answer = get(app, path)
        assert answer.status_code == 200, path
        policies.add(answer.headers["content-security-policy"])
        assert answer.headers["x-content-type-options"] == "nosniff"
    (policy,) = policies
    rules = {rule.split()[0]: rule.split()[1:] for rule in policy.split(";")}
    assert rules.pop("require-trusted-types-for") == ["'script'"]
    assert rules["default-src"] == ["'none'"]
    assert {source for allowed in rules.values() for source in allowed} == {"'none'", "'self'"}
    # Browsers take scripts and styles of no other type, where they may not guess.
    kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    for name in FILES:
        wanted = kinds.get(name.rpartition(".")[2])
        assert wanted is None or get(app, f"/page/{name}").headers["content-type"].startswith(
            wanted
        )
    refused(get(app, "/v1/modalities"), 401, "unauthenticated")


@pytest.mark.parametrize(
    "path", ["/page/../access.py", "/page/%2e%2e/access.py", "/page/nothing.js", "/page/", "/page"]
)
def test_nothing_else_is_shown(app, path):
    answer = get(app, path)
    assert answer.status_code in (307, 404)
    assert b"import" not in answer.content


def test_the_page_lies_below_a_prefix_too(app):
    transport = httpx.ASGITransport(app, root_path="/real")

    async def run():
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.get("/real"), await http.get("/real/")

    bare, page = asyncio.run(run())
    assert (bare.status_code, bare.headers["location"]) == (307, "http://test/real/")
    assert "mm-model" in page.text
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert links
    assert not [link for link in links if link.startswith("/") or "//" in link]


def test_the_files_are_in_the_wheel_few_and_without_a_word_of_other_servers():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = declared["tool"]["setuptools"]["package-data"]["mm_model"]
    package = web.FOLDER.relative_to(ROOT / "mm_model").as_posix()
    for name in FILES:
        path = f"{package}/{name}"
        assert any(fnmatch.fnmatch(path, p.replace("**/", "")) for p in patterns), path
    assert sum((web.FOLDER / name).stat().st_size for name in FILES) < 200_000
    for name in FILES:
        if not name.startswith("vendor/"):
            text = (web.FOLDER / name).read_text()
            assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}
            assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
            assert not [m for m in MODALITIES if re.search(rf"[\"'`]{m}[\"'`]", text)], name


def align(app, files, **fields):
    (answer,) = ask(app, form(files, path="/v1/align", **fields))
    return answer


def test_layers_come_back_on_one_grid_in_physical_units(app):
    coarse = replace(GRID, transform=(20.2, 0, GRID.transform[2], 0, -19.8, GRID.transform[5]),
                     height=17, width=23)  # fmt: skip
    answer = align(app, {"sar": geotiff("sar", coarse), "map": geotiff("map")}, date="2024-07-01")
    assert answer.status_code == 200, answer.text
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        manifest = AlignedManifest.model_validate_json(archive.read("manifest.json"))
        found = {n: raster.read_raster(archive.read(f"{n}.tif")) for n in ("sar", "map")}
        assert len(archive.namelist()) == 3
    assert Origin.from_headers(answer.headers) == manifest.origin
    assert manifest.origin.observed == ("sar", "map")
    assert (manifest.crs, manifest.transform) == (GRID.crs, GRID.transform)
    for name, grid in (("sar", coarse), ("map", GRID)):
        layer, modality = make_layer(name, grid), MODALITIES[name]
        values, valid = onto(GRID, name, layer, modality)  # what the generator itself uses
        assert found[name].grid == GRID
        assert found[name].units == (modality.unit,) * len(modality.bands)
        np.testing.assert_array_equal(found[name].valid, valid)
        np.testing.assert_allclose(
            found[name].values[:, valid], values[:, valid], rtol=1e-6, atol=1e-6
        )
    corners = [GRID.xy(*at) for at in ((0, 0), (0, 40), (24, 40), (24, 0))]
    lonlat = georeference.to_lonlat(GRID.crs, *zip(*corners, strict=True))
    np.testing.assert_allclose(manifest.corners_lonlat, lonlat, atol=1e-9)


def test_what_lies_nowhere_has_no_corners_on_earth(app):
    nowhere = replace(GRID, crs="", transform=(1, 0, 0, 0, 1, 0))
    answer = align(app, {"dem": geotiff("dem", nowhere)})
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert AlignedManifest.model_validate_json(
            archive.read("manifest.json")
        ).corners_lonlat is None  # fmt: skip


def test_aligning_refuses_what_generating_would(app):
    refused(align(app, {}, date="2024-07-01"), 422, "request")
    refused(align(app, {"sar": geotiff("sar")}, samples=2), 422, "request")
    refused(align(app, {"sar": geotiff("sar")[:300]}), 415, "media_type")
    far = replace(GRID, transform=(10, 0, 9e5, 0, -10, 9e6))
    refused(align(app, {"sar": geotiff("sar"), "dem": geotiff("dem", far)}), 422, "georeference")


def test_modalities_tell_how_they_are_shown(app):
    told = ModalityList.model_validate_json(get(app, "/v1/modalities").content)
    assert [m.name for m in told.modalities] == list(NAMES)
    assert len(told.amount_colors) == 256
    for info in told.modalities:
        modality, layer = MODALITIES[info.name], make_layer(info.name)
        if modality.is_categorical:
            assert info.display.channels == ()
            continue
        channels = []
        for channel in info.display.channels:
            low, high = channel.limits
            values = np.tensordot(channel.weights, layer.values.astype(float), 1)
            channels.append(
                np.clip((values - low) / (high - low), 0, 1) ** (1 / info.display.gamma)
            )
        if len(channels) == 1:
            table = np.array([list(bytes.fromhex(c[1:])) for c in info.display.colors])
            shown = table[np.minimum(255, channels[0] * 256).astype(int)]
        else:
            shown = np.stack(channels, axis=-1) * 255
        wanted = pictures.to_rgb(layer.values, layer.valid, modality)
        assert np.abs(shown - wanted)[layer.valid].max() <= 1
