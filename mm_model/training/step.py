"""One training step of encoder, flow and decoder together, as pure functions.

What a sample meets in a step (which of its modalities are observed, which wanted, times, noise) is
a function of (seed, step, the sample's index in the global batch): it depends neither on the number
of workers nor on the other samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_model.conditions import GROUPS, OWNERS
from mm_model.generative.loss import class_weight, cross_entropy, velocity_weight
from mm_model.generative.noise import generator
from mm_model.generative.path import interpolate
from mm_model.nn.decoders import Context
from mm_model.nn.model import SceneModel
from mm_model.nn.posterior import DATA_VARIANCE

EMPTY_SHARE = 0.10  # samples of which nothing is observed
DIRECT_SHARE = 0.85  # samples whose decoder sees the observed pixels
TARGET_DROP = 0.35  # chance that a possible target is not wanted
# Samples of which one observed modality has a hole, wanted beside the rest: what completes a layer
# has to fit its surroundings.
HOLE_SHARE = 0.2
HOLE_CELL_PX = 16  # size of what holes look like
SHARED_TIME_SHARE = 0.70  # samples with one time for all targets
SCENE_DROP = 0.08  # samples whose decoder gets no scene
MOST_PRECISE = 3.0  # log of the greatest weight of a value that is known well
CLASS_LOSS = 0.4  # weight of cross-entropy beside squares: at 1 the scene holds little but classes
# Greatest noise on the decoder's scene, beside observed pixels and alone. The true scene tells more
# of the targets than any that the flow will find; a decoder that may trust it learns less of what
# the observed pixels tell (docs/experiments.md).
SCENE_NOISE, SCENE_NOISE_ALONE = 0.9, 0.3
START_SHARE = 0.1  # decoder and flow each: samples at t = 0, whose estimate is the posterior mean
CONDITIONS_SHARE = 0.7  # samples that keep conditions, and chance of each part to be kept then
DECODER_TIME = (-0.8, 0.8)  # mean and standard deviation of logit t
FLOW_TIME = (-0.4, 1.0)


@dataclass(frozen=True)
class Draws:
    """All randomness of a step. M modalities, C channels, S scene channels.

    Attributes:
        observed: bool [B, M], what the encoder sees.
        direct: bool [B, M], what of it the decoder sees, too.
        wanted: bool [B, M], what the decoder makes.
        hole: bool [B, M, H, W], pixels of observed modalities that are not seen but wanted.
        t: [B, M], the decoder's times; t_scene: [B], the flow's.
        noise: [B, C, H, W]; noise_scene, noise_z: [B, S, h, w], the flow's and the decoder's.
        own_scene: bool [B], whether the decoder's scene is of the observed, not of all; true of
            every other sample, which are those that the flow learns from.
        scene_noise: [B], amount of noise on the decoder's scene.
        scene_kept: bool [B], False where the decoder gets no scene.
        conditions_kept: bool [B, G], which parts of the conditions flow and decoder see.
    """

    observed: Tensor
    direct: Tensor
    wanted: Tensor
    hole: Tensor
    t: Tensor
    t_scene: Tensor
    noise: Tensor
    noise_scene: Tensor
    noise_z: Tensor
    own_scene: Tensor
    scene_noise: Tensor
    scene_kept: Tensor
    conditions_kept: Tensor

    def to(self, device: torch.device | str) -> Draws:
        return Draws(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class StepLoss:
    """Losses of a step; means over the batch.

    Attributes:
        total: what to differentiate: decoder's plus flow's.
        flow: of the scene flow.
        by_modality: [M], detached, mean over the samples that want the modality (0 where none).
        wanted: [M], the number of those samples.
    """

    total: Tensor
    flow: Tensor
    by_modality: Tensor
    wanted: Tensor


def draw(model: SceneModel, seed: int, step: int, indices: Sequence[int], mask: Tensor) -> Draws:
    """The randomness of a step for samples of the given positions in the global batch.

    Args:
        model: for its shapes.
        seed: of the run.
        step: number of the step.
        indices: position of each sample in the global batch; B of them.
        mask: bool [B, M, H, W], the valid pixels; a modality with none is not available.
    """
    available = mask.any(-1).any(-1).cpu()
    frame = mask.shape[2:]
    rows = [
        _draw_one(
            model,
            generator("step", seed, step, index),
            have,
            (int(frame[0]), int(frame[1])),
            # By turns, so that every step costs the same.
            own_scene=(step + index) % 2 == 0,
        )
        for index, have in zip(indices, available, strict=True)
    ]
    stacked = (torch.stack([getattr(r, f.name) for r in rows]) for f in fields(Draws))
    return Draws(*stacked).to(mask.device)


def step_loss(
    model: SceneModel, x: Tensor, mask: Tensor, conditions: Tensor, draws: Draws
) -> StepLoss:
    """Losses of encoder, flow and decoder on a batch; no randomness of its own.

    Every sample weighs the same, however many modalities it has, and every target of a sample too,
    however many pixels are valid.

    Args:
        model: trained in place by whoever differentiates `total`.
        x: [B, C, H, W] in model space, 0 where unknown.
        mask: bool [B, M, H, W], where x is known.
        conditions: [B, K], features of `mm_model.conditions`.
        draws: from `draw`.
    """
    observed = draws.observed[:, :, None, None]
    known = mask & ~draws.hole
    seen = known & observed
    conditions = conditions * draws.conditions_kept[:, OWNERS]
    whole = _whole(model, mask)

    # Each sample is encoded once: from all that there is, for the decoder alone, or from what is
    # observed, for the decoder and for the flow, whose target learns nothing from it.
    own = draws.own_scene
    h, scene = model.encode(x, torch.where(_column(own), seen, whole))
    with torch.no_grad():
        _, clean = model.encode(x[own], whole[own])
    t_scene, noise_scene = draws.t_scene[own], draws.noise_scene[own]
    squares = _flow_losses(model, clean, t_scene, noise_scene, h[own], seen[own], conditions[own])
    flow = 2 * squares.sum() / len(x)

    # Of unchanged length, so that the decoder cannot tell how noisy a scene is.
    noise = _column(draws.scene_noise)
    scene = (1 - noise.square()).sqrt() * scene + noise * draws.noise_z
    scene = scene * _column(draws.scene_kept)
    present = known & draws.direct[:, :, None, None]
    wanted = mask & (draws.wanted[:, :, None, None] | (observed & draws.hole))
    times = model.channelwise(draws.t)[:, :, None, None]
    noisy = torch.where(model.channelwise(wanted), interpolate(x, draws.noise, times), 0)
    shown = torch.where(model.channelwise(present), x, noisy)
    context = model.understand(shown, draws.t, present, wanted, scene, conditions)
    raw = model.conclude(context, shown, draws.t, wanted)
    # Errors beside what is usual for such a target seen from such sources (Kendall et al. 2018).
    precision = (-context.log_variance.detach()).clamp_max(MOST_PRECISE).exp()
    losses = target_losses(model, raw, x, wanted, draws.t, precision)
    # These stand beside the rest: no weight learns from more than one of them.
    start = torch.zeros_like(draws.t)
    pixel = target_losses(model, context.pixel, x, wanted, start)
    sureness = _sureness_loss(model, context, x, wanted)

    has = wanted.any(-1).any(-1).to(losses.dtype)
    decoder = (losses.sum(1) / has.sum(1).clamp_min(1)).mean()
    counts = has.sum(0)
    with torch.no_grad():
        plain = target_losses(model, raw, x, wanted, draws.t)
    by_modality = plain.sum(0) / counts.clamp_min(1)
    total = decoder + flow + pixel.sum(1).mean() + sureness
    return StepLoss(total, flow.detach(), by_modality, counts)


def flow_step_loss(
    model: SceneModel, x: Tensor, mask: Tensor, conditions: Tensor, draws: Draws
) -> StepLoss:
    """The flow's loss alone, of every sample: scenes are those of a model that stays as it is.

    A sample costs a small part of what it costs in `step_loss`, whose arguments these are.
    """
    seen = mask & ~draws.hole & draws.observed[:, :, None, None]
    with torch.no_grad():
        h, _ = model.encode(x, seen)
        _, clean = model.encode(x, _whole(model, mask))
    known = conditions * draws.conditions_kept[:, OWNERS]
    squares = _flow_losses(model, clean, draws.t_scene, draws.noise_scene, h, seen, known)
    none = squares.new_zeros(len(model.modalities))
    return StepLoss(squares.mean(), squares.mean().detach(), none, none)


class TrainingStep(nn.Module):
    """The step's loss as a module's forward, so that DistributedDataParallel can wrap it.

    Args:
        model: trained in place.
        only: "flow" if nothing but the scene flow learns.
    """

    def __init__(self, model: SceneModel, only: str | None = None) -> None:
        super().__init__()
        self.model, self._loss = model, step_loss if only is None else flow_step_loss

    def forward(self, x: Tensor, mask: Tensor, conditions: Tensor, draws: Draws) -> StepLoss:
        return self._loss(self.model, x, mask, conditions, draws)


def target_losses(
    model: SceneModel,
    raw: Tensor,
    x: Tensor,
    wanted: Tensor,
    t: Tensor,
    precision: Tensor | float = 1,
) -> Tensor:
    """[B, M]: loss of each target, mean over its channels and wanted pixels; 0 without any.

    Args:
        model: whose targets they are.
        raw: expected values or logits, [B, C, H, W].
        x: the clean ones, in model space.
        wanted: bool [B, M, H, W], the pixels that count.
        t: [B, M], when they were expected.
        precision: [B, C, H, W], weight of squared errors.
    """
    weight = wanted.to(raw.dtype)
    pixels = weight.sum((2, 3)).clamp_min(1)
    squares = ((raw - x).square() * precision * model.channelwise(weight)).sum((2, 3))  # [B, C]
    shares = torch.zeros(len(model.owner), len(model.modalities), device=raw.device)
    for index, (modality, channels) in enumerate(
        zip(model.modalities, model.codec.slices.values(), strict=True)
    ):
        if not modality.is_categorical:
            shares[channels, index] = 1 / modality.channels
    losses = squares @ shares * velocity_weight(t)
    for index, (modality, channels) in enumerate(
        zip(model.modalities, model.codec.slices.values(), strict=True)
    ):
        if modality.is_categorical:
            error = cross_entropy(raw[:, channels], x[:, channels] + 1 / modality.channels)
            total = (error[:, 0] * weight[:, index]).sum((1, 2))
            losses[:, index] = CLASS_LOSS * total * class_weight(t[:, index])
    return losses / pixels


def _flow_losses(
    model: SceneModel,
    clean: Tensor,
    t: Tensor,
    noise: Tensor,
    h: Tensor,
    seen: Tensor,
    conditions: Tensor,
) -> Tensor:
    """[B]: of the flow's estimates of clean scenes from noisy ones, as a velocity's would be."""
    z_t = interpolate(clean, noise, _column(t))
    z_hat = model.estimate_scene(z_t, t, h, seen.float().mean((2, 3)), conditions)
    return (z_hat - clean).square().mean((1, 2, 3)) * velocity_weight(t)


def _whole(model: SceneModel, mask: Tensor) -> Tensor:
    """What the true scene is encoded from: of the settled modalities, all that there is.

    What is learnt later must not move the scene.
    """
    return mask & model.settled[:, None, None]


def _column(v: Tensor) -> Tensor:
    """[B] → [B, 1, 1, 1]."""
    return v[:, None, None, None]


def _sureness_loss(model: SceneModel, context: Context, x: Tensor, wanted: Tensor) -> Tensor:
    """Negative log-likelihood of the values' variances about what is expected of them."""
    weight = model.channelwise(wanted) & ~model.is_class
    squares = (x - context.mean.detach()).square() / DATA_VARIANCE
    likelihood = squares * (-context.log_variance).exp() + context.log_variance
    by_sample = (likelihood * weight).sum((1, 2, 3)) / weight.sum((1, 2, 3)).clamp_min(1)
    return 0.5 * by_sample.mean()


def _draw_one(
    model: SceneModel,
    source: torch.Generator,
    available: Tensor,
    frame: tuple[int, int],
    *,
    own_scene: bool,
) -> Draws:
    """The draws of one sample, without the batch dimension."""
    count, (height, width) = len(model.modalities), frame
    scene = (model.size.scene_channels, height // 8, width // 8)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=source)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    # A random proper subset of what there is: its size first, so that single sources, the hardest
    # to start from, are met often.
    have = int(available.sum())
    size = int(uniform() * (have - 1)) + 1 if have > 1 and uniform() >= EMPTY_SHARE else 0
    order = uniform(count).masked_fill(~available, 2).argsort()
    observed = torch.zeros(count, dtype=torch.bool)
    observed[order[:size]] = True
    direct = observed & (uniform() < DIRECT_SHARE)
    most = SCENE_NOISE if bool(direct.any()) else SCENE_NOISE_ALONE
    possible = available & ~observed
    kept = uniform(count).masked_fill(~possible, -1)
    wanted = possible & ((kept >= TARGET_DROP) | (kept == kept.max()))

    mean, deviation = DECODER_TIME
    logits = mean + deviation * normal(count)
    shared = uniform() < SHARED_TIME_SHARE
    t = torch.sigmoid(torch.where(shared, logits[0], logits))
    t = torch.where(uniform() < START_SHARE, 0, t)
    mean, deviation = FLOW_TIME
    t_scene = torch.sigmoid(mean + deviation * normal())
    told = uniform() < CONDITIONS_SHARE
    hole = torch.zeros(count, height, width, dtype=torch.bool)
    if size and uniform() < HOLE_SHARE:
        hole[order[int(uniform() * size)]] = _blobs(source, height, width)
    return Draws(
        observed=observed,
        direct=direct,
        wanted=wanted,
        hole=hole,
        t=t,
        t_scene=torch.where(uniform() < START_SHARE, 0, t_scene),
        noise=normal(model.codec.channels, height, width),
        noise_scene=normal(*scene),
        noise_z=normal(*scene),
        own_scene=torch.tensor(own_scene),
        scene_noise=most * uniform(),
        scene_kept=uniform() >= SCENE_DROP,
        conditions_kept=told & (uniform(len(GROUPS)) < CONDITIONS_SHARE),
    )


def _blobs(source: torch.Generator, height: int, width: int) -> Tensor:
    """Bool [height, width]: a random share, from hardly any to nearly all, in blobs like clouds."""
    shape = (1, 1, -(-height // HOLE_CELL_PX) + 1, -(-width // HOLE_CELL_PX) + 1)
    coarse = torch.randn(shape, generator=source)
    field = F.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)[0, 0]
    level = torch.rand((), generator=source)
    return field < torch.quantile(field, level)
