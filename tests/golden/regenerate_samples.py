"""Writes samples.json anew: run it only when samples are meant to change, and say so in CHANGELOG.

python tests/golden/regenerate_samples.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from model_fixtures import FIVE, SIZE, statistics

from mm_model.codec import Codec
from mm_model.generative.sampler import sample
from mm_model.nn.model import SceneModel

STORED = Path(__file__).with_name("samples.json")
ROWS, COLUMNS = 8, 12  # of the canvas of 20 x 28 pixels, around the seam between two windows


def constructed_model() -> SceneModel:
    """A model whose weights are a formula of their position, not random and not trained."""
    stats = statistics()
    model = SceneModel(FIVE, SIZE, Codec(FIVE, stats), stats["sets"], patch_px=16)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            position = torch.arange(parameter.numel(), dtype=torch.float64)
            wave = torch.sin(position * 12.9898 + number * 78.233) * 0.15
            parameter.copy_(wave.view(parameter.shape))
    return model.eval()


def golden_samples() -> Tensor:
    """Red, VH, first class of seeds 0 and 1 given a made-up level of elevation: [2, 3, 8, 12]."""
    model = constructed_model()
    x, mask = model.codec.empty(2, 20, 28)
    x[:, 6] = torch.linspace(-1, 1, 28)
    mask[:, 3] = True
    made = sample(model, x, mask, ["rgb", "sar", "map"], [0, 1], 3, precision="fp32")
    return made[:, [0, 5, 8], 4 : 4 + ROWS, 6 : 6 + COLUMNS]


if __name__ == "__main__":
    STORED.write_text(json.dumps(golden_samples().numpy().round(5).tolist()) + "\n")
