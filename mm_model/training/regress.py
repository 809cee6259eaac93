"""Before the first step: what pixels tell of each other, solved in closed form."""

from __future__ import annotations

import numpy as np
import torch

from mm_model.nn.model import SceneModel
from mm_model.training.dataset import PatchDataset, collate

PATCHES = 1024  # looked at, or all that there are
PIXELS = 64  # of each
_AT_ONCE = 64


def fit_regressions(model: SceneModel, dataset: PatchDataset, seed: int) -> None:
    """Fit `model.decoder.regressions` to pixels of the training patches; two seconds.

    The same on every rank: what is looked at depends on the seed and the dataset alone.

    Args:
        model: changed in place; on the CPU. Without regressions it stays as it is.
        dataset: whose modalities are the model's.
        seed: makes the choice of patches and pixels.
    """
    regressions = model.decoder.regressions
    if regressions is None:
        return
    chosen = np.random.default_rng([seed, 0]).permutation(dataset.positions)[:PATCHES]
    names = [m.name for m in dataset.modalities]
    pixels, known = [], []
    for first in range(0, len(chosen), _AT_ONCE):
        patches = dataset.store.read_many([int(i) for i in chosen[first : first + _AT_ONCE]], names)
        x, mask = model.codec.encode(collate(patches, dataset.modalities))
        at = np.random.default_rng([seed, 1 + first]).integers(
            x[0, 0].numel(), size=(len(x), 1, PIXELS)
        )
        where = torch.from_numpy(at)
        pixels.append(x.flatten(2).gather(2, where.expand(-1, x.shape[1], -1)))
        known.append(mask.flatten(2).gather(2, where.expand(-1, mask.shape[1], -1)))
    x, mask = torch.cat(pixels), torch.cat(known)  # [patches, C or M, PIXELS]
    patch = torch.arange(len(x)).repeat_interleave(PIXELS)
    regressions.fit(x.mT.flatten(0, 1), mask.mT.flatten(0, 1), patch)
