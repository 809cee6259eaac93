"""Before the first step: what modalities tell of each other, solved in closed form."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from mm_model.nn.model import SceneModel
from mm_model.training.dataset import PatchDataset, collate

PATCHES = 1024  # looked at, or all that there are
PIXELS = 32  # of each
_AT_ONCE = 32


def fit_regressions(model: SceneModel, dataset: PatchDataset, seed: int) -> None:
    """Fit `model.decoder.regressions` to pixels of the training patches; a few seconds.

    The same on every rank: what is looked at depends on the seed and the dataset alone.

    Args:
        model: changed in place; on the CPU. Without regressions it stays as it is.
        dataset: whose modalities are the model's.
        seed: makes the choice of patches and pixels.
    """
    if model.decoder.regressions is not None:
        model.decoder.regressions.fit(_looked_at(model, dataset, np.random.default_rng(seed)))


def _looked_at(
    model: SceneModel, dataset: PatchDataset, source: np.random.Generator
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    numbers: dict[str, int] = {}  # of places, as they are met
    chosen = source.permutation(dataset.positions)[:PATCHES]
    names = [m.name for m in dataset.modalities]
    for first in range(0, len(chosen), _AT_ONCE):
        patches = dataset.store.read_many([int(i) for i in chosen[first : first + _AT_ONCE]], names)
        x, mask = model.codec.encode(collate(patches, dataset.modalities))
        at = source.integers(x[0, 0].numel(), size=(len(x), PIXELS))
        places = [numbers.setdefault(p.place_id, len(numbers)) for p in patches]
        yield x, mask, torch.from_numpy(at), torch.tensor(places)
