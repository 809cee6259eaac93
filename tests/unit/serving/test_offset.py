"""The offset that Sentinel-2's numbers have since baseline 04.00, told by tag and by range."""

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine
from serving_fixtures import GRID, ask, form, make_generator, make_source, refused, serve_config

from mm_model.api import ModelIdentity
from mm_model.data import raster
from mm_model.errors import LayerError
from mm_model.serving.app import build_app
from mm_model.serving.requests import SceneRequest
from mm_model.serving.scenes import write_scene


def numbers(darkest: int = 200) -> np.ndarray:
    """Digital numbers of a place with dark water."""
    rng = np.random.default_rng(3)
    values = rng.integers(darkest, 2500, (3, *GRID.shape))
    values[:, :5] = darkest + 40 * np.arange(3)[:, None, None]
    return values


def sentinel(values, *, dtype="uint16", scale=1e-4, offset=0.0, tags=None) -> bytes:
    height, width = GRID.shape
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff", height=height, width=width, count=3, dtype=dtype,
            crs=GRID.crs, transform=Affine(*GRID.transform),
        ) as file:  # fmt: skip
            file.write(values.astype(dtype))
            file.scales, file.offsets = [scale] * 3, [offset] * 3
            file.update_tags(**(tags or {}))
        return bytes(memory.getbuffer())


RAISED = numbers() + 1000
RAISED_REFUSED = {
    "by range": sentinel(RAISED),
    "by its baseline, though bright": sentinel(
        numbers(900) + 1000, tags={"PROCESSING_BASELINE": "05.10"}
    ),
    "by its baseline, as floats": sentinel(
        RAISED * 1e-4, dtype="float32", scale=1.0, tags={"PROCESSING_BASELINE": "04.00"}
    ),
}
TAKEN = {
    "offset declared": sentinel(RAISED, offset=-0.1, tags={"PROCESSING_BASELINE": "05.10"}),
    "said to be none": sentinel(RAISED, tags={"BOA_ADD_OFFSET": "0"}),
    "before there was one": sentinel(numbers(), tags={"PROCESSING_BASELINE": "02.14"}),
    "never raised": sentinel(numbers()),
    "taken away already": sentinel(numbers(), tags={"PROCESSING_BASELINE": "05.10"}),
    "bright, and nothing says so": sentinel(numbers(900) + 1000),
    "floats in reflectance": sentinel(RAISED * 1e-4, dtype="float32", scale=1.0),
}


@pytest.fixture(scope="module")
def app():
    return build_app(make_source(max_side_px=64), serve_config())


@pytest.mark.parametrize("name", RAISED_REFUSED)
def test_reflectance_that_is_a_tenth_too_bright_is_refused(app, name, tmp_path):
    content = RAISED_REFUSED[name]
    (answer,) = ask(app, form({"rgb": content}, target="dem", steps=1))
    problem = refused(answer, 422, "layer")
    assert problem.detail == "layer rgb: offset"
    assert "-offset -0.1" in problem.remedy
    # Of a file of any size, too, and of the copy of an upload that a scene is made of.
    (answer,) = ask(app, form({"rgb": content}, target="dem", uncertainty="true", samples=2))
    assert refused(answer, 422, "layer") == problem.model_copy(
        update={"request_id": answer.headers["x-request-id"]}
    )
    file = tmp_path / "rgb.tif"
    file.write_bytes(content)
    with pytest.raises(LayerError, match="offset"):
        write_scene(
            make_generator(),
            SceneRequest({"rgb": file}, ("dem",), steps=1),
            ModelIdentity(name="mm-test", version="1"),
            tmp_path / "out",
        )


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_declared_or_cannot_be_told_is_taken(app, name):
    (answer,) = ask(app, form({"rgb": TAKEN[name]}, path="/v1/align"))
    assert answer.status_code == 200, answer.text


def test_the_declared_offset_is_applied(app):
    """What is refused is 0.1 brighter than what the remedy makes of it."""
    declared = raster.read_raster(TAKEN["offset declared"])
    right = raster.read_raster(TAKEN["never raised"])
    np.testing.assert_array_equal(declared.values, right.values + 1000)
    answers = ask(
        app,
        *(
            form({"rgb": TAKEN[n]}, target="dem", steps=1)
            for n in ("offset declared", "never raised")
        ),
    )
    one, other = (raster.read_raster(a.content).values for a in answers)
    np.testing.assert_allclose(one, other, atol=0.05)
