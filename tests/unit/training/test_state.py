"""Averaged weights and checkpoints."""

import copy

import pytest
import torch
from torch import nn

from mm_model.errors import DataError
from mm_model.training.state import Checkpoints, Ema, TrainState


def make_state(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.GroupNorm(1, 5), nn.Conv2d(5, 1, 1))
    model.register_buffer("scale", torch.tensor([2.0]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return TrainState(model, Ema(model, 0.9), optimizer)


def advance(state: TrainState, steps: int) -> None:
    for _ in range(steps):
        x = torch.randn(3, 2, 7, 5, generator=torch.Generator().manual_seed(state.step))
        state.optimizer.zero_grad()
        state.model(x).square().mean().backward()
        state.optimizer.step()
        state.ema.update(state.model, state.step)
        state.step += 1


def assert_equal(a: TrainState, b: TrainState) -> None:
    x, y = a.tensors(), b.tensors()
    assert a.step == b.step
    assert x.keys() == y.keys()
    assert [n for n in x if not torch.equal(x[n], y[n])] == []


def test_ema_equals_its_closed_form():
    torch.manual_seed(0)
    module = nn.Linear(3, 2, dtype=torch.float64)
    ema, history = Ema(module, 0.7), [module.weight.detach().clone()]
    decays = [min(0.7, (1 + n) / (10 + n)) for n in range(30)]
    assert decays[0] == 0.1
    assert decays[-1] == 0.7
    for n in range(30):
        with torch.no_grad():
            module.weight.normal_()
        history.append(module.weight.detach().clone())
        ema.update(module, n)
    # weight of value k is (1 - d_k) * product of all later decays; of the start, of all decays
    expected, tail = torch.zeros_like(module.weight), 1.0
    for n in reversed(range(30)):
        expected += tail * (1 - decays[n]) * history[n + 1]
        tail *= decays[n]
    expected += tail * history[0]
    torch.testing.assert_close(ema.weights["weight"], expected, rtol=1e-12, atol=1e-12)


def test_ema_is_no_view_of_the_module_and_is_copied_back():
    state = make_state()
    before = copy.deepcopy(state.ema.weights)
    with torch.no_grad():
        for p in state.model.parameters():
            p.zero_()
    assert all(torch.equal(before[n], w) for n, w in state.ema.weights.items())
    state.ema.copy_to(state.model)
    assert all(torch.equal(before[n], p) for n, p in state.model.named_parameters())


@pytest.mark.parametrize("crash", [0, 1, 4, 7])
def test_a_restored_state_goes_on_bit_for_bit(tmp_path, crash):
    whole = make_state()
    advance(whole, 9)
    first = make_state()
    advance(first, crash)
    checkpoints = Checkpoints(tmp_path, "f")
    checkpoints.save(first)
    second = make_state(seed=5)  # another start: all must come from the file
    assert checkpoints.restore(second)
    assert_equal(first, second)
    advance(second, 9 - crash)
    assert_equal(whole, second)


def test_without_checkpoint_nothing_is_restored(tmp_path):
    state = make_state()
    assert not Checkpoints(tmp_path / "none", "f").restore(state)
    assert_equal(state, make_state())


def test_a_crash_while_writing_leaves_the_one_before(tmp_path):
    state, checkpoints = make_state(), Checkpoints(tmp_path, "f")
    advance(state, 2)
    whole = checkpoints.save(state).read_bytes()
    (tmp_path / "step-000000003.partial").write_bytes(whole[: len(whole) // 2])
    again = make_state(seed=1)
    assert checkpoints.restore(again)
    assert again.step == 2


def test_the_last_two_are_kept(tmp_path):
    state, checkpoints = make_state(), Checkpoints(tmp_path, "f")
    for _ in range(4):
        advance(state, 1)
        checkpoints.save(state)
    assert [f.name for f in checkpoints.files()] == [
        "step-000000003.safetensors",
        "step-000000004.safetensors",
    ]


def test_a_checkpoint_has_fixed_bytes(tmp_path):
    state = make_state()
    advance(state, 2)
    a = Checkpoints(tmp_path / "a", "f").save(state)
    b = Checkpoints(tmp_path / "b", "f").save(state)
    assert a.read_bytes() == b.read_bytes()


def test_a_foreign_or_damaged_checkpoint_is_named(tmp_path):
    state, checkpoints = make_state(), Checkpoints(tmp_path, "f")
    advance(state, 1)
    file = checkpoints.save(state)
    with pytest.raises(DataError, match="another configuration"):
        Checkpoints(tmp_path, "g").restore(make_state())
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(DataError, match="step-000000001"):
        checkpoints.restore(make_state())
