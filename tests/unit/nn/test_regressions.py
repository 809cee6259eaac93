"""What pixels tell of each other, solved for: exact where it can be, silent where it must be."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_fixtures import FIVE, make_model

from mm_model.nn.model import SceneModel
from mm_model.nn.regressions import Regressions

# Modality 0 has two channels, 1 has one, 2 is three classes.
OWNER = torch.tensor([0, 0, 1, 2, 2, 2])
IS_CLASS = OWNER == 2
PATCHES, PIXELS = 64, 128


def truth(count: int, seed: int = 0) -> Tensor:
    """Pixels whose second modality is a smooth function of the first, and class a threshold."""
    source = torch.Generator().manual_seed(seed)
    first = 0.65 * torch.randn(count, 2, generator=source)
    second = 0.6 * torch.sin(2 * first[:, :1]) + 0.3 * first[:, 1:]
    classes = torch.bucketize(second[:, 0], torch.tensor([-0.3, 0.3]))
    one_hot = torch.nn.functional.one_hot(classes, 3) - 1 / 3
    return torch.cat([first, second, one_hot], 1)


def fitted(known: Tensor | None = None, pixels: Tensor | None = None) -> Regressions:
    regressions = Regressions(OWNER, IS_CLASS)
    pixels = truth(PATCHES * PIXELS) if pixels is None else pixels
    known = torch.ones(len(pixels), 3, dtype=torch.bool) if known is None else known
    patch = torch.arange(len(pixels)) // PIXELS
    regressions.fit(torch.where(known[:, OWNER], pixels, 0), known, patch)
    return regressions


def ask(regressions: Regressions, pixels: Tensor, *shown: int) -> Tensor:
    """[N, C]: expected, of pixels that show the named modalities alone; as a wide image."""
    present = torch.zeros(1, 8, len(pixels) // 8, 3)
    present[..., list(shown)] = 1
    seen = pixels.view(1, 8, -1, 6) * present[..., OWNER]
    return regressions(seen, present)[0].flatten(1).T


def left(found: Tensor, pixels: Tensor, channel: int = 2) -> float:
    """Share of the variance that is not told."""
    error = (found - pixels)[:, channel]
    return float(error.square().mean() / pixels[:, channel].var())


def test_a_smooth_relation_is_found_and_holds_for_other_pixels() -> None:
    other = truth(1024, seed=1)
    found = ask(fitted(), other, 0)
    assert left(found, other) < 0.01
    right = found[:, 3:].argmax(1) == other[:, 3:].argmax(1)
    assert right.float().mean() > 0.9


def test_where_nothing_is_observed_it_says_what_is_usual() -> None:
    regressions, other = fitted(), truth(64, seed=1)
    found = ask(regressions, other)
    assert torch.equal(found[:, :3], torch.zeros(64, 3))
    usual = (truth(PATCHES * PIXELS)[:, 3:].mean(0) + 1 / 3).log()
    assert torch.allclose(found[:, 3:], usual.expand(64, 3), atol=1e-5)


def test_it_is_of_pixels_and_a_hole_in_one_source_leaves_the_others() -> None:
    regressions, other = fitted(), truth(64, seed=1)
    present = torch.zeros(1, 4, 16, 3)
    present[..., 0] = 1
    present[:, :2, :, 0] = 0
    present[..., 2] = 1
    found = regressions(other.view(1, 4, 16, 6) * present[..., OWNER], present)[0].flatten(1).T
    assert torch.allclose(found[:32], ask(regressions, other, 2)[:32], atol=1e-5)
    assert torch.allclose(found[32:], ask(regressions, other, 0, 2)[32:], atol=1e-5)


def test_the_better_source_weighs_more() -> None:
    pixels = truth(PATCHES * PIXELS)
    other = truth(1024, seed=1)
    both = left(ask(fitted(), other, 0, 2), other)
    alone = left(ask(fitted(), other, 0), other), left(ask(fitted(), other, 2), other)
    assert alone[0] < 0.1 * alone[1]
    assert both < 2 * alone[0]
    noise = torch.randn(len(pixels), 2, generator=torch.Generator().manual_seed(2))
    useless = pixels.clone()
    useless[:, :2] = noise
    found = fitted(pixels=useless)
    assert found.trust[0, 2] < 1.1 * (1 / pixels[:, 2].var()) ** 2  # no more than a mean would


@pytest.mark.parametrize("together", [0, 7])
def test_a_pair_that_was_hardly_seen_together_tells_nothing(together: int) -> None:
    known = torch.ones(PATCHES * PIXELS, 3, dtype=torch.bool)
    known[together * PIXELS :, 1] = False  # the second only in the first patches
    regressions = fitted(known)
    assert regressions.trust[0, 2] == 0 == regressions.trust[1, 0]
    found = ask(regressions, truth(64, seed=1), 0)
    assert torch.equal(found[:, 2], torch.zeros(64))
    assert (regressions.trust[0, 3:] > 0).all()


def test_few_patches_that_mislead_are_not_believed() -> None:
    """A relation that holds within each half of the patches and in no other."""
    pixels = torch.randn(8 * PIXELS, 6, generator=torch.Generator().manual_seed(0))
    patch = torch.arange(8 * PIXELS) // PIXELS
    pixels[:, 0] = patch + 0.01 * pixels[:, 0]
    pixels[:, 2] = torch.randn(8, generator=torch.Generator().manual_seed(5))[patch]
    assert fitted(pixels=pixels).trust[0, 2] <= 1.1 * (1 / pixels[:, 2].var()) ** 2


def test_a_sample_does_not_depend_on_those_beside_it() -> None:
    regressions = fitted()
    seen = truth(8 * 16 * 24).view(8, 16, 24, 6)
    present = torch.ones(8, 16, 24, 3)
    present[1::2, ..., 2] = 0
    present[0] = 0
    seen = seen * present[..., OWNER]
    whole = regressions(seen, present)
    for i in range(8):
        assert torch.equal(regressions(seen[i : i + 1], present[i : i + 1]), whole[i : i + 1])
    assert torch.equal(regressions(seen[2:5], present[2:5]), whole[2:5])


def test_a_model_keeps_them_and_grows_with_them() -> None:
    model = make_model(regressions=True)
    copy = SceneModel.from_config(model.config)
    copy.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(copy.decoder.regressions.weight, model.decoder.regressions.weight)
    older = {n: v for n, v in model.config.items() if n != "regressions"}
    assert SceneModel.from_config(older).decoder.regressions is None
    assert sum(m.channels for m in FIVE) == len(model.decoder.regressions.prior)
