"""What needs no network: a constant, and what looks alike."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.model.methods import Question
from benchmarks.model.regimes import Regime, ordered_pairs
from benchmarks.model.training import Effort
from mm_model.scene import Scene
from mm_model.training.dataset import collate

NEIGHBOURS = 8
REFERENCE_PIXELS = 4096
_PATCHES = 512  # that the reference pixels are drawn from
_CHUNK = 4096


class Mean:
    """The constant of least squared error in physical units; the most frequent class."""

    def __init__(self, regime: Regime) -> None:
        self._regime = regime
        self.module: nn.Module = nn.Module()
        self.module.register_buffer("constant", torch.zeros(regime.codec.channels))

    def train(self, regime: Regime, *, seed: int, budget_s: float, label: str) -> Effort:
        values, valid = {}, {}
        for modality in regime.modalities:
            found = regime.statistics["modalities"][modality.name]
            if modality.is_categorical:
                level = [float(max(found["classes"].items(), key=lambda item: item[1])[0])]
            else:
                level = [band["mean"] for band in found["bands"]]
            values[modality.name] = torch.tensor(level)[None, :, None, None]
            valid[modality.name] = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        encoded, _ = regime.codec.encode(Scene(values, valid))
        self.module.get_buffer("constant").copy_(encoded[0, :, 0, 0])
        return Effort()

    def answer(self, question: Question) -> Tensor:
        made = torch.zeros_like(question.x)
        constant = self.module.get_buffer("constant")[:, None, None]
        for target in question.targets:
            channels = self._regime.codec.slices[target]
            made[:, channels] = constant[channels]
        return made[:, None]


class NearestColour:
    """Each pixel by the mean of the training pixels whose source values are nearest to its own."""

    def __init__(self, regime: Regime) -> None:
        self._regime = regime
        self.module: nn.Module = nn.Module()
        for source, target in ordered_pairs(regime.names):
            for role, name in (("source", source), ("target", target)):
                channels = regime.codec.by_name[name].channels
                empty = torch.zeros(REFERENCE_PIXELS, channels)
                self.module.register_buffer(f"{source}_{target}_{role}", empty)

    def train(self, regime: Regime, *, seed: int, budget_s: float, label: str) -> Effort:
        rng = np.random.default_rng(seed)
        for source, target in ordered_pairs(regime.names):
            fit = regime.positions_with((source, target))
            if not fit:
                continue
            chosen = rng.permutation(fit)[:_PATCHES].tolist()
            patches = [regime.train.read(i, (source, target)) for i in chosen]
            # Frames of one store are equal, so that all patches are one batch.
            x, mask = regime.codec.encode(collate(patches, regime.modalities))
            both = mask[:, [regime.names.index(n) for n in (source, target)]].all(1)
            pixels = x.permute(0, 2, 3, 1)[both]
            picked = pixels[torch.from_numpy(rng.integers(0, len(pixels), REFERENCE_PIXELS))]
            for role, name in (("source", source), ("target", target)):
                buffer = self.module.get_buffer(f"{source}_{target}_{role}")
                buffer.copy_(picked[:, regime.codec.slices[name]])
        return Effort()

    def answer(self, question: Question) -> Tensor:
        regime = self._regime
        made = torch.zeros_like(question.x)
        shown = question.x[:, regime.codec.slices[question.source]].permute(0, 2, 3, 1)
        for target in question.targets:
            # A pair that no patch shows keeps 0, which is the mean in model space.
            if regime.positions_with((question.source, target)):
                values = self._look_up(shown.flatten(0, 2), question.source, target)
                image = values.view(*shown.shape[:3], -1).permute(0, 3, 1, 2)
                made[:, regime.codec.slices[target]] = image
        return made[:, None]

    def _look_up(self, pixels: Tensor, shown: str, wanted: str) -> Tensor:
        source = self.module.get_buffer(f"{shown}_{wanted}_source")
        target = self.module.get_buffer(f"{shown}_{wanted}_target")
        if self._regime.codec.by_name[shown].is_categorical:
            # All pixels of a class are equally near: each counts.
            members = torch.nn.functional.one_hot(source.argmax(1), source.shape[1]).float()
            means = members.T @ target / members.sum(0).clamp_min(1)[:, None]
            return means[pixels.argmax(1)]
        parts = []
        for chunk in torch.split(pixels, _CHUNK):
            nearest = torch.cdist(chunk, source).topk(NEIGHBOURS, largest=False).indices
            parts.append(target[nearest].mean(1))
        return torch.cat(parts)
