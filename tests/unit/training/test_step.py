from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from model_fixtures import FIVE, NAMES, make_model, make_scene, spoil

from mm_model.conditions import FEATURES, GROUPS
from mm_model.generative.sampler import decode_scene
from mm_model.modalities import select
from mm_model.scene import Scene
from mm_model.training.step import Draws, TrainingStep, draw, flow_step_loss, step_loss

MODEL = make_model()
UNKNOWN = torch.zeros(3, FEATURES)


def rows(draws: Draws, which: list[int]) -> Draws:
    return Draws(*(getattr(draws, f.name)[which] for f in dataclasses.fields(Draws)))


def test_draws_depend_on_seed_step_and_index_alone() -> None:
    _, mask = MODEL.codec.encode(make_scene())
    whole = draw(MODEL, 7, 11, [4, 5, 6], mask)
    part = draw(MODEL, 7, 11, [6], mask[2:])
    for field in dataclasses.fields(Draws):
        a, b = getattr(rows(whole, [2]), field.name), getattr(part, field.name)
        assert torch.equal(a, b), field.name
    for other in (draw(MODEL, 8, 11, [6], mask[2:]), draw(MODEL, 7, 12, [6], mask[2:])):
        assert not torch.equal(other.noise, part.noise)


def test_draws_keep_the_rules() -> None:
    source = torch.Generator().manual_seed(0)
    available = torch.rand(400, 5, generator=source) < 0.7
    available[:, 0] |= ~available.any(1)
    mask = available[:, :, None, None].expand(-1, -1, 8, 8)
    d = draw(MODEL, 0, 0, range(400), mask)
    assert not (d.observed & ~available).any()
    assert not (d.direct & ~d.observed).any()
    assert not (d.wanted & (d.observed | ~available)).any()
    assert not (d.hole.any(-1).any(-1) & ~d.observed).any()
    assert (d.hole.any(-1).any(-1).sum(1) <= 1).all()
    holed = d.hole.any(-1).any(-1).any(1)[d.observed.any(1)].float().mean().item()
    assert holed == pytest.approx(0.2, abs=0.08)
    assert d.wanted.any(1).all()
    assert ((d.t >= 0) & (d.t < 1)).all()
    at_start = (d.t == 0).all(1).float().mean().item()
    assert at_start == pytest.approx(0.10, abs=0.06)
    assert (d.t_scene == 0).float().mean().item() == pytest.approx(0.10, abs=0.06)
    assert ((d.t == 0).any(1) == (d.t == 0).all(1)).all()
    told = d.conditions_kept.any(1).float().mean().item()
    assert told == pytest.approx(0.7 * (1 - 0.3 ** len(GROUPS)), abs=0.09)
    several = available.sum(1) > 1
    empty = (~d.observed.any(1))[several].float().mean().item()
    assert empty == pytest.approx(0.10, abs=0.06)  # 3.5 standard deviations
    shown = d.direct.any(1)[d.observed.any(1)].float().mean().item()
    assert shown == pytest.approx(0.85, abs=0.08)
    shared = (d.t == d.t[:, :1]).all(1).float().mean().item()
    assert shared == pytest.approx(0.73, abs=0.08)
    assert d.scene_kept.float().mean().item() == pytest.approx(0.92, abs=0.05)


@pytest.mark.parametrize("junk", [float("nan"), 1e9])
def test_what_an_invalid_pixel_holds_changes_no_loss(junk: float) -> None:
    scene = make_scene(valid_share=0.5)
    found = []
    for value in (0.0, junk):
        x, mask = MODEL.codec.encode(spoil(scene, value))
        found.append(step_loss(MODEL, x, mask, UNKNOWN, draw(MODEL, 0, 0, range(3), mask)))
    assert torch.equal(found[0].total, found[1].total)
    assert torch.equal(found[0].by_modality, found[1].by_modality)


def test_only_valid_pixels_of_wanted_modalities_are_learnt_from() -> None:
    x, mask = MODEL.codec.encode(make_scene(valid_share=2.0))
    mask[:, 0, :, 12:] = False
    draws = draw(MODEL, 0, 0, range(3), mask)
    wanted = torch.zeros(3, 5, dtype=torch.bool)
    wanted[:, 0] = True
    draws = dataclasses.replace(draws, wanted=wanted, observed=~wanted, direct=~wanted)
    spoilt = x.clone()
    spoilt[:, :3, :, 12:] = 99  # the encoder and the loss must both skip it
    a, b = (step_loss(MODEL, v, mask, UNKNOWN, draws) for v in (x, spoilt))
    assert torch.equal(a.total, b.total)
    assert a.wanted.tolist() == [3, 0, 0, 0, 0]
    assert a.by_modality[0] > 0
    assert a.by_modality[1:].tolist() == [0, 0, 0, 0]


def test_loss_is_the_mean_over_samples() -> None:
    x, mask = MODEL.codec.encode(make_scene())
    mask[1, 3:] = False  # a sample with fewer modalities weighs the same
    draws = draw(MODEL, 0, 0, range(3), mask)
    whole = step_loss(MODEL, x, mask, UNKNOWN, draws).total
    each = [
        step_loss(MODEL, x[[i]], mask[[i]], UNKNOWN[:1], rows(draws, [i])).total for i in range(3)
    ]
    assert whole.item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


def test_gradient_reaches_what_the_samples_use_and_nothing_else() -> None:
    model = make_model().train()
    x, mask = model.codec.encode(make_scene().only("rgb", "sar"))
    draws = draw(model, 0, 3, range(3), mask)
    only_sar = torch.tensor([[False, False, True, False, False]]).expand(3, -1)
    only_rgb = torch.tensor([[True, False, False, False, False]]).expand(3, -1)
    kept = torch.ones(3, dtype=torch.bool)
    draws = dataclasses.replace(
        draws,
        observed=only_sar,
        direct=only_sar,
        wanted=only_rgb,
        scene_kept=kept,
        conditions_kept=torch.ones(3, len(GROUPS), dtype=torch.bool),
    )
    TrainingStep(model)(x, mask, torch.randn(3, FEATURES), draws).total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    # Output channels of what is not wanted: raw outputs come in channel-minor order.
    last = model.decoder.fine_out.weight.grad
    assert last[:3].abs().sum() > 0
    assert last[3:].abs().sum() == 0
    # Input channels of what is absent (dem), of the encoder's first convolution.
    first = model.encoder.pixels.weight.grad.unflatten(1, (16, 19))
    assert first[:, :, 6:8].abs().sum() == 0
    assert first[:, :, 4].abs().sum() > 0


def test_the_flow_alone_has_the_loss_that_it_has_beside_the_rest() -> None:
    model = make_model().train()
    x, mask = model.codec.encode(make_scene(valid_share=0.5))
    draws = draw(model, 0, 3, range(3), mask)
    draws = dataclasses.replace(draws, own_scene=torch.ones(3, dtype=torch.bool))
    known = torch.randn(3, FEATURES)
    beside = step_loss(model, x, mask, known, draws)
    alone = TrainingStep(model, only="flow")(x, mask, known, draws)
    assert 2 * alone.flow.item() == pytest.approx(beside.flow.item(), rel=1e-5)
    alone.total.backward()
    learnt = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learnt
    assert all(n.startswith("flow.") for n in learnt)
    spoilt = flow_step_loss(
        model, *model.codec.encode(spoil(make_scene(valid_share=0.5), 1e9)), known, draws
    )
    assert spoilt.flow.item() == alone.flow.item()


def test_gradients_do_not_depend_on_the_order_of_layers() -> None:
    gradients = []
    for order in (NAMES, NAMES[::-1], ("map", "rgb", "dem", "nir", "sar")):
        scene = make_scene()
        scene = Scene({n: scene.values[n] for n in order}, {n: scene.valid[n] for n in order})
        model = make_model().train()
        x, mask = model.codec.encode(scene)
        step_loss(model, x, mask, UNKNOWN, draw(model, 0, 0, range(3), mask)).total.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_overfits_one_batch_and_samples_it() -> None:
    """Two scenes, 150 steps: the decoder makes sar from rgb nearly as it was."""
    pair = select(["rgb", "sar"])
    model = make_model(pair, patch_px=16).train()
    smooth = make_scene(pair, batch=2, height=2, width=3, valid_share=2.0)
    values = {
        n: torch.nn.functional.interpolate(v, scale_factor=8, mode="bilinear")
        for n, v in smooth.values.items()
    }
    valid = {n: torch.ones(2, 1, 16, 24, dtype=torch.bool) for n in values}
    x, mask = model.codec.encode(Scene(values, valid))
    optimiser = torch.optim.AdamW(model.parameters(), 4e-3)
    losses = []
    for step in range(150):
        wanted = torch.tensor([[False, True]]).expand(2, -1)
        draws = dataclasses.replace(
            draw(model, 0, step, range(2), mask), observed=~wanted, direct=~wanted, wanted=wanted
        )
        loss = step_loss(model, x, mask, UNKNOWN[:2], draws)
        optimiser.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.by_modality[1].item())
    assert sum(losses[-20:]) < 0.1 * sum(losses[:5]) * 4
    model.eval()
    seen = mask.clone()
    seen[:, 1] = False
    z = model.encode(x, seen).z
    made = decode_scene(model, x, seen, z, ["sar"], [1, 2], 4)
    error = (made[:, 3:] - x[:, 3:]).square().mean()
    assert error < 0.1 * x[:, 3:].var()


def test_five_modalities_weigh_the_same_as_two() -> None:
    """The scale of the loss does not follow the number of modalities that a sample has."""
    scene = make_scene(FIVE, valid_share=2.0)
    totals = []
    for names in (("rgb", "nir"), ("rgb", "nir", "sar", "dem")):
        x, mask = MODEL.codec.encode(scene.only(*names))
        found = [
            step_loss(MODEL, x, mask, UNKNOWN, draw(MODEL, 0, step, range(3), mask)).total.item()
            for step in range(6)
        ]
        totals.append(sum(found))
    assert 0.4 < totals[0] / totals[1] < 2.5
