"""Seconds a generated patch: all other modalities from one observed, by steps and batch."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import setting
from mm_model.api import DEFAULT_STEPS
from mm_model.data.store import PatchStore
from mm_model.modalities import Modality, Quantity
from mm_model.serving.generator import Generator, ObservedLayer, Request

STEPS = {1: (1, 4, DEFAULT_STEPS, 16), 16: (1, DEFAULT_STEPS)}  # by batch
REPEATS = {1: 7, 16: 2}


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Every combination in turn."""
    chosen = setting.params()
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    figures: dict[str, float] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="mm-bench-") as folder:
            bundle, store = setting.make_bundle(chosen, Path(folder))
            generator = Generator(bundle, max_batch=max(STEPS))
            source = observed_of(chosen.selected)
            layers = layers_of(store, source, max(STEPS))
            for batch, all_steps in STEPS.items():
                sides = {
                    _name(batch, steps): _side(generator, source, layers[:batch], steps)
                    for steps in all_steps
                }
                seconds = setting.take_turns(sides, REPEATS[batch])
                figures |= {n: statistics.median(s) / batch for n, s in seconds.items()}
    finally:
        torch.set_num_threads(threads)
    notes = {
        "": f"Size `{chosen.model.size}`, {chosen.prepare.patch_px} px, {source.name} to the "
        f"{len(chosen.selected) - 1} others, arrays in and out, {os.cpu_count()} threads; "
        f"{DEFAULT_STEPS} steps where a name says none.",
    }
    return figures, notes


def observed_of(modalities: tuple[Modality, ...]) -> Modality:
    """The modality to generate from: radar, which sees through clouds."""
    return next(m for m in modalities if m.quantity is Quantity.BACKSCATTER)


def layers_of(store: PatchStore, modality: Modality, count: int) -> list[ObservedLayer]:
    """The first patches' layers of a modality."""
    found: list[ObservedLayer] = []
    for position in range(len(store)):
        patch = store.read(position, [modality.name])
        for layer in patch.layers.values():
            found.append(ObservedLayer(layer.values, layer.valid, patch.grid))
        if len(found) == count:
            break
    return found


def _name(batch: int, steps: int) -> str:
    base = f"generate_s_per_patch_batch_{batch}"
    return base if steps == DEFAULT_STEPS else f"{base}_steps_{steps}"


def _side(
    generator: Generator, source: Modality, layers: list[ObservedLayer], steps: int
) -> Callable[[], object]:
    requests = [
        Request(observed={source.name: layer}, seed=k, steps=steps)
        for k, layer in enumerate(layers)
    ]
    return lambda: generator.generate(requests)
