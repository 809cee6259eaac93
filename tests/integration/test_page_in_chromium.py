"""The page at `/` in a real browser, over a real endpoint on a small model."""

import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from mm_model import pictures
from mm_model.data import georeference, raster
from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES
from mm_model.serving.access import KeyScope, new_key, parse_keys
from mm_model.serving.app import build_app

sys.path.insert(0, str(Path(__file__).parents[1] / "unit/serving"))
from serving_fixtures import GRID, geotiff, listening, make_layer, make_source, serve_config

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed"),
]
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 780}
DONE = re.compile("^Done in")
expect.set_options(timeout=60_000)  # machines are busy


@contextmanager
def endpoint(**more):
    """The address of an application that listens on this machine."""
    app = build_app(make_source(max_side_px=96), serve_config(max_side_px=96), **more)
    with listening(app) as url:
        yield f"{url}/"


@pytest.fixture(scope="module")
def address():
    with endpoint() as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@contextmanager
def opened(browser, address, size=DESKTOP, **more):
    """The page, which asks nobody but its endpoint and breaks no rule of its policy."""
    with browser.new_context(viewport=size, accept_downloads=True, **more) as context:
        page = context.new_page()
        asked, complaints = set(), []
        page.on("request", lambda request: asked.add(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if "Policy" in m.text else None)
        page.goto(address)
        expect(page.locator("#generate")).to_be_enabled()
        yield page
        strangers = [u for u in asked if not u.startswith((address, "blob:"))]
        assert (strangers, complaints) == ([], [])


def named(name: str, content: bytes) -> dict:
    return {"name": name, "mimeType": "image/tiff", "buffer": content}


def drop(page, *files: dict) -> None:
    """Drop files as a person does, from outside the browser."""
    page.evaluate(
        """files => {
          const data = new DataTransfer();
          for (const [name, bytes] of files)
            data.items.add(new File([new Uint8Array(bytes)], name, {type: "image/tiff"}));
          document.body.dispatchEvent(
            new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        [[file["name"], list(file["buffer"])] for file in files],
    )


def generate(page) -> None:
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_have_text(DONE)


def download(page, link: str) -> bytes:
    with page.expect_download() as found:
        page.get_by_role("link", name=link).click()
    return Path(found.value.path()).read_bytes()


def test_files_are_seen_in_their_place_generated_from_and_downloaded(browser, address):
    with opened(browser, address) as page:
        drop(page, named("scene one.tif", geotiff("sar")), named("x_dem.tif", geotiff("dem")))
        expect(page.locator("#status")).to_have_text("2 observed, 40 × 24 px.")
        lon, lat = georeference.to_lonlat(GRID.crs, *zip(GRID.xy(12, 20), strict=True))[0]
        expect(page.locator("#where")).to_have_text(f"{lat:.2f}° N, {lon:.2f}° E")
        expect(page.get_by_label("What scene one.tif shows")).to_have_value("sar")
        page.get_by_label("Samples").fill("2")
        page.get_by_label("Seed", exact=True).fill("9007199254740993")  # no double holds it
        generate(page)
        assert page.locator("#left").input_value() == "observed sar"
        assert page.locator("#right").input_value() == "generated rgb"
        command = page.locator("#curl").text_content()
        content = download(page, "all, as a zip")
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            assert set(archive.namelist()) == {
                "manifest.json", "rgb_0.tif", "rgb_1.tif", "map_0.tif", "map_1.tif",
                "map_0.tif.aux.xml", "map_1.tif.aux.xml",
            }  # fmt: skip
            alone = archive.read("map_1.tif")
            found = raster.read_raster(archive.read("rgb_1.tif"))
        assert found.grid == GRID
        assert found.tags["MM_SEED"] == "9007199254740993"
        assert download(page, "map_1.tif") == alone
    if shutil.which("curl"):
        assert run_curl(command, {"scene one.tif": "sar", "x_dem.tif": "dem"}) == content


def run_curl(command: str, files: dict[str, str]) -> bytes:
    """What the command that the page shows gets, run by a shell beside the files."""
    with tempfile.TemporaryDirectory() as folder:
        for file, name in files.items():
            (Path(folder) / file).write_bytes(geotiff(name))
        subprocess.run(["sh", "-c", command], cwd=folder, check=True, capture_output=True)
        return (Path(folder) / "generated.zip").read_bytes()


@pytest.mark.parametrize("name", ["sar", "rgb", "dem", "map"])
def test_the_page_shows_the_colours_that_the_endpoint_itself_draws(browser, address, name):
    """What its modules read and paint, beside `pictures.to_rgb` of the same values."""
    modality, layer = MODALITIES[name], make_layer(name, Grid("", GRID.transform, 31, 52))
    limits = None
    if pictures.is_relative(modality):
        limits = pictures.robust_limits([(layer.values, layer.valid)])
    content = raster.write_geotiff(None, layer.values, layer.valid, layer.grid, modality)
    with opened(browser, address) as page:
        painted = page.evaluate(
            """async ([name, bytes]) => {
              const [{readGeotiff}, {paint, robustLimits}, {get}] = await Promise.all(
                ["geotiff", "picture", "endpoint"].map((m) => import(`/page/${m}.js`)));
              const {modalities} = await get("v1/modalities");
              const modality = modalities.find((m) => m.name === name);
              const pixels = await readGeotiff(new Uint8Array(bytes));
              const limits = modality.display.relative ? robustLimits(pixels) : null;
              const {width, height} = pixels;
              const context = paint(modality, pixels, limits).getContext("2d");
              return Array.from(context.getImageData(0, 0, width, height).data);
            }""",
            [name, list(content)],
        )
    found = np.array(painted, np.int16).reshape(*layer.grid.shape, 4)
    wanted = pictures.to_rgb(layer.values, layer.valid, modality, limits).astype(np.int16)
    assert (found[..., 3] == np.where(layer.valid, 255, 0)).all()
    # A level of 255 where rounding differs; of a colour map, a step of its 256.
    assert np.abs(found[..., :3] - wanted)[layer.valid].max() <= 4


def test_mean_and_spread_are_those_of_the_samples(browser, address):
    rng = np.random.default_rng(5)
    numbers = rng.normal(-12, 4, (5, 2, 6, 7)).astype(np.float32)
    classes = rng.choice([10, 20, 80], (5, 1, 6, 7)).astype(np.uint8)
    with opened(browser, address) as page:

        def moments(kind, samples):
            found = page.evaluate(
                """async ([kind, samples]) => {
                  const {moments} = await import("/page/picture.js");
                  const {mean, spread} = moments({kind}, samples);
                  return [mean.bands.map((band) => Array.from(band)), Array.from(spread)];
                }""",
                [
                    kind,
                    [
                        {"width": 7, "height": 6, "bands": [b.ravel().tolist() for b in sample]}
                        for sample in samples
                    ],
                ],
            )
            return [np.array(part) for part in found]

        mean, spread = moments("continuous", numbers)
        codes, entropy = moments("categorical", classes)
    np.testing.assert_allclose(mean, numbers.mean(axis=0).reshape(2, -1), rtol=1e-5)
    spreads = numbers.std(axis=0, ddof=1).mean(axis=0).ravel()
    np.testing.assert_allclose(spread, spreads, rtol=1e-5)
    shares = np.stack([(classes == c).mean(axis=0).ravel() for c in (10, 20, 80)])
    logs = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
    np.testing.assert_allclose(entropy, -(shares * logs).sum(axis=0), atol=1e-6)
    chosen = np.stack([codes[0] == c for c in (10, 20, 80)])
    assert (shares[chosen] == np.broadcast_to(shares.max(axis=0), shares.shape)[chosen]).all()


def test_the_line_swipes_with_the_mouse_and_with_keys_and_values_have_units(browser, address):
    with opened(browser, address) as page:
        page.set_input_files(
            "#files", [named("a.tif", geotiff("sar")), named("b.tif", geotiff("dem"))]
        )
        expect(page.locator("#status")).to_have_text(re.compile("^2 observed"))
        page.locator("#right").select_option("observed dem")
        mixed = {at: picture(page, at) for at in ("0", "500", "1000")}
        page.locator("#right").select_option("observed sar")
        sar = picture(page, "1000")
        page.locator("#left").select_option("observed dem")
        page.locator("#right").select_option("observed dem")
        dem = picture(page, "1000")
        assert (sar != dem).any()
        middle, thumb_px = sar.shape[1] // 2, 32
        np.testing.assert_array_equal(mixed["1000"], sar)
        np.testing.assert_array_equal(mixed["0"], dem)
        np.testing.assert_array_equal(
            mixed["500"][:, : middle - thumb_px], sar[:, : middle - thumb_px]
        )
        np.testing.assert_array_equal(
            mixed["500"][:, middle + thumb_px :], dem[:, middle + thumb_px :]
        )
        page.locator("#left").select_option("observed sar")
        swipe = page.locator("#swipe")
        for key, wanted in (("Home", "0"), ("ArrowRight", "1"), ("End", "1000")):
            swipe.press(key)
            assert swipe.input_value() == wanted
        box = page.locator("#ground").bounding_box()
        middle = box["y"] + box["height"] / 2
        page.mouse.move(box["x"] + box["width"] - 22, middle)  # the thumb
        page.mouse.down()
        page.mouse.move(box["x"] + 22, middle, steps=4)
        page.mouse.up()
        assert int(swipe.input_value()) < 20
        page.locator("#ground").press("0")  # and its middle is told
        layer, at = make_layer("sar"), (12, 20)
        vv, vh = (float(band[at]) for band in layer.values)
        told = page.locator("#left-values").text_content().replace("−", "-")
        assert told.startswith(
            f"VV {vv:.{2 - (abs(vv) >= 10)}f} dB, VH {vh:.{2 - (abs(vh) >= 10)}f} dB at "
        )
        assert re.match(r"\d+(\.\d+)? m at ", page.locator("#right-values").text_content())
        expect(page.locator("#right-legend .ticks")).to_have_text(re.compile(r" m.* m.* m$"))


def picture(page, swipe: str) -> np.ndarray:
    """The map, without its margins, where the line's thumb lies at the ends."""
    page.locator("#swipe").fill(swipe)
    page.mouse.move(0, 0)
    shot = page.locator("#ground").screenshot()
    found = np.asarray(Image.open(io.BytesIO(shot)).convert("RGB"))
    return found[80:-60, 100:-100]


def test_zooming_without_end_ends_where_there_is_something_to_see(browser, address):
    with opened(browser, address) as page:
        drop(page, named("sar.tif", geotiff("sar")))
        expect(page.locator("#status")).to_have_text(re.compile("^1 observed"))
        ground = page.locator("#ground")
        for key, turn in (("+", -1e6), ("-", 1e6)):
            for presses in (100, 0):
                ground.press("0")
                whole = ground.screenshot()
                for _ in range(presses):
                    ground.press(key)
                if not presses:
                    ground.dispatch_event("wheel", {"deltaY": turn})
                ends = ground.screenshot()
                ground.press(key)
                assert ground.screenshot() == ends != whole


def test_on_a_phone_and_with_keys_alone_a_place_is_made_from_nothing(browser, address):
    with opened(browser, address, PHONE, has_touch=True, is_mobile=True) as page:
        for wanted in ("a", "#files", "#width", "#height", "#targets input"):
            page.keyboard.press("Tab")
            assert page.evaluate("s => document.activeElement.matches(s)", wanted), wanted
        page.locator("#width").fill("64")
        page.locator("#height").fill("48")
        page.locator("#seed").press("Enter")
        expect(page.locator("#status")).to_have_text(DONE)
        expect(page.locator("#right-title")).to_contain_text("generated")
        sides = [page.locator(side).input_value() for side in ("#left", "#right")]
        assert sides == ["generated rgb", "generated sar"]  # to be swiped between
        found = raster.read_raster(download(page, "map.tif"))
        assert found.grid.shape == (48, 64)
        wide = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1] == PHONE["width"]


def test_what_the_endpoint_refuses_is_said_in_its_words_beside_the_file(browser, address):
    layer, modality = make_layer("sar"), MODALITIES["sar"]
    linear = raster.write_geotiff(None, 10 ** (layer.values / 10), layer.valid, GRID, modality)
    answer = httpx.post(f"{address}v1/align", files={"sar": linear})
    problem = answer.json()
    assert answer.status_code == 422
    with opened(browser, address) as page:
        page.set_input_files(
            "#files", [named("power.tif", linear), named("dem.tif", geotiff("dem"))]
        )
        card = page.locator("#cards li", has_text="power.tif")
        for part in ("detail", "got", "allowed", "remedy"):
            expect(card.locator(".problem")).to_contain_text(problem[part])
        page.get_by_role("button", name="Remove power.tif").press("Enter")
        expect(page.locator("#status")).to_have_text("1 observed, 40 × 24 px.")
        expect(page.locator(".problem")).to_have_count(0)
        page.locator("#seed").fill("9223372036854775808")  # one too many
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("alert")).to_contain_text("seed")
        expect(page.locator("#status")).to_have_text("Nothing was generated.")


def test_two_files_of_a_modality_are_one_layer_and_the_wrong_one_is_named(browser, address):
    with opened(browser, address) as page:
        june, august = geotiff("sar"), geotiff("sar", seed=1, hole=False)
        drop(page, named("june.tif", june), named("august.tif", august))
        expect(page.locator("#status")).to_have_text("1 observed, 40 × 24 px.")
        for name, turn in (("june.tif", "1 of 2"), ("august.tif", "2 of 2")):
            expect(page.locator("#cards li", has_text=name).locator("small")).to_contain_text(turn)
        expect(page.locator("#curl")).to_contain_text(
            re.compile("sar=@june.tif.*sar=@august.tif", re.S)
        )
        page.locator("#steps").fill("1")
        generate(page)
        parts = [("sar", ("a.tif", june)), ("sar", ("b.tif", august))]
        fields = {"target": ["rgb", "dem", "map"], "steps": "1", "seed": "0"}
        answer = httpx.post(f"{address}v1/generate", files=parts, data=fields)
        assert download(page, "all, as a zip") == answer.content
        layer = make_layer("sar")
        linear = raster.write_geotiff(
            None, 10 ** (layer.values / 10), layer.valid, GRID, MODALITIES["sar"]
        )
        drop(page, named("power.tif", linear))
        card = page.locator("#cards li", has_text="power.tif")
        expect(card.locator(".problem")).to_contain_text("layer sar (3 of 3), band VV")
        expect(page.locator(".problem")).to_have_count(1)


def test_a_file_that_lacks_a_band_is_known_by_those_it_has(browser, address):
    with opened(browser, address) as page:
        drop(page, named("scene.tif", geotiff("sar", bands=("VV",))))
        expect(page.get_by_label("What scene.tif shows")).to_have_value("sar")
        expect(page.locator("#status")).to_contain_text("from the other bands: sar VH.")
        generate(page)


def test_a_file_name_is_text_wherever_it_is_shown(browser, address):
    name = "<img src=x onerror=document.title='owned'>';touch owned; \".tif"
    with opened(browser, address) as page:
        title = page.title()
        drop(page, named(name, geotiff("sar")))
        expect(page.locator("#status")).to_have_text(re.compile("^1 observed"))
        expect(page.locator("#cards .name")).to_have_text(name)
        page.get_by_label("Wanted").or_(page.locator("#targets")).first.wait_for()
        assert (page.title(), page.locator("#cards img").count()) == (title, 0)
        command = page.locator("#curl").text_content()
    if shutil.which("curl"):
        run_curl(command, {name: "sar"})  # the shell takes it for one word, and curl for one name


def test_what_runs_can_be_cancelled(browser, address):
    with opened(browser, address) as page:
        for field, value in {"width": 96, "height": 96, "samples": 8, "steps": 32}.items():
            page.locator(f"#{field}").fill(str(value))
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("progressbar")).to_be_visible()
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#status")).to_have_text("Cancelled.")
        expect(page.locator("#generate")).to_be_enabled()


def test_it_shows_the_share_of_the_steps_that_is_done(browser, address):
    with opened(browser, address) as page:
        for field, value in {"width": 96, "height": 96, "samples": 16, "steps": 64}.items():
            page.locator(f"#{field}").fill(str(value))
        page.get_by_role("button", name="Generate").click()
        elapsed = page.locator("#elapsed")
        expect(elapsed).to_have_text(re.compile(r"^\d+ %, \d+ s$"))
        first = share_of(page)
        assert 0 < first < 1
        give_up = time.monotonic() + 60
        while share_of(page) <= first:
            assert time.monotonic() < give_up
            time.sleep(0.1)
        page.get_by_role("button", name="Cancel").click()
        expect(page.locator("#status")).to_have_text("Cancelled.")


def share_of(page) -> float:
    return page.get_by_role("progressbar").evaluate("bar => bar.position")


def test_a_key_is_asked_for_where_one_is_needed_and_kept_in_memory_alone(browser):
    key, line = new_key("somebody", frozenset({KeyScope.GENERATE}))
    with endpoint(keys=parse_keys(line, "test")) as address, browser.new_context() as context:
        page = context.new_page()
        page.goto(address)
        for given in ("mm_wrong", key):
            page.get_by_label("API key", exact=True).fill(given)
            page.keyboard.press("Enter")
            if given != key:
                expect(page.locator("#key-problem")).to_contain_text("no API key that is known")
        expect(page.locator("#generate")).to_be_enabled()
        page.locator("#width").fill("32")
        page.locator("#height").fill("48")
        generate(page)
        assert '-H "Authorization: Bearer $MM_API_KEY"' in page.locator("#curl").text_content()
        assert key not in page.content()
        state = context.storage_state(indexed_db=True)
        assert (state["cookies"], state["origins"]) == ([], [])
        assert page.evaluate("sessionStorage.length") == 0
        page.reload()
        expect(page.get_by_label("API key", exact=True)).to_be_visible()


def test_who_asks_while_the_files_are_read_gets_the_answer_on_their_grid(browser, address):
    with opened(browser, address) as page:
        held, generated = [], []
        page.route("**/v1/align", lambda route: held.append(route))
        page.on("request", lambda r: generated.append(r) if r.url.endswith("generate") else None)
        for unwanted in ("dem", "map"):
            page.locator("#targets label", has_text=unwanted).locator("input").uncheck()
        page.set_input_files("#files", named("sar.tif", geotiff("sar")))
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("button", name="Cancel")).to_be_visible()
        expect(page.locator("#status")).to_have_text("The endpoint reads the files …")
        assert (len(held), generated) == (1, [])
        held[0].continue_()
        expect(page.locator("#status")).to_have_text(DONE)
        assert len(generated) == 1
        assert page.locator("#left").input_value() == "observed sar"
        assert page.locator("#right").input_value() == "generated rgb"
        expect(page.locator("#right-legend")).not_to_contain_text("another reference system")


def test_a_file_that_the_browser_cannot_read_is_said_and_stops_nothing_else(browser, address):
    with opened(browser, address) as page:
        page.evaluate("() => { Blob.prototype.text = () => Promise.reject(Error('it is gone')); }")
        drop(page, named("sar.tif", geotiff("sar")))
        expect(page.locator("#problem")).to_contain_text("it is gone")
        expect(page.locator("#cards li")).to_have_count(0)
        for side in ("#width", "#height"):
            page.locator(side).fill("32")
        generate(page)


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_every_control_has_a_name_and_every_text_contrast(browser, address, size):
    with opened(browser, address, size) as page:
        page.set_input_files("#files", named("sar.tif", geotiff("sar")))
        page.locator("#samples").fill("2")
        generate(page)
        page.locator("summary").click()
        nameless = page.evaluate(
            """() => [...document.querySelectorAll("input, select, button, canvas, progress")]
              .filter((e) => e.checkVisibility() && !e.closest("[id$=legend]"))
              .map((e) => [e, e.ariaLabel || e.labels?.[0]?.textContent || e.textContent])
              .filter(([, name]) => !name.trim())
              .map(([e]) => e.outerHTML)"""
        )
        assert nameless == []
        faint = page.evaluate(CONTRAST)
        assert faint == []


# WCAG 2: texts whose contrast to the nearest painted background is below 4.5.
CONTRAST = """() => {
  const rgba = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b]
    .map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const color = rgba(getComputedStyle(e).backgroundColor);
      if (color.length === 3 || color[3] > 0.9) return color;
    }
    return [255, 255, 255];
  };
  const texts = [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() &&
    !e.matches(":disabled, option, optgroup") &&
    [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  if (texts.length < 30) return ["too few texts: " + texts.length];
  return texts.map((e) => {
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    return [e.outerHTML.slice(0, 80), (a + 0.05) / (b + 0.05)];
  }).filter(([, ratio]) => ratio < 4.5);
}"""
