"""What is compared: each method learns from a regime and translates one modality into others.

The calls into the project's own model stand here alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.model.regimes import BOX, Regime, choices
from benchmarks.model.training import Descent, Effort, fit
from mm_model.bundle import load_bundle
from mm_model.conditions import FEATURES
from mm_model.generative.sampler import mean_scene, sample
from mm_model.nn.blocks import STRIDE
from mm_model.nn.model import SceneModel, Size
from mm_model.nn.scene_encoder import Encoded
from mm_model.pretrained import PRETRAINED
from mm_model.training.dataset import PatchDataset
from mm_model.training.regress import fit_regressions
from mm_model.training.step import Draws, draw, step_loss

STEPS = 4


@dataclass(frozen=True)
class Question:
    """What is asked of a method: some patches, of which one modality is shown.

    Attributes:
        x, mask: of the shown modality alone, [B, C, H, W] and bool [B, M, H, W].
        source: its name.
        targets: names of what is wanted.
        seeds: [B][S], one a patch and sample.
        steps: of samplers that have any.
    """

    x: Tensor
    mask: Tensor
    source: str
    targets: tuple[str, ...]
    seeds: tuple[tuple[int, ...], ...]
    steps: int = STEPS


class Method(Protocol):
    """What learns and answers."""

    module: nn.Module
    """All that was learnt, as its `state_dict`."""

    def train(self, regime: Regime, *, seed: int, budget_s: float, label: str) -> Effort: ...

    def answer(self, question: Question) -> Tensor:
        """Samples [B, S, C, H, W] in model space, 0 in channels of no target; S is 1 of a method
        that has but one answer.
        """
        ...


def make_scene_model(regime: Regime, kind: type[SceneModel] = SceneModel) -> SceneModel:
    """A model of the size that params.yaml chooses, with random weights."""
    return kind(
        regime.modalities,
        Size(**choices().model.chosen.model_dump()),
        regime.codec,
        regime.statistics["sets"],
        regime.patch_px,
        regressions=True,
    )


class NoScene(SceneModel):
    """The decoder alone: joint diffusion with a time for each modality, observed pixels given.

    It has the interface of a scene model, so that its losses and its sampler are the same code.
    """

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self.encoder = nn.Identity()  # type: ignore[assignment]
        self.flow = nn.Identity()  # type: ignore[assignment]

    def encode(self, x: Tensor, mask: Tensor) -> Encoded:
        batch, _, height, width = x.shape
        rows, columns = height // STRIDE, width // STRIDE
        return Encoded(
            x.new_zeros(batch, rows, columns, 1),
            x.new_zeros(batch, self.scene_channels, rows, columns),
        )

    def estimate_scene(self, z_t: Tensor, *_: Tensor) -> Tensor:
        return torch.zeros_like(z_t)


def without_scene(draws: Draws) -> Draws:
    """The same randomness for a model that has no scene and always sees what is observed."""
    return replace(draws, direct=draws.observed, scene_kept=torch.zeros_like(draws.scene_kept))


class SceneMethod:
    """Ours, or the same decoder without a scene.

    Args:
        regime: what it will learn from.
        kind: which of the two.
    """

    def __init__(self, regime: Regime, kind: type[SceneModel] = SceneModel) -> None:
        self.model = make_scene_model(regime, kind)
        self.module: nn.Module = self.model
        self.has_scene = not issubclass(kind, NoScene)

    def train(self, regime: Regime, *, seed: int, budget_s: float, label: str) -> Effort:
        learner = Descent(self.model, lambda *batch: self.loss(seed, *batch), choices().train)
        solving = self._solve(regime, seed)
        self.model.train()
        effort = fit(
            learner,
            regime,
            regime.train_at,
            regime.names,
            seed=seed,
            budget_s=budget_s - solving.cpu_s,
            label=label,
        )
        self.model.eval()
        return solving + effort

    def _solve(self, regime: Regime, seed: int) -> Effort:
        """What the project solves for before its first step, reading included."""
        began, wall = time.process_time(), time.perf_counter()
        dataset = PatchDataset(regime.train, regime.train_at, regime.modalities, seed=seed, batch=1)
        fit_regressions(self.model, dataset, seed)
        return Effort(time.process_time() - began, time.perf_counter() - wall)

    def loss(self, seed: int, number: int, x: Tensor, mask: Tensor) -> Tensor:
        """The project's own, with nothing known but images: no method is told more."""
        draws = draw(self.model, seed, number, range(len(x)), mask)
        if not self.has_scene:
            draws = without_scene(draws)
        return step_loss(self.model, x, mask, x.new_zeros(len(x), FEATURES), draws).total

    def answer(self, question: Question) -> Tensor:
        count = len(question.seeds[0])
        made = sample(
            self.model,
            question.x.repeat_interleave(count, 0),
            question.mask.repeat_interleave(count, 0),
            question.targets,
            [seed for seeds in question.seeds for seed in seeds],
            question.steps,
        )
        return made.view(-1, count, *made.shape[1:])

    def joint(self, seeds: Sequence[int], side: int, steps: int = STEPS) -> Tensor:
        """Sets of all modalities from nothing, [B, C, H, W] in model space."""
        x, mask = self.model.codec.empty(len(seeds), side, side)
        return sample(self.model, x, mask, self.model.names, seeds, steps)

    def scenes(self, x: Tensor, mask: Tensor) -> Tensor:
        """The expected scene of each patch, [B, S, h, w]."""
        return mean_scene(self.model, x, mask)

    @torch.no_grad()
    def encoded(self, x: Tensor, mask: Tensor) -> Tensor:
        """The encoder's own scene of what is shown, [B, S, h, w]."""
        return self.model.encode(x, mask)[1]


class Box(SceneMethod):
    """The bundle in the box as it is: nothing is trained, and its effort was what it says."""

    def __init__(self, _: Regime) -> None:
        bundle = load_bundle(PRETRAINED)
        self.model, self.module, self.has_scene = bundle.model, bundle.model, True
        effort = bundle.manifest.effort
        steps, samples = int(effort["steps"]), int(effort["samples"])
        self._effort = Effort(math.nan, effort["seconds"], steps, samples)

    def train(self, regime: Regime, *, seed: int, budget_s: float, label: str) -> Effort:
        return self._effort


Factory = Callable[[Regime], Method]


def factories() -> Mapping[str, Factory]:
    """Every method by name, in the order of tables."""
    from benchmarks.model.specialists import Pix2Pix, Specialists, UNetKind
    from benchmarks.model.trivial import Mean, NearestColour

    return {
        BOX: Box,
        "ours": SceneMethod,
        "no_scene": lambda regime: SceneMethod(regime, NoScene),
        "unet_split": lambda regime: Specialists(regime, UNetKind()),
        "pix2pix_split": lambda regime: Specialists(regime, Pix2Pix()),
        "unet_whole": lambda regime: Specialists(regime, UNetKind(), only_first=True),
        "nearest_colour": NearestColour,
        "mean": Mean,
    }


OF_SCENES = (BOX, "ours", "no_scene")
"""Those that are made of the project's own model."""

TRAINED = ("ours", "no_scene", "unet_split", "pix2pix_split", "unet_whole")
"""Those that spend the budget."""


def applies(method: str, regime: str) -> bool:
    """Whether a cell says something that no other does."""
    if BOX in (method, regime):  # trained on another planet, for hours
        return regime == BOX and method in (BOX, "nearest_colour", "mean")
    if regime == "pairs_control":  # only there to weigh what an unseen pair loses
        return method in ("ours", "mean")
    # Adversarial training and the whole budget for one pair are weighed once.
    return regime == "complete" or method not in ("pix2pix_split", "unet_whole")
