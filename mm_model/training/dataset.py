"""Which patches a training step sees, and their batch.

Order is a pure function of (seed, step): it does not depend on the number of workers, and a resumed
training sees what an uninterrupted one would have seen.

No flips and no turns: shadows fall away from the sun, and radar shortens the slopes that face it;
both directions are facts of the orbit. A turned scene holds physics that no sensor sees, and would
teach the model that relief and shadow are unrelated.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mm_model.conditions import Conditions, stack_features
from mm_model.data.circumstances import complete
from mm_model.data.patch import Patch
from mm_model.errors import DataError
from mm_model.modalities import Modality
from mm_model.scene import Scene

if TYPE_CHECKING:
    from mm_model.data.store import PatchStore


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)


def batch_order(step: int, *, seed: int, count: int, batch: int) -> NDArray[np.int64]:
    """The `batch` items, of 0 … count − 1, that a step sees.

    Steps are consecutive slices of an endless row of epochs, each in an order of its own: every
    item is seen once before any is seen again.
    """
    rows = np.arange(step * batch, (step + 1) * batch)
    return np.array([_epoch_order(seed, int(r // count), count)[r % count] for r in rows])


def collate(patches: Sequence[Patch], modalities: Sequence[Modality]) -> Scene:
    """The patches as one batch, in physical units; [B, bands, H, W] and masks [B, 1, H, W].

    A modality that no patch has gets no key; where one patch lacks what another has, all its pixels
    are invalid (and zero).

    Raises:
        DataError: there is no patch, or their frames differ.
    """
    frames = {p.grid.shape for p in patches}
    if len(frames) != 1:
        raise DataError("frames of a batch", got=sorted(frames), allowed="one frame for all")
    ((height, width),) = frames
    values, valid = {}, {}
    for modality in modalities:
        layers = [p.layers.get(modality.name) for p in patches]
        if not any(layers):
            continue
        shape = (len(patches), len(modality.bands), height, width)
        stacked = np.zeros(shape, modality.dtype)
        masks = np.zeros((len(patches), 1, height, width), np.bool_)
        for i, layer in enumerate(layers):
            if layer is not None:
                stacked[i], masks[i, 0] = layer.values, layer.valid
        values[modality.name] = torch.from_numpy(stacked)
        valid[modality.name] = torch.from_numpy(masks)
    return Scene(values, valid)


def conditions_of(patch: Patch) -> Conditions:
    """What a patch tells besides its images: its distance, the day of its first dated layer, and
    what follows from its grid.
    """
    days = [day for layer in patch.layers.values() if (day := _day(layer.acquired_at or ""))]
    return complete(Conditions(patch.gsd_m, days[0] if days else None), patch.grid)


def _day(acquired_at: str) -> dt.date | None:
    """The day of an ISO 8601 date or time; of a month its middle, and of a year none: it has no
    season.
    """
    if len(acquired_at) == len("2021-01"):
        acquired_at += "-15"
    return (
        dt.date.fromisoformat(acquired_at[:10]) if len(acquired_at) >= len("2021-01-01") else None
    )


class PatchDataset:
    """The training patches of a store, dealt out in batches.

    Args:
        store: patches at rest.
        positions: which of the store's patches to train on.
        modalities: what to read of each patch.
        seed: makes the order.
        batch: patches of a step, over all ranks.
    """

    def __init__(
        self,
        store: PatchStore,
        positions: Sequence[int],
        modalities: Sequence[Modality],
        *,
        seed: int,
        batch: int,
    ) -> None:
        if not len(positions):
            raise DataError("training split", got="no patch", allowed="one or more")
        self.store, self.modalities = store, tuple(modalities)
        self.positions = np.asarray(positions, np.int64)
        self.seed, self.batch = seed, batch

    def share(self, step: int, rank: int = 0, world: int = 1) -> list[Patch]:
        """The patches that one rank sees in a step: its slice of the step's batch."""
        if self.batch % world:
            raise DataError("batch", got=self.batch, allowed=f"a multiple of {world} workers")
        order = batch_order(step, seed=self.seed, count=len(self.positions), batch=self.batch)
        size = self.batch // world
        mine = self.positions[order[rank * size : (rank + 1) * size]]
        names = [m.name for m in self.modalities]
        return self.store.read_many([int(i) for i in mine], names)

    def batches(
        self, start: int, stop: int, *, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[list[str], Scene, Tensor]]:
        """(patch ids, scene, features of its conditions [B, K]) of one rank for steps start …
        stop − 1, read one step ahead.

        One thread is enough: a step's patches are copied from memory-mapped files in about a
        hundredth of the time that the step takes; from object storage they are fetched all at once.
        """

        def load(step: int) -> tuple[list[str], Scene, Tensor]:
            patches = self.share(step, rank, world)
            known = torch.from_numpy(stack_features([conditions_of(p) for p in patches]))
            return [p.patch_id for p in patches], collate(patches, self.modalities), known

        with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
            ahead = reader.submit(load, start) if start < stop else None
            for step in range(start + 1, stop + 1):
                assert ahead is not None
                ready = ahead.result()
                ahead = reader.submit(load, step) if step < stop else None
                yield ready
