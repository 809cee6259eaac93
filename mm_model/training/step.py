"""One training step of encoder, flow and decoder together, as pure functions.

What a sample meets in a step (which of its modalities are observed, which wanted, times, noise) is
a function of (seed, step, the sample's index in the global batch): it depends neither on the number
of workers nor on the other samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from mm_model.generative.loss import class_weight, cross_entropy, masked_mean, velocity_weight
from mm_model.generative.noise import generator
from mm_model.generative.path import interpolate
from mm_model.nn.model import SceneModel

EMPTY_SHARE = 0.10  # samples of which nothing is observed
DIRECT_SHARE = 0.75  # samples whose decoder sees the observed pixels
TARGET_DROP = 0.35  # chance that a possible target is not wanted
SHARED_TIME_SHARE = 0.70  # samples with one time for all targets
SCENE_DROP = 0.08  # samples whose decoder gets no scene
SCENE_NOISE = 0.2  # greatest noise on the decoder's scene
DECODER_TIME = (-0.8, 0.8)  # mean and standard deviation of logit t
FLOW_TIME = (-0.4, 1.0)


@dataclass(frozen=True)
class Draws:
    """All randomness of a step. M modalities, C channels, S scene channels.

    Attributes:
        observed: bool [B, M], what the encoder sees.
        direct: bool [B, M], what of it the decoder sees, too.
        wanted: bool [B, M], what the decoder makes.
        t: [B, M], the decoder's times; t_scene: [B], the flow's.
        noise: [B, C, H, W]; noise_scene, noise_z: [B, S, h, w], the flow's and the decoder's.
        own_scene: bool [B], whether the decoder's scene is of the observed, not of all.
        scene_noise: [B], amount of noise on the decoder's scene.
        scene_kept: bool [B], False where the decoder gets no scene.
    """

    observed: Tensor
    direct: Tensor
    wanted: Tensor
    t: Tensor
    t_scene: Tensor
    noise: Tensor
    noise_scene: Tensor
    noise_z: Tensor
    own_scene: Tensor
    scene_noise: Tensor
    scene_kept: Tensor

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
        _draw_one(model, generator("step", seed, step, index), have, (int(frame[0]), int(frame[1])))
        for index, have in zip(indices, available, strict=True)
    ]
    stacked = (torch.stack([getattr(r, f.name) for r in rows]) for f in fields(Draws))
    return Draws(*stacked).to(mask.device)


def step_loss(model: SceneModel, x: Tensor, mask: Tensor, draws: Draws) -> StepLoss:
    """Losses of encoder, flow and decoder on a batch; no randomness of its own.

    Every sample weighs the same, however many modalities it has, and every target of a sample too,
    however many pixels are valid.

    Args:
        model: trained in place by whoever differentiates `total`.
        x: [B, C, H, W] in model space, 0 where unknown.
        mask: bool [B, M, H, W], where x is known.
        draws: from `draw`.
    """
    batch = len(x)
    seen = mask & draws.observed[:, :, None, None]
    h, z = model.encode(torch.cat([x, x]), torch.cat([mask, seen]))
    z_all, (h_seen, z_seen) = z[:batch], (h[batch:], z[batch:])

    clean = z_all.detach()
    t = draws.t_scene[:, None, None, None]
    z_t = interpolate(clean, draws.noise_scene, t)
    z_hat = model.estimate_scene(z_t, draws.t_scene, h_seen, seen.float().mean((2, 3)))
    flow = ((z_hat - clean).square().mean((1, 2, 3)) * velocity_weight(draws.t_scene)).mean()

    def column(v: Tensor) -> Tensor:
        return v[:, None, None, None]

    scene = torch.where(column(draws.own_scene), z_seen, z_all)
    scene = (scene + column(draws.scene_noise) * draws.noise_z) * column(draws.scene_kept)
    present = mask & draws.direct[:, :, None, None]
    wanted = mask & draws.wanted[:, :, None, None]
    times = model.channelwise(draws.t)[:, :, None, None]
    noisy = torch.where(model.channelwise(wanted), interpolate(x, draws.noise, times), 0)
    raw = model.decode(
        torch.where(model.channelwise(present), x, noisy), draws.t, present, wanted, scene
    )
    losses = _target_losses(model, raw, x, wanted, draws.t)

    has = wanted.any(-1).any(-1).to(losses.dtype)
    decoder = (losses.sum(1) / has.sum(1).clamp_min(1)).mean()
    counts = has.sum(0)
    by_modality = losses.detach().sum(0) / counts.clamp_min(1)
    return StepLoss(decoder + flow, flow.detach(), by_modality, counts)


class TrainingStep(nn.Module):
    """`step_loss` as a module's forward, so that DistributedDataParallel can wrap it."""

    def __init__(self, model: SceneModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, mask: Tensor, draws: Draws) -> StepLoss:
        return step_loss(self.model, x, mask, draws)


def _target_losses(model: SceneModel, raw: Tensor, x: Tensor, wanted: Tensor, t: Tensor) -> Tensor:
    """[B, M]: loss of each target, 0 where it is not wanted."""
    columns = []
    for index, (modality, channels) in enumerate(
        zip(model.modalities, model.codec.slices.values(), strict=True)
    ):
        output, target, time = raw[:, channels], x[:, channels], t[:, index]
        if modality.is_categorical:
            error = cross_entropy(output, target + 1 / modality.channels)
            weight = class_weight(time)
        else:
            error, weight = (output - target).square(), velocity_weight(time)
        columns.append(masked_mean(error, wanted[:, index]) * weight)
    return torch.stack(columns, 1)


def _draw_one(
    model: SceneModel, source: torch.Generator, available: Tensor, frame: tuple[int, int]
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
    possible = available & ~observed
    kept = uniform(count).masked_fill(~possible, -1)
    wanted = possible & ((kept >= TARGET_DROP) | (kept == kept.max()))

    mean, deviation = DECODER_TIME
    logits = mean + deviation * normal(count)
    shared = uniform() < SHARED_TIME_SHARE
    t = torch.sigmoid(torch.where(shared, logits[0], logits))
    mean, deviation = FLOW_TIME
    return Draws(
        observed=observed,
        direct=direct,
        wanted=wanted,
        t=t,
        t_scene=torch.sigmoid(mean + deviation * normal()),
        noise=normal(model.codec.channels, height, width),
        noise_scene=normal(*scene),
        noise_z=normal(*scene),
        own_scene=uniform() < 0.5,
        scene_noise=SCENE_NOISE * uniform(),
        scene_kept=uniform() >= SCENE_DROP,
    )
