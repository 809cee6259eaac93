"""The one training loop: in this process or in a worker, on a CPU or a GPU, it is the same.

It knows a Reporter, not who listens, and ranks, not who started them. What happens in a step is a
function of (seed, step), so that a training that was interrupted ends like one that was not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mm_model.config import TrainConfig
from mm_model.errors import NonFiniteLossError
from mm_model.generative.precision import autocast
from mm_model.nn.model import SceneModel
from mm_model.training.dataset import PatchDataset
from mm_model.training.state import Checkpoints, Ema, TrainState
from mm_model.training.step import StepLoss, TrainingStep, draw

LOG_EVERY = 10
_BETAS = (0.9, 0.97)  # short trainings want a shorter memory than .999 (docs/experiments.md)
_COOLDOWN_SHARE = 0.3  # of all steps, at the end


class Reporter(Protocol):
    """Who hears of a training; only rank 0 speaks."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step, under names that hold in all trainings."""
        ...

    def picture(self, step: int, save: Callable[[Path], None]) -> None:
        """A picture that `save` writes to the path that it is given."""
        ...


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, constant, linear decay towards 0 (Hägele et al. 2024, arXiv 2405.18392)."""
    warm = (step + 1) / (config.warmup_steps + 1)
    cool = (config.steps - step) / (_COOLDOWN_SHARE * config.steps)
    return config.learning_rate * min(1.0, warm, cool)


def make_state(model: SceneModel, config: TrainConfig) -> TrainState:
    """The state of a training that has not begun."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.learning_rate,
        betas=_BETAS,
        weight_decay=config.weight_decay,
        fused=True,
    )
    return TrainState(model, Ema(model, config.ema), optimizer)


def clip_gradients(model: SceneModel, most: float) -> Tensor:
    """Shorten each part's gradient to a norm of `most`; the norm of the whole, before.

    One norm for all would let the flow's, whose tail is heavy, set how far the decoder goes.
    """
    learning = [[p for p in part if p.requires_grad] for part in model.parts()]
    norms = [nn.utils.clip_grad_norm_(part, most) for part in learning if part]
    whole: Tensor = torch.stack(norms).square().sum().sqrt()
    return whole


def train(
    state: TrainState,
    dataset: PatchDataset,
    config: TrainConfig,
    *,
    checkpoints: Checkpoints,
    reporter: Reporter,
    sheet: Callable[[SceneModel, int, Path], None] | None = None,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Train from the newest checkpoint, or from the start, to `config.steps`.

    Args:
        state: made by `make_state`, the same on all ranks, on the device to train on.
        dataset: the same on all ranks; each rank takes its share.
        config: the optimisation; its `workers` mean nothing here.
        checkpoints: of this run; rank 0 writes, all read.
        reporter: hears of rank 0's progress.
        sheet: writes a picture of what the averaged model makes after a step to a path.
        rank: of this process.
        world: number of processes; if there are several, torch.distributed is initialised.

    Raises:
        NonFiniteLossError: on all ranks, naming the step and the patches.
    """
    model: SceneModel = state.model  # type: ignore[assignment]
    device = next(model.parameters()).device
    checkpoints.restore(state)
    objective: nn.Module = TrainingStep(model, config.only)
    if world > 1:
        # Every parameter takes part in every step, whatever is observed (see nn/).
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    model.train()
    window = _Window(model.names, config.batch)
    start = state.step
    share = config.batch // world
    batches = dataset.batches(start, config.steps, rank=rank, world=world)
    for step, (patch_ids, scene, conditions) in zip(
        range(start, config.steps), batches, strict=True
    ):
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        state.optimizer.zero_grad()
        x, mask = model.codec.encode(scene.to(device))
        draws = draw(model, config.seed, step, range(rank * share, (rank + 1) * share), mask)
        with autocast(device, config.precision):
            found: StepLoss = objective(x, mask, conditions.to(device), draws)
        loss = found.total
        finite = bool(loss.isfinite())
        # A loss that is not finite spoils the reduced gradient, so that all ranks see it at once
        # and none waits for one that has given up.
        (loss if finite else loss * math.nan).backward()  # type: ignore[no-untyped-call]
        norm = clip_gradients(model, config.gradient_clip)
        if not bool(norm.isfinite()):
            _stop(step, patch_ids, finite, world)
        state.optimizer.step()
        state.ema.update(model, step)
        state.step = step + 1
        window.add(found, norm)

        last = state.step == config.steps
        if state.step % LOG_EVERY == 0 or last:
            values = window.close(world)
            if rank == 0:
                reporter.metrics(
                    state.step, {**values, "learning_rate": learning_rate(step, config)}
                )
        if rank == 0 and (state.step % config.checkpoint_every == 0 or last):
            checkpoints.save(state)
        if rank == 0 and sheet is not None and (state.step % config.picture_every == 0 or last):
            _picture(state, reporter, sheet)


class _Window:
    """Means since the last report, and samples per second with all that lies between."""

    def __init__(self, names: Sequence[str], batch: int) -> None:
        self._names = ("loss", "loss_flow", "gradient_norm", *(f"loss_{n}" for n in names))
        self._batch = batch
        self._open()

    def _open(self) -> None:
        self._sums: Tensor | int = 0
        self._steps, self._began = 0, time.perf_counter()

    def add(self, found: StepLoss, norm: Tensor) -> None:
        """Take in one step."""
        whole = torch.stack([found.total.detach(), found.flow, norm])
        values = torch.cat([whole, found.by_modality * found.wanted])
        weights = torch.cat([torch.ones_like(whole), found.wanted])
        self._sums = self._sums + torch.stack([values, weights]).double()
        self._steps += 1

    def close(self, world: int) -> dict[str, float]:
        """Means over steps and ranks, without modalities that no sample had; all ranks call it."""
        assert isinstance(self._sums, Tensor)
        if world > 1:
            dist.all_reduce(self._sums)
        totals, weights = self._sums.tolist()
        rate = self._steps * self._batch / (time.perf_counter() - self._began)
        self._open()
        rows = zip(self._names, totals, weights, strict=True)
        return {"samples_per_s": rate, **{n: t / w for n, t, w in rows if w}}


def _stop(step: int, patch_ids: list[str], finite: bool, world: int) -> None:
    """Raise the same error on every rank."""
    guilty: list[Any] = [[] if finite else patch_ids]
    if world > 1:
        guilty = [None] * world
        dist.all_gather_object(guilty, [] if finite else patch_ids)
    named = [i for ids in guilty for i in ids]
    what = "loss" if named else "gradient"
    raise NonFiniteLossError(
        f"{what} of step {step} is not finite",
        got=f"patches {', '.join(named or patch_ids)}",
        remedy="look at these patches with `mm show`; lower train.learning_rate if they are sound",
    )


def _picture(
    state: TrainState, reporter: Reporter, sheet: Callable[[SceneModel, int, Path], None]
) -> None:
    """Show what the averaged weights make; the weights in training are put back."""
    model: SceneModel = state.model  # type: ignore[assignment]
    kept = {n: p.detach().clone() for n, p in model.named_parameters()}
    state.ema.copy_to(model)
    model.eval()
    try:
        reporter.picture(state.step, lambda path: sheet(model, state.step, path))
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(kept[name])
        model.train()
