"""A modality that is learnt later: what stood before it does not move."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_fixtures import FIVE, NAMES, make_model, make_scene, statistics

from mm_model.conditions import FEATURES
from mm_model.errors import ConfigError
from mm_model.generative.sampler import mean_scene, sample
from mm_model.modalities import MODALITIES
from mm_model.nn.model import SceneModel
from mm_model.training.step import draw, step_loss

PAN = MODALITIES["pan"]
SIX = (*FIVE, PAN)
SETS = [{"modalities": ["rgb", "pan"], "patches": 7}, {"modalities": [*NAMES, "pan"], "patches": 3}]


def grow(model: SceneModel) -> SceneModel:
    grown = model.add(PAN, statistics(SIX), SETS)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in grown.added["pan"].parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return grown.eval()


BEFORE = make_model(regressions=True).requires_grad_(
    False
)  # as a bundle is loaded: torch rounds otherwise with it
AFTER = grow(BEFORE).requires_grad_(False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("targets", [["rgb", "map"], ["rgb", "map", "pan"]])
def test_others_stay_what_they_were_bit_for_bit(precision: str, targets: list[str]) -> None:
    scene = make_scene().only("sar", "dem")
    seeds = [4, 5, 6]
    was = sample(BEFORE, *BEFORE.codec.encode(scene), ["rgb", "map"], seeds, 2, precision=precision)
    now = sample(AFTER, *AFTER.codec.encode(scene), targets, seeds, 2, precision=precision)
    assert torch.equal(now[:, : was.shape[1]], was)
    assert (now[:, was.shape[1] :] != 0).any() == ("pan" in targets)


def test_an_added_modality_is_seen_and_made() -> None:
    scene = make_scene(SIX)
    seen = AFTER.codec.encode(scene.only("pan"))
    nothing = AFTER.codec.empty(3, 16, 24)
    assert not torch.allclose(mean_scene(AFTER, *seen), mean_scene(AFTER, *nothing), atol=1e-3)
    a, b = (sample(AFTER, *seen, ["rgb"], [1, 2, s], 2) for s in (3, 3))
    assert torch.equal(a, b)
    made = sample(AFTER, *AFTER.codec.encode(scene.only("rgb")), ["pan"], [1, 2, 3], 2)
    assert made[:, AFTER.codec.slices["pan"]].std() > 0.1


def test_training_moves_the_added_part_alone() -> None:
    model = grow(BEFORE).train()
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    free = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(free, 1e-2)
    x, mask = model.codec.encode(make_scene(SIX))
    for step in range(3):
        draws = draw(model, 0, step, range(3), mask)
        step_loss(model, x, mask, torch.zeros(3, FEATURES), draws).total.backward()
        optimiser.step()
        optimiser.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, kept[n])}
    assert moved == {n for n in kept if n.startswith("added.pan.")}


def test_the_true_scene_is_that_of_the_settled_modalities() -> None:
    """What the flow learns to find must not depend on inputs that are still learning."""
    x, mask = AFTER.codec.encode(make_scene(SIX))
    draws = draw(AFTER, 0, 0, range(3), mask)
    draws = draws.__class__(**{**draws.__dict__, "observed": torch.zeros_like(draws.observed)})
    losses = []
    for value in (0.0, 5.0):
        x[:, AFTER.codec.slices["pan"]] = value
        losses.append(step_loss(AFTER, x, mask, torch.zeros(3, FEATURES), draws).flow)
    assert torch.equal(*losses)


def test_one_more_after_the_first() -> None:
    thermal = MODALITIES["tir"]
    seven = (*SIX, thermal)
    last = AFTER.add(thermal, statistics(seven), [])
    assert last.added_names == ("pan", "tir")
    assert {n.split(".")[1] for n, p in last.named_parameters() if p.requires_grad} == {"tir"}
    scene = make_scene().only("sar")
    was = sample(AFTER, *AFTER.codec.encode(scene), ["rgb", "pan"], [1, 2, 3], 2)
    now = sample(last.eval(), *last.codec.encode(scene), ["rgb", "pan"], [1, 2, 3], 2)
    assert torch.equal(now[:, : was.shape[1]], was)


def test_configuration_knows_what_was_added() -> None:
    copy = SceneModel.from_config(AFTER.config)
    copy.load_state_dict(AFTER.state_dict(), strict=True)
    assert copy.added_names == ("pan",)
    for added in (["rgb"], [*NAMES, "pan"], ["pan", "pan"]):
        with pytest.raises(ConfigError):
            SceneModel.from_config({**AFTER.config, "added": added})
