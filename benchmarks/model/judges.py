"""Networks that judge: trained once on real training patches, the same for every method and seed.

One gives features of a whole set of modalities, two tell what a picture in colour implies.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from benchmarks.model.regimes import MAP, NIR, RGB, Regime
from benchmarks.model.specialists import Pair, UNet, estimate, reconstruction
from benchmarks.model.training import scenes, teach
from mm_model.training.dataset import PatchDataset

_WIDTH = 16  # of the U-Nets: a quarter of a specialist's work
_BATCH = 32
_CELL = 4  # pixels a feature's side
_CHUNK = 64
_SEED = 20_260


class Features(nn.Module):
    """Land cover of cells of 4 px from every continuous modality; its features say what is there.

    Args:
        inputs: continuous channels.
        classes: of land cover.
    """

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()

        def block(a: int, b: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU()]

        self.body = nn.Sequential(
            *block(inputs, 32),
            nn.AvgPool2d(2),
            *block(32, 64),
            nn.AvgPool2d(2),
            *block(64, 64),
            *block(64, 64),
        )
        self.head = nn.Conv2d(64, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] → logits [B, classes, H/4, W/4]."""
        return self.head(self.body(x))  # type: ignore[no-any-return]

    def pooled(self, x: Tensor) -> Tensor:
        """[B, 64], the mean over all cells."""
        return self.body(x).mean((2, 3))  # type: ignore[no-any-return]


class Judges(nn.Module):
    """Features of sets, and agreement of their parts.

    Args:
        regime: whose codec and training patches are used.
    """

    def __init__(self, regime: Regime) -> None:
        super().__init__()
        codec = regime.codec
        self._regime = regime
        self._continuous = continuous_channels(regime)
        classes = codec.by_name[MAP].channels
        self.features = Features(len(self._continuous), classes)
        self._pairs = {name: Pair(regime, RGB, name) for name in (NIR, MAP)}
        self.nir = UNet(codec.by_name[RGB].channels, codec.by_name[NIR].channels, width=_WIDTH)
        self.cover = UNet(codec.by_name[RGB].channels, classes, width=_WIDTH)

    def learn(self, regime: Regime, steps: int) -> None:
        """From real training patches that have everything."""
        torch.manual_seed(_SEED)
        modality = self._regime.codec.by_name[MAP]

        def of_cells(logits: Tensor, truth: Tensor, _: Tensor) -> Tensor:
            shares = F.avg_pool2d(truth + 1 / modality.channels, _CELL)
            return F.cross_entropy(logits.float(), shares)

        def whole() -> Iterator[tuple[Tensor, Tensor]]:
            for x, _ in batches(regime, regime.names, _SEED):
                yield x[:, self._continuous], x[:, self._regime.codec.slices[MAP]]

        teach(self.features, whole(), of_cells, steps)
        for number, (name, network) in enumerate(((NIR, self.nir), (MAP, self.cover))):
            teach_pair(network, self._pairs[name], regime, steps, seed=_SEED + 1 + number)

    @torch.no_grad()
    def describe(self, x: Tensor) -> NDArray[np.float32]:
        """Features [N, 64] of whole sets [N, C, H, W] in model space."""
        parts = [self.features.pooled(c) for c in torch.split(x[:, self._continuous], _CHUNK)]
        found: NDArray[np.float32] = torch.cat(parts).float().numpy()
        return found

    @torch.no_grad()
    def consistency(self, x: Tensor) -> dict[str, float]:
        """How well near infrared and land cover are what colour implies, in sets [N, C, H, W]."""
        colour = x[:, self._regime.codec.slices[RGB]]
        implied = torch.zeros_like(x)
        for name, network in ((NIR, self.nir), (MAP, self.cover)):
            parts = [
                estimate(network(c), self._regime.codec.by_name[name])
                for c in torch.split(colour, _CHUNK)
            ]
            implied[:, self._regime.codec.slices[name]] = torch.cat(parts)
        expected = self._regime.codec.decode(implied, [NIR, MAP])
        shown = self._regime.codec.decode(x, [NIR, MAP])
        return {
            "nir_mae": float((expected[NIR] - shown[NIR]).abs().mean()),
            "map_accuracy": float((expected[MAP] == shown[MAP]).float().mean()),
        }


def open_judges(regime: Regime, steps: int, file: Path) -> Judges:
    """The judges that lie in a file, or new ones that are stored there."""
    torch.manual_seed(_SEED)
    judges = Judges(regime)
    if file.is_file():
        judges.load_state_dict(safetensors.torch.load_file(file), strict=True)
    else:
        judges.learn(regime, steps)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        safetensors.torch.save_file(judges.state_dict(), partial)
        partial.replace(file)
    return judges.eval().requires_grad_(False)


def teach_pair(network: UNet, pair: Pair, regime: Regime, steps: int, *, seed: int) -> UNet:
    """A U-Net from real training patches that show both, for a fixed number of steps."""

    def of_pair() -> Iterator[tuple[Tensor, Tensor]]:
        for x, mask in batches(regime, (pair.source, pair.target), seed):
            source, truth, valid = pair.of(x, mask)
            yield source, torch.cat([truth, valid], 1)

    def loss(raw: Tensor, truth: Tensor, _: Tensor) -> Tensor:
        return reconstruction(raw, truth[:, :-1], truth[:, -1:], pair.modality)

    teach(network, of_pair(), loss, steps)
    return network


def continuous_channels(regime: Regime) -> list[int]:
    """Channels in model space of every modality that is no map."""
    return [
        channel
        for name, channels in regime.codec.slices.items()
        if not regime.codec.by_name[name].is_categorical
        for channel in range(channels.start, channels.stop)
    ]


def batches(
    regime: Regime, names: Sequence[str], seed: int, size: int = _BATCH
) -> Iterator[tuple[Tensor, Tensor]]:
    """Encoded x and mask of training patches that show all the named modalities, without end."""
    positions = regime.positions_with(names)
    dataset = PatchDataset(
        regime.train,
        positions,
        [regime.codec.by_name[n] for n in names],
        seed=seed,
        batch=min(size, len(positions)),
    )
    for scene in scenes(dataset):
        yield regime.codec.encode(scene)
