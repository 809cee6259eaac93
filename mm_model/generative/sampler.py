"""Sampling: a scene from whatever is observed, then every target from the scene.

Works on canvases of any size, in windows of the size that the model was trained on; windows share
one canvas at every step, so there are no seams. A sample does not depend on its batch: bitwise on
CPU, to rounding elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, TypedDict, TypeVar

import torch
from torch import Tensor, nn

from mm_model.codec import Codec
from mm_model.conditions import FEATURES
from mm_model.errors import RequestError, UnknownModalityError
from mm_model.generative.noise import batch_noise, scene_noise
from mm_model.generative.path import advance, step_times
from mm_model.generative.plan import Pass, plan
from mm_model.generative.precision import autocast, used_precision
from mm_model.generative.windows import STRIDE, Frame, distance
from mm_model.scene import Scene

Check = Callable[[], None]

M = TypeVar("M", bound=nn.Module)

# Measured on sets from nothing (docs/experiments.md): the scene wants more steps than the decoder,
# which cost a third, and early ones; the decoder late ones.
SCENE_STEPS = 2  # for each of the decoder's
SCENE_POWER, TARGET_POWER = 1.4, 0.7  # of `path.step_times`


Origins = Sequence[tuple[int, int]] | None


class _How(TypedDict):
    origins: Origins
    conditions: Tensor | None
    check: Check | None
    precision: str | None


class Generative(Protocol):
    """What sampling needs of a model; `nn.model.SceneModel` is one."""

    names: tuple[str, ...]
    codec: Codec
    patch_px: int
    seen_sets: tuple[tuple[frozenset[str], int], ...]
    scene_channels: int
    token_width: int
    added_names: tuple[str, ...]

    def encode(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]: ...
    def estimate_scene(
        self, z_t: Tensor, t: Tensor, h: Tensor, seen: Tensor, conditions: Tensor
    ) -> Tensor: ...
    def decode(
        self,
        x: Tensor,
        t: Tensor,
        present: Tensor,
        wanted: Tensor,
        z: Tensor,
        conditions: Tensor,
    ) -> Tensor: ...
    def estimate(self, raw: Tensor) -> Tensor: ...
    def channelwise(self, by_modality: Tensor) -> Tensor: ...


def euler(
    estimate: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    steps: int,
    check: Check | None = None,
    power: float = 1,
) -> Tensor:
    """Follow the flow from noise to data in Euler steps; the last returns the estimate.

    With one step this is the posterior mean: the best single estimate.

    Args:
        estimate: (x_t, t) → expected clean x.
        noise: where to start.
        steps: 1 or more.
        check: called before every step; may raise to cancel.
        power: of `path.step_times`.
    """
    x = noise
    for t, after in pairwise(step_times(steps, power)):
        if check is not None:
            check()
        x = advance(estimate(x, t), x, t, after)
    return x


@torch.no_grad()
def sample_scene(
    model: Generative,
    x: Tensor,
    mask: Tensor,
    seeds: Sequence[int | None],
    steps: int = 4,
    *,
    origins: Origins = None,
    conditions: Tensor | None = None,
    check: Check | None = None,
    precision: str | None = None,
) -> Tensor:
    """Scenes z [B, S, ⌈H/8⌉, ⌈W/8⌉] that what is observed allows.

    Args:
        model: a trained model.
        x: observed, in model space: [B, C, H, W], of any H and W.
        mask: bool [B, M, H, W], where x is known.
        seeds: one a sample; equal seeds and observations give equal scenes. None starts from 0
            instead of noise, which only one step allows: see `mean_scene`.
        steps: of the flow; 1 gives the mean scene.
        origins: row and column of each sample's first pixel, from a point that images of one
            ground share: noise and windows go by them. None: 0 and 0.
        conditions: [B, K], features of `mm_model.conditions`; None: nothing is known.
        check: called between steps; may raise to cancel.
        precision: "fp32" or "bf16"; None is `native_precision` of the device.
    """
    _check_request(x, mask, seeds, steps)
    frame, starts = _frame(model, x, origins)
    x, mask = frame.pad(x), frame.pad(mask)
    windows = frame.windows
    coarse = windows.scaled()
    parts = windows.cut(x), windows.cut(mask)
    run = Chunks(x.device, precision)
    h, _ = run(model.encode, *parts)
    seen = parts[1].float().mean((2, 3))
    known = _known(conditions, x).repeat_interleave(len(windows.corners), 0)

    def estimate(z_t: Tensor, t: float) -> Tensor:
        pieces = coarse.cut(z_t)
        times = pieces.new_full((len(pieces),), t)
        return coarse.blend(run(model.estimate_scene, pieces, times, h, seen, known)[0])

    shape, side = (model.scene_channels, coarse.height, coarse.width), model.patch_px // STRIDE
    noise = torch.stack(
        [
            scene_noise(seed, *shape, (row // STRIDE, column // STRIDE), side)
            for seed, (row, column) in zip(seeds, starts, strict=True)
        ]
    )
    return euler(estimate, noise.to(x), steps, check, SCENE_POWER)


@torch.no_grad()
def decode_scene(
    model: Generative,
    x: Tensor,
    mask: Tensor,
    z: Tensor,
    targets: Sequence[str] | Sequence[Sequence[str]],
    seeds: Sequence[int],
    steps: int = 4,
    *,
    origins: Origins = None,
    conditions: Tensor | None = None,
    check: Check | None = None,
    precision: str | None = None,
) -> Tensor:
    """Targets of given scenes, in model space: [B, C, H, W], 0 in channels of no target.

    Args:
        model: a trained model.
        x: observed, in model space: [B, C, H, W].
        mask: bool [B, M, H, W], where x is known.
        z: scenes, as `sample_scene` gives them.
        targets: names wanted of every sample, or a sequence of names for each.
        seeds: one a sample.
        steps: of the flow from noise to the targets.
        origins: row and column of each sample's first pixel, from a point that images of one
            ground share: noise and windows go by them. None: 0 and 0.
        conditions: [B, K], features of `mm_model.conditions`; None: nothing is known.
        check: called between steps; may raise to cancel.
        precision: "fp32" or "bf16"; None is `native_precision` of the device.

    Raises:
        UnknownModalityError: a target that the model does not know.
        RequestError: a target that is observed, or arguments that do not fit together.
    """
    _check_request(x, mask, seeds, steps)
    passes = _plans(model, mask, targets)
    frame, starts = _frame(model, x, origins)
    x, mask = frame.pad(x), frame.pad(mask)
    inside = frame.pad(torch.ones_like(mask[:1, :1, : frame.height, : frame.width]))
    windows = frame.windows
    scene = windows.scaled().cut(z)
    run = Chunks(x.device, precision)
    noise = torch.cat(
        [
            batch_noise(seeds, m.name, m.channels, windows.height, windows.width, starts)
            for m in model.codec.modalities
        ],
        1,
    ).to(x)
    result = torch.zeros_like(x)
    x, mask = x.clone(), mask.clone()  # of later passes what earlier ones made, too
    for k in range(max(map(len, passes), default=0)):
        rows = [i for i, p in enumerate(passes) if k < len(p)]
        direct = _flags(model, [passes[i][k].direct for i in rows], x.device)
        made = _flags(model, [passes[i][k].targets for i in rows], x.device)
        present, wanted = mask[rows] & direct, inside & made
        sees = model.channelwise(present)
        makes = model.channelwise(wanted.expand(-1, -1, *x.shape[2:]))
        observed = torch.where(sees, x[rows], 0)
        pieces_of = [windows.cut(m) for m in (present, wanted.expand_as(present))]
        scene_of = scene.view(len(x), -1, *scene.shape[1:])[rows].flatten(0, 1)
        known = _known(conditions, x)[rows].repeat_interleave(len(windows.corners), 0)

        def estimate(
            x_t: Tensor,
            t: float,
            observed: Tensor = observed,
            makes: Tensor = makes,
            pieces_of: list[Tensor] = pieces_of,
            scene_of: Tensor = scene_of,
            known: Tensor = known,
        ) -> Tensor:
            pieces = windows.cut(torch.where(makes, x_t, observed))
            times = pieces.new_full((len(pieces), len(model.names)), t)
            raw = run(_estimator(model), pieces, times, *pieces_of, scene_of, known)[0]
            return windows.blend(raw)

        made_x = euler(estimate, noise[rows], steps, check, TARGET_POWER)
        result[rows] = torch.where(makes, made_x, result[rows])
        for i in rows:
            if passes[i][k].targets & frozenset().union(*(p.direct for p in passes[i][k + 1 :])):
                shown, there = _beside(model, frame, result[i], passes[i][: k + 1])
                x[i] = torch.where(model.channelwise(there[None])[0], shown, x[i])
                mask[i] |= there
    wanted = _flags(model, list(map(frozenset, _targets_of_each(targets, len(x)))), x.device)
    return torch.where(model.channelwise(wanted), frame.crop(result), 0)


def sample(
    model: Generative,
    x: Tensor,
    mask: Tensor,
    targets: Sequence[str] | Sequence[Sequence[str]],
    seeds: Sequence[int],
    steps: int = 4,
    *,
    origins: Origins = None,
    conditions: Tensor | None = None,
    check: Check | None = None,
    precision: str | None = None,
) -> Tensor:
    """Targets given what is observed: a scene is sampled, then all targets from that one scene.

    Arguments, result and errors as for `sample_scene` and `decode_scene`. `steps` are the
    decoder's; the scene takes `SCENE_STEPS` times as many (docs/experiments.md). With steps=1 the
    result is the best single estimate, E[target | observed], rather than a sample: the decoder's
    estimate at t = 0 from the encoder's own scene of what is observed, as it was trained; the mean
    of many scenes is no scene, so the flow has no part in it.
    """
    _plans(model, mask, targets)  # refuse before the work
    how: _How = {
        "origins": origins,
        "conditions": conditions,
        "check": check,
        "precision": precision,
    }
    if steps == 1:
        z = observed_scene(model, x, mask, origins=origins, precision=precision)
    else:
        z = sample_scene(model, x, mask, seeds, SCENE_STEPS * steps, **how)
    return decode_scene(model, x, mask, z, targets, seeds, steps, **how)


def step_count(
    model: Generative,
    mask: Tensor,
    targets: Sequence[str] | Sequence[Sequence[str]],
    steps: int,
) -> int:
    """How many steps `sample` takes, and so how often it calls its `check`."""
    passes = max(map(len, _plans(model, mask, targets)), default=0)
    return (SCENE_STEPS * steps if steps > 1 else 0) + passes * steps


@torch.no_grad()
def observed_scene(
    model: Generative,
    x: Tensor,
    mask: Tensor,
    *,
    origins: Origins = None,
    precision: str | None = None,
) -> Tensor:
    """The encoder's scene of what is observed alone, [B, S, ⌈H/8⌉, ⌈W/8⌉]."""
    frame, _ = _frame(model, x, origins)
    x, mask = frame.pad(x), frame.pad(mask)
    windows = frame.windows
    run = Chunks(x.device, precision)
    _, z = run(model.encode, windows.cut(x), windows.cut(mask))
    return windows.scaled().blend(z)


@torch.no_grad()
def mean_scene(
    model: Generative,
    x: Tensor,
    mask: Tensor,
    *,
    conditions: Tensor | None = None,
    precision: str | None = None,
) -> Tensor:
    """The expected scene E[z | observed], [B, S, ⌈H/8⌉, ⌈W/8⌉]: the scene as a representation.

    It is the flow's estimate at t = 0, where the noise that it starts from tells nothing; so it
    starts from none, and the result is a function of what is observed.
    """
    return sample_scene(
        model, x, mask, [None] * len(x), 1, conditions=conditions, precision=precision
    )


def for_sampling(model: M) -> M:
    """The model, or a copy whose matrices lie in the precision that they are multiplied in here.

    Autocast casts all of them anew at every step, a sixth of the time that a patch takes. Samples
    are the same to the last bit; in another precision the copy makes none.
    """
    if used_precision(None, next(model.parameters()).device) != "bf16":
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) in (nn.Linear, nn.Conv2d):  # not those that reckon with their weights
            module.bfloat16()
    return model


def _estimator(model: Generative) -> Callable[..., Tensor]:
    return lambda *inputs: model.estimate(model.decode(*inputs))


class Chunks:
    """Runs a function over a batch, in chunks that fit.

    In fp32 on CPU a chunk is one window: matrix products round differently for different numbers of
    rows (1e-6 seen), and so a sample is bitwise the same in any batch. In bf16 the CPU's kernels
    are bitwise the same for any chunk (measured on AVX512-BF16 for widths that are multiples of 16,
    as all sizes have; not for 8), and eight at once cost 10 cpu-ms a window and step instead of 18
    (fp32: 22).
    """

    def __init__(self, device: torch.device, precision: str | None) -> None:
        precision = used_precision(precision, device)
        if precision not in ("fp32", "bf16"):
            raise RequestError("precision", got=precision, allowed="fp32 or bf16")
        self.device, self.bf16 = device, precision == "bf16"
        self.size = 64 if device.type != "cpu" else 8 if self.bf16 else 1

    def __call__(
        self, function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = []
        with autocast(self.device, "bf16" if self.bf16 else "fp32"):
            for chunk in zip(*(torch.split(i, self.size) for i in inputs), strict=True):
                made = function(*chunk)
                outputs.append(made if isinstance(made, tuple) else (made,))
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def _beside(
    model: Generative, frame: Frame, result: Tensor, passes: Sequence[Pass]
) -> tuple[Tensor, Tensor]:
    """What earlier passes made as though it were observed: x [C, H, W] and mask [M, H, W].

    On its way it takes physical units: one class a pixel, and elevation split anew.
    """
    made = [n for n in model.names if any(n in p.targets for p in passes)]
    values = model.codec.decode(frame.crop(result[None]), made)
    everywhere = {n: torch.ones_like(v[:, :1], dtype=torch.bool) for n, v in values.items()}
    x, mask = model.codec.encode(Scene(values, everywhere))
    return frame.pad(x)[0], frame.pad(mask)[0]


def _known(conditions: Tensor | None, x: Tensor) -> Tensor:
    """Features [B, K] on the device of x; 0 where nothing is known."""
    if conditions is None:
        return x.new_zeros(len(x), FEATURES)
    if conditions.shape != (len(x), FEATURES):
        raise RequestError(
            "conditions", got=list(conditions.shape), allowed=f"[{len(x)}, {FEATURES}]"
        )
    return conditions.to(x)


def _check_request(x: Tensor, mask: Tensor, seeds: Sequence[int | None], steps: int) -> None:
    if x.ndim != 4 or mask.shape[0] != x.shape[0] or mask.shape[2:] != x.shape[2:]:
        raise RequestError("observed", got=f"x {list(x.shape)}, mask {list(mask.shape)}")
    if len(seeds) != len(x):
        raise RequestError("seeds", got=len(seeds), allowed=f"one a sample, {len(x)}")
    if steps < 1:
        raise RequestError("steps", got=steps, allowed="1 or more")


def _plans(
    model: Generative, mask: Tensor, targets: Sequence[str] | Sequence[Sequence[str]]
) -> list[tuple[Pass, ...]]:
    """The passes of each sample."""
    wanted = _targets_of_each(targets, len(mask))
    plans = []
    for known, names in zip(mask.any(-1).any(-1).tolist(), wanted, strict=True):
        observed = [n for n, k in zip(model.names, known, strict=True) if k]
        unknown = [n for n in names if n not in model.names]
        if unknown:
            raise UnknownModalityError("target", got=unknown, allowed=list(model.names))
        both = [n for n in names if n in observed]
        if both:
            raise RequestError(
                "target",
                got=both,
                allowed=[n for n in model.names if n not in observed],
                remedy="a modality is either observed or a target",
            )
        ordered = sorted(names, key=model.names.index)
        plans.append(plan(observed, ordered, model.names, model.seen_sets, model.added_names))
    return plans


def _targets_of_each(
    targets: Sequence[str] | Sequence[Sequence[str]], batch: int
) -> list[list[str]]:
    shared = [t for t in targets if isinstance(t, str)]
    if shared:
        return [shared] * batch
    each = [list(t) for t in targets]
    if len(each) != batch:
        raise RequestError("targets", got=len(each), allowed=f"one sequence a sample, {batch}")
    return each


def _flags(model: Generative, sets: Sequence[frozenset[str]], device: torch.device) -> Tensor:
    """Bool [B, M, 1, 1]: which modalities are in each set."""
    rows = [[n in s for n in model.names] for s in sets]
    return torch.tensor(rows, device=device)[:, :, None, None]


def _frame(
    model: Generative, x: Tensor, origins: Origins
) -> tuple[Frame, Sequence[tuple[int, int]]]:
    """The frame that all samples share, and where the canvas of each begins."""
    origins = [(0, 0)] * len(x) if origins is None else list(origins)
    frame = Frame(x.shape[2], x.shape[3], model.patch_px, origins[0])
    step = distance(model.patch_px)
    phases = {(row % step, column % step) for row, column in origins}
    if len(origins) != len(x) or (len(frame.windows.corners) > 1 and len(phases) > 1):
        raise RequestError(
            "origins",
            got=origins,
            allowed=f"one a sample, {len(x)}; of images larger than {model.patch_px} px, all alike "
            f"modulo {step}",
        )
    top, left = frame.corner
    return frame, [(row - top, column - left) for row, column in origins]
