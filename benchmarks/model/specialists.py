"""Pairwise specialists: a network for each ordered pair, as one would train for one task alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.model.methods import Question
from benchmarks.model.regimes import NIR, RGB, Regime, choices, ordered_pairs
from benchmarks.model.training import Descent, Effort, Learner, fit
from mm_model.config import TrainConfig
from mm_model.generative.noise import generator
from mm_model.generative.precision import autocast
from mm_model.modalities import Modality

WIDTH = 32  # 1.9 M parameters
DROPOUT = 0.5
LAMBDA = 100.0  # Isola et al. 2017, as the betas
GAN_BETAS = (0.5, 0.999)
# The paper's 2e-4 is made for 200 epochs. In 24 CPU seconds, a pair's share of four minutes, this
# gives 17.7 dB instead of 15.8 in near infrared from colour, and 0.34 mIoU instead of 0.16.
GAN_RATE = 1e-3


def reconstruction(raw: Tensor, truth: Tensor, valid: Tensor, modality: Modality) -> Tensor:
    """L1 over valid pixels, cross-entropy for classes; truth [B, C, H, W], valid [B, 1, H, W]."""
    if modality.is_categorical:
        error = F.cross_entropy(raw.float(), truth + 1 / modality.channels, reduction="none")
        error = error[:, None]
    else:
        error = (raw.float() - truth).abs().mean(1, keepdim=True)
    return (error * valid).sum() / valid.sum().clamp_min(1)


def estimate(raw: Tensor, modality: Modality) -> Tensor:
    """Raw outputs in model space."""
    return raw.softmax(1) - 1 / modality.channels if modality.is_categorical else raw


class _Double(nn.Sequential):
    """Two convolutions. Group norm, since averaged weights have no statistics of batches."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.GroupNorm(8, outputs),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """Ronneberger et al. 2015 with three halvings.

    Args:
        inputs, outputs: channels.
        dropout: on the two coarsest steps of the way up, in use too: pix2pix's only noise.
        width: channels at full resolution.
    """

    def __init__(
        self, inputs: int, outputs: int, *, dropout: float = 0.0, width: int = WIDTH
    ) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width]
        self.dropout = dropout
        self.down = nn.ModuleList(
            _Double(a, b) for a, b in zip([inputs, *widths], widths, strict=False)
        )
        pairs = list(zip(widths[:0:-1], widths[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.merge = nn.ModuleList(_Double(a, b) for a, b in pairs)
        self.head = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor, seeds: Sequence[int] | None = None) -> Tensor:
        """[B, inputs, H, W] → [B, outputs, H, W]; H and W multiples of 8.

        seeds: one an image, of its dropout; None draws from torch's own generator, as training may.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        skips = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        steps = zip(self.up, self.merge, skips[-2::-1], strict=True)
        for level, (up, merge, skip) in enumerate(steps):
            x = merge(torch.cat([up(x), skip], 1))
            if self.dropout and level < 2:
                x = x * self._kept(x, level, seeds)
        return self.head(x)  # type: ignore[no-any-return]

    def _kept(self, x: Tensor, level: int, seeds: Sequence[int] | None) -> Tensor:
        if seeds is None:
            drawn = torch.rand_like(x)
        else:
            sources = [generator("dropout", seed, level) for seed in seeds]
            drawn = torch.stack([torch.rand(x.shape[1:], generator=s) for s in sources])
        return (drawn >= self.dropout).to(x.dtype) / (1 - self.dropout)


class PatchGan(nn.Sequential):
    """Discriminator of overlapping squares of 34 px."""

    def __init__(self, inputs: int, width: int = 64) -> None:
        def block(a: int, b: int, stride: int) -> list[nn.Module]:
            convolution = nn.Conv2d(a, b, 4, stride, 1, bias=False)
            return [convolution, nn.GroupNorm(8, b), nn.LeakyReLU(0.2, inplace=True)]

        super().__init__(
            nn.Conv2d(inputs, width, 4, 2, 1),
            nn.LeakyReLU(0.2, inplace=True),
            *block(width, 2 * width, 2),
            *block(2 * width, 4 * width, 1),
            nn.Conv2d(4 * width, 1, 4, 1, 1),
        )


class Pair:
    """Where a pair's channels and mask lie."""

    def __init__(self, regime: Regime, source: str, target: str) -> None:
        self.source, self.target = source, target
        self.modality = regime.codec.by_name[target]
        self._from, self._to = regime.codec.slices[source], regime.codec.slices[target]
        self._index = regime.names.index(target)
        self.inputs = regime.codec.by_name[source].channels

    def of(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Source, target and the target's mask [B, 1, H, W]."""
        valid = mask[:, self._index, None]
        return x[:, self._from], x[:, self._to], valid.to(x.dtype)


class Kind(Protocol):
    """A way to train a specialist."""

    stochastic: bool

    def network(self, pair: Pair) -> UNet: ...
    def learner(self, network: UNet, pair: Pair) -> Learner: ...


class UNetKind:
    """L1, or cross-entropy: one best answer."""

    stochastic = False

    def network(self, pair: Pair) -> UNet:
        return UNet(pair.inputs, pair.modality.channels)

    def learner(self, network: UNet, pair: Pair) -> Learner:
        def loss(number: int, x: Tensor, mask: Tensor) -> Tensor:
            source, truth, valid = pair.of(x, mask)
            return reconstruction(network(source), truth, valid, pair.modality)

        return Descent(network, loss, choices().train)


class Pix2Pix:
    """The same with dropout as noise, and a discriminator."""

    stochastic = True

    def network(self, pair: Pair) -> UNet:
        return UNet(pair.inputs, pair.modality.channels, dropout=DROPOUT)

    def learner(self, network: UNet, pair: Pair) -> Learner:
        return _Adversarial(network, pair, choices().train)


class _Adversarial:
    """Generator and discriminator in turn, by Adam, as the paper does."""

    def __init__(self, network: UNet, pair: Pair, config: TrainConfig) -> None:
        self._network, self._pair = network, pair
        self._judge = PatchGan(pair.inputs + pair.modality.channels)
        self._precision = config.precision
        self._optimizers = [
            torch.optim.Adam(m.parameters(), lr=GAN_RATE, betas=GAN_BETAS, fused=True)
            for m in (network, self._judge)
        ]

    def step(self, number: int, x: Tensor, mask: Tensor, pace: float) -> float:
        source, truth, valid = self._pair.of(x, mask)
        modality = self._pair.modality
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = GAN_RATE * pace
        for_generator, for_judge = self._optimizers
        with autocast(x.device, self._precision):
            raw = self._network(source)
            made = torch.cat([source, estimate(raw.float(), modality) * valid], 1)
            real = torch.cat([source, truth], 1)
            verdicts = self._judge(torch.cat([real, made.detach()])).float().chunk(2)
            found = (_cross_entropy(verdicts[0], True) + _cross_entropy(verdicts[1], False)) / 2
        _descend(found, for_judge)
        with autocast(x.device, self._precision):
            fooled = _cross_entropy(self._judge(made).float(), True)
            near = reconstruction(raw, truth, valid, modality)
            loss = fooled + LAMBDA * near
        _descend(loss, for_generator)
        return float(loss.detach())

    def finish(self) -> None:
        """Nothing was averaged."""


def _cross_entropy(verdict: Tensor, real: bool) -> Tensor:
    truth = torch.full_like(verdict, float(real))
    return F.binary_cross_entropy_with_logits(verdict, truth)


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


class Specialists:
    """One network an ordered pair, the budget split evenly.

    A pair that no training patch shows gets none: it is asked through the first modality that has
    both steps, which is the chain that a person would build by hand.

    Args:
        regime: what they will learn from.
        kind: how each is trained.
        only_first: the whole budget for the pair of the first two modalities alone.
    """

    def __init__(self, regime: Regime, kind: Kind, *, only_first: bool = False) -> None:
        self._regime, self._kind = regime, kind
        wanted = [(RGB, NIR)] if only_first else ordered_pairs(regime.names)
        self._pairs = {p: Pair(regime, *p) for p in wanted if regime.positions_with(p)}
        self._networks = nn.ModuleDict(
            {_key(*p): kind.network(pair) for p, pair in self._pairs.items()}
        )
        self.module: nn.Module = self._networks

    def train(self, regime: Regime, *, seed: int, budget_s: float, label: str) -> Effort:
        effort = Effort()
        for number, (names, pair) in enumerate(self._pairs.items()):
            network = self._network(*names)
            effort += fit(
                self._kind.learner(network, pair),
                regime,
                regime.positions_with(names),
                names,
                seed=seed + number,
                budget_s=budget_s / len(self._pairs),
                label=f"{label} {names[0]}→{names[1]}",
            )
        self._networks.eval()
        return effort

    @torch.no_grad()
    def answer(self, question: Question) -> Tensor:
        count = len(question.seeds[0]) if self._kind.stochastic else 1
        seeds = [seed for of_patch in question.seeds for seed in of_patch[:count]]
        shown = question.x.repeat_interleave(count, 0)
        made = torch.zeros_like(shown)
        for target in question.targets:
            chain = self._chain(question.source, target)
            if not chain:
                continue
            values = shown
            for step in chain:
                values = self._apply(step, values, seeds)
            channels = self._regime.codec.slices[target]
            made[:, channels] = values[:, channels]
        return made.view(-1, count, *made.shape[1:])

    def answers(self, source: str, target: str) -> bool:
        """Whether there is a way from one to the other."""
        return bool(self._chain(source, target))

    def _chain(self, source: str, target: str) -> list[tuple[str, str]]:
        if (source, target) in self._pairs:
            return [(source, target)]
        ways = ([(source, by), (by, target)] for by in self._regime.names)
        return next((w for w in ways if all(step in self._pairs for step in w)), [])

    def _apply(self, names: tuple[str, str], x: Tensor, seeds: Sequence[int]) -> Tensor:
        source, target = (self._regime.codec.slices[n] for n in names)
        with torch.autocast("cpu", torch.bfloat16):
            raw = self._network(*names)(x[:, source], seeds if self._kind.stochastic else None)
        made = torch.zeros_like(x)
        made[:, target] = estimate(raw.float(), self._pairs[names].modality)
        return made

    def _network(self, source: str, target: str) -> UNet:
        network: Callable[..., Tensor] = self._networks[_key(source, target)]
        assert isinstance(network, UNet)
        return network


def _key(source: str, target: str) -> str:
    return f"{source}_{target}"
