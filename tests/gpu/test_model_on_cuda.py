from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from model_fixtures import make_model, make_scene

from mm_model.conditions import FEATURES
from mm_model.generative.sampler import sample
from mm_model.training.step import draw, step_loss

pytestmark = pytest.mark.gpu


def test_a_training_step_and_a_sample_agree_with_the_cpu() -> None:
    model = make_model()
    x, mask = model.codec.encode(make_scene())
    draws = draw(model, 0, 0, range(3), mask)
    known = torch.zeros(3, FEATURES)
    targets, seeds = ["rgb", "map"], [1, 2, 3]
    seen = mask.clone()
    seen[:, [0, 1, 3, 4]] = False
    loss = step_loss(model, x, mask, known, draws).total
    made = sample(model, x, seen, targets, seeds, 2)
    model.cuda()
    x, mask, seen, known = x.cuda(), mask.cuda(), seen.cuda(), known.cuda()
    on_device = step_loss(model, x, mask, known, draws.to("cuda"))
    assert on_device.total.item() == pytest.approx(loss.item(), rel=1e-3)
    made_on_device = sample(model, x, seen, targets, seeds, 2).cpu()
    assert torch.allclose(made_on_device, made, atol=0.02)
    with torch.autocast("cuda", torch.bfloat16):
        half = step_loss(model, x, mask, known, draws.to("cuda")).total
    half.backward()
    assert half.item() == pytest.approx(loss.item(), rel=0.05)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
