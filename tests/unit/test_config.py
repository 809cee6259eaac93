"""params.yaml of the project and of the example, and the page that explains it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mm_model.config import load_params, read_yaml
from mm_model.errors import ConfigError

ROOT = Path(__file__).parents[2]


def leaves(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_the_page_tells_every_key_with_its_value():
    told = dict(
        re.findall(
            r"^\| `([\w.<>]+)` \| ([^|]*) \|", (ROOT / "docs/parameters.md").read_text(), re.M
        )
    )
    params = dict(leaves(read_yaml(ROOT / "params.yaml")))
    tiny = "model.sizes.tiny."
    wanted = {
        key.replace(tiny, "model.sizes.<size>."): ", ".join(map(str, value))
        if isinstance(value, list)
        else str(value)
        for key, value in params.items()
        if key.startswith(tiny) or not key.startswith("model.sizes.")
    }
    assert told == wanted


@pytest.mark.parametrize("folder", [".", "examples/real", "examples/stac"])
def test_the_projects_own_parameters_hold(folder):
    assert load_params(ROOT / folder / "params.yaml").selected


def test_a_misspelt_key_is_named(tmp_path):
    text = (ROOT / "params.yaml").read_text().replace("margin_m:", "margin:")
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"split\.margin"):
        load_params(tmp_path / "params.yaml")
