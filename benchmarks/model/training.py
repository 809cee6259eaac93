"""Training for a budget of compute: each method spends the same CPU time, whatever a step costs."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.model.regimes import Regime
from mm_model.config import TrainConfig
from mm_model.generative.precision import autocast
from mm_model.modalities import select
from mm_model.nn.model import SceneModel
from mm_model.scene import Scene
from mm_model.training.dataset import PatchDataset, collate
from mm_model.training.loop import clip_gradients
from mm_model.training.state import Ema

BATCH = 16
BETAS = (0.9, 0.97)  # as the project's own loop
WARM_SHARE, COOL_SHARE = 0.02, 0.3  # of the budget
_SAY_EVERY_S = 60
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Effort:
    """What a training took. CPU time is the process's, all threads counted."""

    cpu_s: float = 0.0
    wall_s: float = 0.0
    steps: int = 0
    samples: int = 0

    def __add__(self, other: Effort) -> Effort:
        return Effort(
            self.cpu_s + other.cpu_s,
            self.wall_s + other.wall_s,
            self.steps + other.steps,
            self.samples + other.samples,
        )


class Learner(Protocol):
    """What `fit` teaches."""

    def step(self, number: int, x: Tensor, mask: Tensor, pace: float) -> float:
        """One update on a batch in model space, at a share of the peak learning rate; the loss."""
        ...

    def finish(self) -> None:
        """Training is over: take over what was averaged."""
        ...


def pace(share: float) -> float:
    """Share of the peak learning rate when a share of the budget is spent: warm-up, constant,
    linear decay.
    """
    return max(0.0, min(1.0, (share + 1e-3) / WARM_SHARE, (1 - share) / COOL_SHARE))


def scenes(dataset: PatchDataset) -> Generator[Scene, None, None]:
    """Batches in physical units, without end, read one step ahead as the project's loop does.

    Images alone: dates and places are not even read, since no method is told of them.
    """

    def load(step: int) -> Scene:
        return collate(dataset.share(step), dataset.modalities)

    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
        ahead = reader.submit(load, 0)
        for step in itertools.count(1):
            ready = ahead.result()
            ahead = reader.submit(load, step)
            yield ready


def fit(
    learner: Learner,
    regime: Regime,
    positions: Sequence[int],
    names: Sequence[str],
    *,
    seed: int,
    budget_s: float,
    label: str = "",
) -> Effort:
    """Train until the CPU time is spent; reading and encoding of batches counts, too.

    Args:
        learner: changed in place.
        regime: whose training store and codec are used.
        positions: the patches to learn from.
        names: modalities to read of them.
        seed: makes the order of the patches.
        budget_s: CPU seconds of this process. The step during which it ends is the last.
        label: of progress lines; none without one.
    """
    dataset = PatchDataset(
        regime.train, positions, select(names), seed=seed, batch=min(BATCH, len(positions))
    )
    began, wall = time.process_time(), time.perf_counter()
    said = wall
    steps = samples = 0
    batches = scenes(dataset)
    try:
        for scene in batches:
            share = (time.process_time() - began) / budget_s
            if share >= 1:
                break
            x, mask = regime.codec.encode(scene)
            loss = learner.step(steps, x, mask, pace(share))
            if not math.isfinite(loss):
                raise RuntimeError(f"{label or 'training'}: the loss of step {steps} is {loss}")
            steps, samples = steps + 1, samples + len(x)
            if label and time.perf_counter() - said > _SAY_EVERY_S:
                said = time.perf_counter()
                print(
                    f"  {label}: {share:.0%} of {budget_s / 60:.1f} CPU min, "
                    f"{samples:,} samples, loss {loss:.3f}",
                    file=sys.stderr,
                    flush=True,
                )
    finally:
        batches.close()  # its reader must end
    learner.finish()
    return Effort(time.process_time() - began, time.perf_counter() - wall, steps, samples)


class Descent:
    """A loss minimised as the project minimises its own: AdamW, clipping, averaged weights, bf16.

    Args:
        module: what learns.
        loss: (number of the step, x, mask) → what to differentiate.
        config: the optimisation, as in params.yaml; its number of steps means nothing here.
    """

    def __init__(
        self, module: nn.Module, loss: Callable[[int, Tensor, Tensor], Tensor], config: TrainConfig
    ) -> None:
        self._module, self._loss, self._config = module, loss, config
        self._ema = Ema(module, config.ema)
        self._optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=config.learning_rate,
            betas=BETAS,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, number: int, x: Tensor, mask: Tensor, pace: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.learning_rate * pace
        self._optimizer.zero_grad()
        with autocast(_CPU, self._config.precision):
            loss = self._loss(number, x, mask)
        loss.backward()  # type: ignore[no-untyped-call]
        if isinstance(self._module, SceneModel):
            clip_gradients(self._module, self._config.gradient_clip)
        else:
            nn.utils.clip_grad_norm_(self._module.parameters(), self._config.gradient_clip)
        self._optimizer.step()
        self._ema.update(self._module, number)
        return float(loss.detach())

    def finish(self) -> None:
        self._ema.copy_to(self._module)


def teach(
    module: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    steps: int,
    learning_rate: float = 1e-3,
) -> nn.Module:
    """A small network, for a fixed number of steps; for judges and downstream tasks.

    Args:
        module: changed in place, and returned in evaluation mode.
        batches: (input, truth).
        loss: (output, truth, input) → what to differentiate.
        steps: as many batches are taken.
        learning_rate: at its peak.
    """
    optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, fused=True)
    module.train()
    for number, (source, truth) in zip(range(steps), batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * pace(number / steps)
        optimizer.zero_grad()
        with autocast(_CPU, None):
            found = loss(module(source), truth, source)
        found.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return module.eval().requires_grad_(False)
