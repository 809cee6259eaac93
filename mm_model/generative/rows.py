"""Sampling one row of windows after another: what `sampler` makes, in memory that does not grow
with the height of the scene.

A step of the flow needs, for some rows, the step before it in the windows over these rows and
nothing else. So each step follows one row of windows behind the step before, as generators that
pull strips of rows from each other, and holds no more than the rows of a window. All windows agree
at every step as in memory, to the bit: nothing is blended that was made apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, tee
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_model.conditions import FEATURES
from mm_model.generative.noise import TILE, canvas_noise, scene_noise
from mm_model.generative.path import advance, step_times
from mm_model.generative.plan import Pass
from mm_model.generative.sampler import (
    SCENE_POWER,
    SCENE_STEPS,
    TARGET_POWER,
    Chunks,
    Generative,
)
from mm_model.generative.windows import STRIDE, Frame, Windows, distance

Observed = Callable[[int, int], tuple[Tensor, Tensor]]
"""(first row, rows) of the canvas → x [C, rows, W] in model space and mask, bool [M, rows, W].

Each network asks for every row of windows once, from top to bottom."""

# What C's allocator takes for strips of less than 32 MB, which leave gaps that the next ones do not
# fit into: up to 1.9 times what is held, at any width (measured); of larger ones there are none.
_GAPS = 2

# (x_t of windows or None, context of their row, first columns, t) → what is expected of them.
_Estimate = Callable[[Tensor | None, Any, Sequence[int], float], Tensor]


@dataclass(frozen=True)
class RowSampler:
    """One scene of any size from what is observed, and images of it from top to bottom.

    Attributes:
        model: a trained model.
        frame: of the scene.
        observed: what is observed, on the frame's canvas.
        conditions: [K], features of `mm_model.conditions`; None: nothing is known.
        progress: told of windows that were computed, see `work`; may raise to cancel.
        precision: "fp32" or "bf16"; None is `native_precision` of the device.
    """

    model: Generative
    frame: Frame
    observed: Observed
    conditions: Tensor | None = None
    progress: Callable[[int], None] | None = None
    precision: str | None = None

    def work(self, steps: int, passes: int) -> int:
        """Windows that a sample takes: each as often as a network runs on it."""
        scene = 1 if steps == 1 else 1 + SCENE_STEPS * steps
        return len(self.frame.windows.corners) * (scene + passes * steps)

    @torch.inference_mode()
    def scene(self, seed: int, steps: int) -> Tensor:
        """The scene z [S, h, w] of the canvas' cells that `sampler.sample` would draw, on the CPU.

        `steps` are the decoder's, as there; with 1 it is the encoder's scene of what is observed.
        """
        windows, coarse = self.frame.windows, self.frame.windows.scaled()
        encoded = (self._encoded(row, windows) for row in windows.rows)

        def own(_: Tensor | None, context: Any, columns: Sequence[int], __: float) -> Tensor:
            return self._of(context[1], columns, coarse)

        def flow(z_t: Tensor | None, context: Any, columns: Sequence[int], t: float) -> Tensor:
            assert z_t is not None
            h, _, seen = (self._of(part, columns, coarse) for part in context)
            z_t = z_t.to(h.device)
            times = z_t.new_full((len(z_t),), t)
            known = self._known(len(z_t))
            return self._run(self.model.estimate_scene, z_t, times, h, seen, known)[0]

        if steps == 1:
            strips = self._step(coarse, None, encoded, own, 0, 1)
        else:
            row, column = self.frame.start
            start, channels = (row // STRIDE, column // STRIDE), self.model.scene_channels
            side = self.model.patch_px // STRIDE

            def drawn(rows: int, wide: int, where: tuple[int, int]) -> Tensor:
                return scene_noise(seed, channels, rows, wide, where, side)

            noise = _noise_strips(drawn, coarse, start)
            strips = self._flow(coarse, noise, encoded, flow, SCENE_STEPS * steps, SCENE_POWER)
        return torch.cat(list(strips), 1)

    @torch.inference_mode()
    def decode(
        self, z: Tensor, made: Pass, seed: int, steps: int, kept: Collection[str] = ()
    ) -> Iterator[Tensor]:
        """One pass of the decoder: strips [C, rows, W] of the canvas in model space, downwards.

        Channels of other modalities than the pass' targets are 0.

        Args:
            z: of the canvas, as `scene` gives it.
            made: targets, and what the decoder sees directly.
            seed: of the sample.
            steps: of the flow from noise to the targets.
            kept: targets that are observed in parts: seen there, and made in their holes alone.
        """
        model, windows = self.model, self.frame.windows
        names = [n for n in model.names if n in made.targets]
        channels = _channels(model, names)
        used = _channels(model, [n for n in model.names if n in made.direct or n in kept])
        makes, sees = _flags(model, names), _flags(model, {*made.direct, *kept})
        high, wide = windows.size
        owner = _owner(model)

        def context_of(row: int) -> tuple[int, Tensor, Tensor]:
            x, mask = self.observed(row, high)
            return row, x[used], mask

        def estimate(x_t: Tensor | None, context: Any, columns: Sequence[int], t: float) -> Tensor:
            assert x_t is not None
            row, x, mask = context
            n = len(columns)
            shown = _cut(mask, columns, wide)
            present = shown & sees
            wanted = _cut(self._inside(row, high), columns, wide) & makes & ~present
            pixels = x.new_zeros(n, model.codec.channels, high, wide)
            pixels[:, used] = _cut(x, columns, wide)
            noisy = torch.zeros_like(pixels)
            noisy[:, channels] = x_t
            pixels = torch.where(present[:, owner], pixels, 0)
            pixels = torch.where(wanted[:, owner], noisy, pixels)
            top = row // STRIDE
            scene = _cut(
                z[:, top : top + high // STRIDE],
                [c // STRIDE for c in columns],
                wide // STRIDE,
            )
            times = pixels.new_full((n, len(model.names)), t)
            parts = (pixels, times, present, wanted, scene)
            device = self._device
            raw = self._run(
                lambda *inputs: model.estimate(model.decode(*inputs)),
                *(part.to(device) for part in parts),
                self._known(n),
            )[0]
            return raw[:, channels.to(device)]

        def drawn(rows: int, across: int, where: tuple[int, int]) -> Tensor:
            counts = [len(_channels(model, [n])) for n in names]
            parts = zip(names, counts, strict=True)
            return torch.cat([canvas_noise(seed, n, c, rows, across, where) for n, c in parts])

        noise = _noise_strips(drawn, windows, self.frame.start)
        contexts = (context_of(row) for row in windows.rows)
        strips = self._flow(windows, noise, contexts, estimate, steps, TARGET_POWER)
        stays = torch.tensor([n in kept for n in model.names])[owner][:, None, None]
        row = 0
        for strip in strips:
            whole = strip.new_zeros(model.codec.channels, *strip.shape[1:])
            whole[channels] = strip
            if kept:
                x, mask = self.observed(row, strip.shape[1])
                whole = torch.where(stays & mask[owner], x, whole)
            row += strip.shape[1]
            yield whole

    @property
    def _device(self) -> torch.device:
        return self.model.codec.center.device

    def _run(self, function: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, ...]:
        return Chunks(self._device, self.precision)(function, *inputs)

    def _known(self, count: int) -> Tensor:
        """Conditions of so many windows, [n, K]."""
        known = torch.zeros(FEATURES) if self.conditions is None else self.conditions
        return known.to(self._device).expand(count, -1)

    def _of(self, part: Tensor, columns: Sequence[int], windows: Windows) -> Tensor:
        """What belongs to the windows of these columns, of all windows of a row."""
        first = windows.columns.index(columns[0])
        return part[first : first + len(columns)].to(self._device)

    def _encoded(self, row: int, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens h, scenes z and observed shares of all windows of a row."""
        high, wide = windows.size
        x, mask = self.observed(row, high)
        parts = []
        for columns in self._groups(windows):
            pieces = [_cut(part, columns, wide).to(self._device) for part in (x, mask)]
            h, z = self._run(self.model.encode, *pieces)
            parts.append((h.cpu(), z.cpu(), pieces[1].float().mean((2, 3)).cpu()))
            self._tell(len(columns))
        h, z, seen = (torch.cat(part) for part in zip(*parts, strict=True))
        return h, z, seen

    def _inside(self, row: int, rows: int) -> Tensor:
        """Bool [1, rows, W]: which pixels of the canvas belong to the image."""
        top, left = self.frame.corner
        down = torch.arange(row - top, row - top + rows)[:, None]
        right = torch.arange(self.frame.windows.width) - left
        inside = (down >= 0) & (down < self.frame.height)
        return (inside & (right >= 0) & (right < self.frame.width))[None]

    def _groups(self, windows: Windows) -> Iterator[list[int]]:
        """First columns of windows that are computed together."""
        size, columns = Chunks(self._device, self.precision).size, windows.columns
        for start in range(0, len(columns), size):
            yield columns[start : start + size]

    def _tell(self, windows: int) -> None:
        if self.progress is not None:
            self.progress(windows)

    def _flow(
        self,
        windows: Windows,
        noise: Iterator[Tensor],
        contexts: Iterable[Any],
        estimate: _Estimate,
        steps: int,
        power: float,
    ) -> Iterator[Tensor]:
        """`sampler.euler` in strips: each step pulls from the one before.

        `tee` keeps a row's context from the first step that needs it until the last has had it.
        """
        strips = noise
        pairs = pairwise(step_times(steps, power))
        for (t, after), of_rows in zip(pairs, tee(contexts, steps), strict=True):
            strips = self._step(windows, strips, of_rows, estimate, t, after)
        return strips

    def _step(
        self,
        windows: Windows,
        strips: Iterator[Tensor] | None,
        contexts: Iterable[Any],
        estimate: _Estimate,
        t: float,
        after: float,
    ) -> Iterator[Tensor]:
        """One step from strips at time t to strips at `after`, [C, rows, W] each.

        Without strips, what is estimated depends on none. While other steps work, this one holds
        what `column_bytes` counts, so nothing else may outlive a row here.
        """
        high = windows.size[0]
        held: Tensor | None = None  # x_t from the first row of the present windows on
        sums: Tensor | None = None  # of those rows that windows further down reach, too
        ends = [*windows.rows[1:], windows.height]
        for row, end, context in zip(windows.rows, ends, contexts, strict=True):
            while strips is not None and (held is None or held.shape[1] < high):
                held = next(strips) if held is None else torch.cat([held, next(strips)], 1)
            sums = self._summed(windows, sums, held, context, estimate, t)
            done = end - row
            strip = sums[:-1, :done] / sums[-1, :done]
            sums = sums[:, done:].clone()  # a view would keep all of it
            if held is not None:
                strip = advance(strip, held[:, :done], t, after)
                held = held[:, done:].clone()
            yield strip

    def _summed(
        self,
        windows: Windows,
        sums: Tensor | None,
        held: Tensor | None,
        context: Any,
        estimate: _Estimate,
        t: float,
    ) -> Tensor:
        """[C + 1, rows, W]: estimates of a row of windows by their weights, and these, added to
        what the rows of windows above have left.
        """
        high, wide = windows.size
        weight = windows.weight.float()
        if len(windows.corners) == 1:
            weight = torch.ones(high, wide)  # to the bit what the window says
        if sums is not None:
            sums = F.pad(sums, (0, 0, 0, high - sums.shape[1]))
        for columns in self._groups(windows):
            pieces = None if held is None else _cut(held[:, :high], columns, wide)
            made = estimate(pieces, context, columns, t).float().cpu()
            if held is not None:
                self._tell(len(columns))
            if sums is None:
                sums = made.new_zeros(made.shape[1] + 1, high, windows.width)
            for column, piece in zip(columns, made, strict=True):
                here = slice(column, column + wide)
                sums[:-1, :, here] += piece * weight
                sums[-1, :, here] += weight
        assert sums is not None
        return sums


def column_bytes(
    model: Generative, height: int, passes: Sequence[Pass], kept: Collection[str], steps: int
) -> int:
    """Most bytes that `RowSampler` holds at once for each pixel of a scene's width.

    Beside a scene's z, whose strips are put together at its end, every step holds rows of its own,
    and rows of windows between the first step and the last keep their context. What is held for
    the windows in progress does not grow with the width, and is left out.

    Args:
        model: what samples.
        height: of the scene, px.
        passes: of the decoder.
        kept: targets that are observed in parts.
        steps: of the decoder.
    """
    high = min(model.patch_px, height + -height % STRIDE)
    apart = min(distance(model.patch_px), high)
    rows = -(-height // apart) + 1  # of windows
    overlap = model.patch_px / distance(model.patch_px)  # so often a column is in a row of windows
    tokens = high / STRIDE**2  # below a pixel's width, in one row of windows
    z = model.scene_channels * (-(-height // STRIDE) + 1) / STRIDE

    def flow(channels: int, cell: int, steps: int, context: float) -> float:
        held = channels * (high + apart) + high - apart  # strips and sums, see `_step`
        # The step that works holds as much again, twice.
        return _GAPS * (steps + 2) * held / cell**2 + min(steps, rows) * context

    latent = model.scene_channels
    scene = flow(
        latent,
        STRIDE,
        SCENE_STEPS * steps if steps > 1 else 1,
        (model.token_width + latent) * tokens * overlap,
    )
    most = scene + 2 * z
    for made in passes:
        seen = len(_channels(model, made.direct | set(kept)))
        context = (seen + len(model.names) / 4) * high  # the mask takes a byte
        targets = len(_channels(model, made.targets))
        most = max(most, z + flow(targets, 1, steps, context))
    return math.ceil(4 * most)


def _cut(rows: Tensor, columns: Sequence[int], wide: int) -> Tensor:
    """Windows [n, C, rows, wide] of rows [C, rows, W]."""
    return torch.stack([rows[:, :, c : c + wide] for c in columns])


def _noise_strips(
    drawn: Callable[[int, int, tuple[int, int]], Tensor], windows: Windows, start: tuple[int, int]
) -> Iterator[Tensor]:
    """Noise (rows, columns, origin → [C, rows, columns]) over a canvas, in strips."""
    (top, left), row = start, 0
    while row < windows.height:
        # To the next border of the squares that noise is drawn in: each is drawn once.
        rows = min(TILE - (top + row) % TILE, windows.height - row)
        yield drawn(rows, windows.width, (top + row, left))
        row += rows


def _owner(model: Generative) -> Tensor:
    """Number of the modality that each channel belongs to, on the CPU, as strips are."""
    numbers = torch.arange(len(model.names), device=model.codec.center.device)
    return model.channelwise(numbers[None])[0].cpu()


def _channels(model: Generative, names: Collection[str]) -> Tensor:
    """Numbers of the channels of modalities, ascending."""
    named = torch.tensor([n in names for n in model.names])
    return named[_owner(model)].nonzero()[:, 0]


def _flags(model: Generative, names: Collection[str]) -> Tensor:
    """Bool [M, 1, 1]: which modalities are named."""
    return torch.tensor([n in names for n in model.names])[:, None, None]
