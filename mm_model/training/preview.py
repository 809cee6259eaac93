"""A sheet of held-out patches and what the model makes of a part of them, while it learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mm_model.data.patch import Patch
from mm_model.generative.sampler import sample
from mm_model.modalities import Modality
from mm_model.nn.model import SceneModel
from mm_model.pictures import Panel, save_sheet
from mm_model.training.dataset import collate

_STEPS = 8


@dataclass(frozen=True)
class Preview:
    """Draws for each patch a row of what is real, and one of what comes from one modality of it.

    The observed modality changes from patch to patch, so that a sheet shows each as a source.

    Attributes:
        patches: held-out, of one frame.
        modalities: in the order of the columns.
    """

    patches: Sequence[Patch]
    modalities: tuple[Modality, ...]

    def __call__(self, model: SceneModel, step: int, path: Path) -> None:
        """Write the sheet of a step."""
        rows: list[list[Panel | None]] = []
        for i, patch in enumerate(self.patches):
            present = [m for m in self.modalities if m.name in patch.layers]
            source = present[i % len(present)]
            targets = [m for m in present if m is not source]
            made = self._generate(model, patch, source, [m.name for m in targets], seed=i)
            real: list[Panel | None] = []
            generated: list[Panel | None] = []
            for modality in self.modalities:
                layer = patch.layers.get(modality.name)
                if layer is None:
                    real.append(None)
                    generated.append(None)
                    continue
                real.append(Panel(layer.values, layer.valid, modality, "real"))
                if modality is source:
                    shown = Panel(layer.values, layer.valid, modality, "observed")
                else:
                    everywhere = np.ones_like(layer.valid)
                    shown = Panel(made[modality.name], everywhere, modality, "generated")
                generated.append(shown)
            rows += [real, generated]
        save_sheet(path, rows, f"step {step}")

    def _generate(
        self, model: SceneModel, patch: Patch, source: Modality, targets: list[str], seed: int
    ) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.generic]]]:
        if not targets:
            return {}
        device = next(model.parameters()).device
        scene = collate([patch], self.modalities).only(source.name)
        x, mask = model.codec.encode(scene.to(device))
        with torch.no_grad():
            made = sample(model, x, mask, targets, [seed], _STEPS)
            layers = model.codec.decode(made, targets)
        return {name: values[0].cpu().numpy() for name, values in layers.items()}
