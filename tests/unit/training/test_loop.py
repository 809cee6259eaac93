"""The training loop: resumption, ranks, losses that are not finite, pictures."""

import dataclasses
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training_fixtures import SAR, Notes, dataset, make_model, train_config

from mm_model.errors import NonFiniteLossError
from mm_model.training.loop import clip_gradients, learning_rate, make_state, train
from mm_model.training.state import Checkpoints, TrainState


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads that wait for each other in operations this small are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class CrashError(Exception):
    """The end of a process, as far as a test can act it."""


class DyingCheckpoints(Checkpoints):
    """Dies half-way through writing a checkpoint."""

    die_at: int | None = None

    def save(self, state):
        if state.step == self.die_at:
            (self.folder / f"step-{state.step:09d}.partial").write_bytes(b"half")
            raise CrashError
        return super().save(state)


def dying_dataset(step: int | None):
    """Batches that end the training when a step asks for its patches."""
    data = dataset()
    share = data.share

    def dying_share(s, rank=0, world=1):
        if s == step:
            raise CrashError
        return share(s, rank, world)

    data.share = dying_share
    return data


def run(folder, *, crash_step=None, die_at=None, config=None) -> tuple[TrainState, Notes]:
    config, notes = config or train_config(), Notes()
    checkpoints = DyingCheckpoints(folder, "f")
    checkpoints.die_at = die_at
    state = make_state(make_model(), config)
    train(state, dying_dataset(crash_step), config, checkpoints=checkpoints, reporter=notes)
    return state, notes


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, _one_thread):
    return run(tmp_path_factory.mktemp("whole"))


def assert_equal(a: TrainState, b: TrainState) -> None:
    x, y = a.tensors(), b.tensors()
    assert a.step == b.step
    assert x.keys() == y.keys()
    assert [n for n in x if not torch.equal(x[n], y[n])] == []


@pytest.mark.parametrize(
    "crash",
    [
        {"crash_step": 1},
        {"crash_step": 5},
        {"crash_step": 8},
        {"die_at": 4},
        {"die_at": 8},
        {"die_at": 9},
    ],
    ids=str,
)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, uninterrupted, crash):
    with pytest.raises(CrashError):
        run(tmp_path, **crash)
    resumed, notes = run(tmp_path)
    assert_equal(resumed, uninterrupted[0])
    assert notes.rows[-1][0] == 9


def test_a_finished_training_does_nothing_more(tmp_path, uninterrupted):
    run(tmp_path)
    again, notes = run(tmp_path)
    assert_equal(again, uninterrupted[0])
    assert notes.rows == []


def test_it_learns_a_patch_by_heart_and_reports_each_loss(tmp_path):
    config = train_config(steps=60, learning_rate=1e-2)
    notes, state = Notes(), make_state(make_model(), config)
    one_patch = dataset(positions=[2])
    checkpoints = Checkpoints(tmp_path, "f")
    train(state, one_patch, config, checkpoints=checkpoints, reporter=notes)
    assert [s for s, _ in notes.rows] == [10, 20, 30, 40, 50, 60]
    first, last = notes.rows[0][1], notes.rows[-1][1]
    assert {f"loss_{n}" for n in ("flow", "rgb", "sar", "map")} <= first.keys()
    assert last["loss_map"] < 0.8 * first["loss_map"]
    assert first["samples_per_s"] > 0


def test_bf16_is_another_way_to_the_same(tmp_path, uninterrupted):
    _, notes = run(tmp_path, config=train_config(precision="bf16"))
    one, two = (n.rows[-1][1]["loss"] for n in (uninterrupted[1], notes))
    assert one != two
    assert two == pytest.approx(one, rel=0.05)


def test_another_seed_gives_another_training(tmp_path, uninterrupted):
    other, _ = run(tmp_path, config=train_config(seed=4))
    one = uninterrupted[0].tensors()
    assert any(not torch.equal(one[n], t) for n, t in other.tensors().items())


def test_the_rate_warms_up_stays_and_decays():
    config = train_config(steps=20, warmup_steps=4, learning_rate=1.0)
    rates = [learning_rate(s, config) for s in range(20)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates[5:15] == [1.0] * 10
    assert rates[14:] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_pictures_show_the_average_and_leave_no_trace(tmp_path, uninterrupted, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, notes, seen = train_config(picture_every=4), Notes(), []
    state = make_state(make_model(), config)

    def sheet(model, step, path):
        weights = dict(model.named_parameters())
        seen.append(all(torch.equal(weights[n], w) for n, w in state.ema.weights.items()))
        assert not model.training

    checkpoints = Checkpoints(tmp_path, "f")
    train(state, dataset(), config, checkpoints=checkpoints, reporter=notes, sheet=sheet)
    assert notes.pictures == [4, 8, 9]
    assert seen == [True] * 3
    assert_equal(state, uninterrupted[0])


def spoilt_dataset():
    """Patch p4 holds a number whose square is not finite."""
    data = dataset()
    bad = data.store.patches[4]
    layer = bad.layers[SAR.name]
    values = np.full_like(layer.values, 1e30)
    layers = {**bad.layers, SAR.name: dataclasses.replace(layer, values=values)}
    data.store.patches[4] = dataclasses.replace(bad, layers=layers)
    step = next(s for s in range(9) if any(p.patch_id == "p4" for p in data.share(s)))
    return data, step


def test_a_loss_that_is_not_finite_names_step_and_patches(tmp_path):
    data, step = spoilt_dataset()
    config = train_config()
    state = make_state(make_model(), config)
    checkpoints = Checkpoints(tmp_path, "f")
    with pytest.raises(NonFiniteLossError, match=rf"step {step} .*\bp4\b"):
        train(state, data, config, checkpoints=checkpoints, reporter=Notes())
    assert state.step == step
    assert all(t.isfinite().all() for t in state.tensors().values())


def two_ranks(rank: int, folder: str, port: int) -> None:
    """What one of two processes does: a sound training, then one with a bad patch."""
    torch.set_num_threads(1)
    url = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=url, rank=rank, world_size=2)
    config = train_config()
    state = make_state(make_model(), config)
    notes = Notes()
    checkpoints = Checkpoints(Path(folder) / "two", "f")
    train(state, dataset(), config, checkpoints=checkpoints, reporter=notes, rank=rank, world=2)
    torch.save((state.tensors(), notes.rows), f"{folder}/rank{rank}.pt")
    data, _ = spoilt_dataset()
    try:
        train(
            make_state(make_model(), config),
            data,
            config,
            checkpoints=Checkpoints(Path(folder) / "bad", "f"),
            reporter=notes,
            rank=rank,
            world=2,
        )
    except NonFiniteLossError as error:
        torch.save(str(error), f"{folder}/error{rank}.pt")
    except Exception:
        traceback.print_exc()
        raise
    dist.destroy_process_group()


def test_two_ranks_do_what_one_does_and_stop_together(tmp_path, uninterrupted, free_tcp_port):
    mp.spawn(two_ranks, args=(str(tmp_path), free_tcp_port), nprocs=2)
    (one, rows), (two, no_rows) = (torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))
    assert no_rows == []
    alone = uninterrupted[0].tensors()
    for name, expected in alone.items():
        assert torch.equal(one[name], two[name]), name
        if name.startswith(("model/", "ema/")):
            # Sums in another order, through nine steps of Adam, whose steps are of size lr.
            torch.testing.assert_close(one[name], expected, rtol=1e-3, atol=2e-4, msg=name)
    for name, value in uninterrupted[1].rows[-1][1].items():
        if name.startswith("loss"):
            assert rows[-1][1][name] == pytest.approx(value, rel=1e-3)
    errors = [torch.load(tmp_path / f"error{r}.pt") for r in (0, 1)]
    assert errors[0] == errors[1]
    assert "p4" in errors[0]
    _, step = spoilt_dataset()
    assert f"step {step} " in errors[0]


def test_the_flows_gradient_does_not_shorten_the_decoders():
    """Each part is clipped by itself, and every parameter belongs to one."""
    model = make_model()
    parts = model.parts()
    assert {id(p) for part in parts for p in part} == {id(p) for p in model.parameters()}
    assert sum(map(len, parts)) == len(list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-6)
    for parameter in model.flow.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    whole = clip_gradients(model, 1.0)
    norms = {n: torch.stack([p.grad.norm() for p in m.parameters()]).norm().item()
             for n, m in (("flow", model.flow), ("decoder", model.decoder))}  # fmt: skip
    assert norms["flow"] == pytest.approx(1, rel=1e-3)
    kept = {n: p.grad for n, p in model.named_parameters() if not n.startswith("flow.")}
    assert all(torch.equal(before[n], grad) for n, grad in kept.items())
    squares = sum(grad.double().square().sum() for grad in before.values())
    assert float(whole) == pytest.approx(float(squares) ** 0.5, rel=1e-3)
