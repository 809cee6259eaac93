"""What pixels tell of each other, solved for: exact where it can be, silent where it must be."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_fixtures import make_model

from mm_model.nn.model import SceneModel
from mm_model.nn.regressions import Regressions

# Modality 0 has two channels, 1 has one, 2 is three classes.
OWNER = torch.tensor([0, 0, 1, 2, 2, 2])
IS_CLASS = OWNER == 2
PATCHES, HEIGHT, WIDTH = 64, 16, 24
PIXELS = HEIGHT * WIDTH


def truth(patches: int, seed: int = 0) -> Tensor:
    """Images whose second modality is a smooth function of the first, and class a threshold."""
    source = torch.Generator().manual_seed(seed)
    first = 0.65 * torch.randn(patches, 2, HEIGHT, WIDTH, generator=source)
    second = 0.6 * torch.sin(2 * first[:, :1]) + 0.3 * first[:, 1:]
    return with_classes(first, second)


def with_classes(first: Tensor, second: Tensor) -> Tensor:
    classes = torch.bucketize(second[:, 0], torch.tensor([-0.3, 0.3]))
    one_hot = torch.nn.functional.one_hot(classes, 3).movedim(-1, 1) - 1 / 3
    return torch.cat([first, second, one_hot], 1)


def fitted(x: Tensor | None = None, known: Tensor | None = None) -> Regressions:
    """From every third pixel of patches of as many places, in batches; known: bool [N, M]."""
    regressions = Regressions(OWNER, IS_CLASS)
    x = truth(PATCHES) if x is None else x
    known = torch.ones(len(x), 3, dtype=torch.bool) if known is None else known
    mask = known[:, :, None, None].expand(-1, -1, HEIGHT, WIDTH)
    x = torch.where(mask[:, OWNER], x, 0)
    at = torch.arange(0, PIXELS, 3).expand(len(x), -1)
    cuts = [0, 5, 9, len(x)]
    spans = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    place = torch.arange(len(x))
    regressions.fit((x[s], mask[s], at[s], place[s]) for s in spans)
    return regressions


def ask(regressions: Regressions, x: Tensor, *shown: int) -> Tensor:
    """[N, C, H, W]: expected, where the named modalities alone are shown."""
    present = torch.zeros(len(x), HEIGHT, WIDTH, 3)
    present[..., list(shown)] = 1
    return regressions(x.movedim(1, -1) * present[..., OWNER], present)


def left(found: Tensor, x: Tensor, channel: int = 2) -> float:
    """Share of the variance that is not told."""
    error = (found - x)[:, channel]
    return float(error.square().mean() / x[:, channel].var())


def test_a_smooth_relation_is_found_and_holds_for_other_patches() -> None:
    other = truth(8, seed=1)
    found = ask(fitted(), other, 0)
    assert left(found, other) < 0.02
    right = found[:, 3:].argmax(1) == other[:, 3:].argmax(1)
    assert right.float().mean() > 0.9


def test_what_only_the_surroundings_tell_is_found() -> None:
    """The second modality is smooth; the first shows it through noise, as radar would."""

    def speckled(patches: int, seed: int) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        coarse = torch.randn(patches, 1, 3, 4, generator=source)
        smooth = 0.5 * torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bilinear")
        noise = torch.randn(patches, 2, HEIGHT, WIDTH, generator=source)
        return with_classes(smooth + noise, smooth)

    other = speckled(16, seed=1)
    found = ask(fitted(speckled(256, seed=0)), other, 0)
    alone = 1 / (1 + 2 * other[:, 2].var())  # of the variance, from the pixel's two channels
    assert left(found, other) < 0.5 * alone


def test_where_nothing_is_observed_it_says_what_is_usual() -> None:
    x, other = truth(PATCHES), truth(2, seed=1)
    found = ask(fitted(x), other)
    assert torch.equal(found[:, :3], torch.zeros_like(other[:, :3]))
    looked = x.flatten(2)[..., ::3]
    usual = (looked[:, 3:].mean((0, 2)) + 1 / 3).log()[:, None, None]
    assert torch.allclose(found[:, 3:], usual.expand_as(found[:, 3:]), atol=1e-4)


def test_a_hole_in_one_source_leaves_the_others() -> None:
    regressions, other = fitted(), truth(1, seed=1)
    present = torch.ones(1, HEIGHT, WIDTH, 3)
    present[..., 1] = 0
    present[:, :7, :, 0] = 0
    seen = other.movedim(1, -1) * present[..., OWNER]
    found = regressions(seen, present)
    alone = ask(regressions, other, 2)
    assert torch.allclose(found[:, 2, :7], alone[:, 2, :7], atol=1e-5)
    assert not torch.allclose(found[:, 2, 7:], alone[:, 2, 7:], atol=1e-2)
    spoilt = other.clone()
    spoilt[:, :2, :7] = 9.0  # what a hole holds is not looked at
    assert torch.equal(regressions(spoilt.movedim(1, -1) * present[..., OWNER], present), found)


def test_means_are_of_what_is_known() -> None:
    """A flat image looks alike, with a hole in it or without, but in the hole."""
    regressions, flat = fitted(), torch.full((1, 6, HEIGHT, WIDTH), 0.3)
    whole, present = ask(regressions, flat, 0), torch.zeros(1, HEIGHT, WIDTH, 3)
    present[..., 0] = 1
    present[:, 3:9, 5:15, 0] = 0
    found = regressions(flat.movedim(1, -1) * present[..., OWNER], present)
    known = present[0, ..., 0] > 0
    assert torch.allclose(found[0, 2][known], whole[0, 2][known], atol=1e-4)


def test_the_better_source_weighs_more() -> None:
    x, other = truth(PATCHES), truth(8, seed=1)
    regressions = fitted(x)
    both = left(ask(regressions, other, 0, 2), other)
    alone = [left(ask(regressions, other, shown), other) for shown in (0, 2)]
    assert alone[0] < 0.2 * alone[1]
    assert both < 2 * alone[0]


def test_a_source_that_tells_nothing_is_not_believed() -> None:
    x = truth(PATCHES)
    x[:, :2] = torch.randn(PATCHES, 2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    regressions = fitted(x)
    assert regressions.trust[0, 2] <= 1.1 * (1 / x[:, 2].var()) ** 2  # no more than a mean is
    assert left(ask(regressions, truth(8, seed=1), 0), truth(8, seed=1)) < 1.1


@pytest.mark.parametrize("together", [0, 3])
def test_a_pair_that_was_hardly_seen_together_tells_nothing(together: int) -> None:
    known = torch.ones(PATCHES, 3, dtype=torch.bool)
    known[together:, 1] = False  # the second only in the first patches
    regressions, other = fitted(known=known), truth(1, seed=1)
    assert regressions.trust[0, 2] == 0 == regressions.trust[1, 0]
    assert torch.equal(ask(regressions, other, 0)[:, 2], torch.zeros(1, HEIGHT, WIDTH))
    assert (regressions.trust[0, 3:] > 0).all()


def test_few_patches_that_mislead_are_not_believed() -> None:
    """Each patch has a level of its own in both modalities, and the two have nothing in common."""
    believed = []
    for seed in range(9):
        source = torch.Generator().manual_seed(seed)
        x = 0.01 * torch.randn(16, 6, HEIGHT, WIDTH, generator=source)
        x[:, :3] += torch.randn(16, 3, 1, 1, generator=source)
        believed.append(fitted(x).trust[0, 2] * x[:, 2].var() ** 2)
    assert torch.stack(believed).median() <= 1  # than which a mean is not less


def test_what_holds_at_one_place_alone_is_not_believed() -> None:
    """All patches of a place have a level of their own, in both modalities."""
    source = torch.Generator().manual_seed(0)
    levels = torch.randn(4, 3, 1, 1, generator=source)
    x = 0.1 * torch.randn(PATCHES, 6, HEIGHT, WIDTH, generator=source)
    place = torch.arange(PATCHES) // (PATCHES // 4)
    x[:, :3] += levels[place]
    mask, at = torch.ones(PATCHES, 3, HEIGHT, WIDTH, dtype=torch.bool), torch.arange(0, PIXELS, 3)
    apart = Regressions(OWNER, IS_CLASS)
    apart.fit([(x, mask, at.expand(PATCHES, -1), place)])
    assert apart.trust[0, 2] <= 1.1 * (1 / x[:, 2].var()) ** 2
    assert fitted(x).trust[0, 2] > 10 * (1 / x[:, 2].var()) ** 2  # were they all of other places


def test_far_from_what_was_seen_nothing_runs_away() -> None:
    x = truth(PATCHES)
    regressions, most = fitted(x), x[:, 2].abs().max()
    far = truth(1, seed=1).sign() * 1000
    assert ask(regressions, far, 0)[:, 2].abs().max() <= most
    assert torch.allclose(ask(regressions, far, 0), ask(regressions, far * 2, 0))


def test_a_sample_does_not_depend_on_those_beside_it() -> None:
    regressions, x = fitted(), truth(8)
    present = torch.ones(8, HEIGHT, WIDTH, 3)
    present[1::2, ..., 2] = 0
    present[0] = 0
    seen = x.movedim(1, -1) * present[..., OWNER]
    whole = regressions(seen, present)
    for i in range(8):
        assert torch.equal(regressions(seen[i : i + 1], present[i : i + 1]), whole[i : i + 1])
    assert torch.equal(regressions(seen[2:5], present[2:5]), whole[2:5])


def test_how_patches_are_batched_does_not_matter() -> None:
    x = truth(PATCHES)
    mask, at = torch.ones(PATCHES, 3, HEIGHT, WIDTH, dtype=torch.bool), torch.arange(0, PIXELS, 3)
    once = Regressions(OWNER, IS_CLASS)
    once.fit([(x, mask, at.expand(PATCHES, -1), torch.arange(PATCHES))])
    assert torch.allclose(once.trust, fitted(x).trust, rtol=1e-3)


def test_a_second_fit_knows_nothing_of_the_first() -> None:
    x = truth(PATCHES)
    mask, at = torch.ones(PATCHES, 3, HEIGHT, WIDTH, dtype=torch.bool), torch.arange(0, PIXELS, 3)
    place = torch.arange(PATCHES)
    once, twice = Regressions(OWNER, IS_CLASS), Regressions(OWNER, IS_CLASS)
    twice.fit([(0.1 * x, mask, at.expand(PATCHES, -1), place)])
    for one in (once, twice):
        one.fit([(x, mask, at.expand(PATCHES, -1), place)])
    for name, buffer in once.named_buffers():
        assert torch.equal(buffer, twice.get_buffer(name))


def test_a_model_keeps_them() -> None:
    model = make_model(regressions=True)
    copy = SceneModel.from_config(model.config)
    copy.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(copy.decoder.regressions.far, model.decoder.regressions.far)
    older = {n: v for n, v in model.config.items() if n != "regressions"}
    assert SceneModel.from_config(older).decoder.regressions is None
