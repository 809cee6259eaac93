"""Held-out patches as pictures: observed, truth, and what each method makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.model.cells import Bench, Cell
from benchmarks.model.methods import Method
from benchmarks.model.pairs import ask, draws_of
from benchmarks.model.regimes import BOX, MAP, NIR, RGB, SAR, Regime
from benchmarks.model.tables import Results
from mm_model.data.patch import Patch
from mm_model.pictures import Panel, save_sheet

PAIRS = ((RGB, NIR), (SAR, RGB), (MAP, RGB), (RGB, MAP), (SAR, NIR))
METHODS = {BOX: 2, "ours": 2, "no_scene": 1, "unet_split": 1, "pix2pix_split": 1}
"""Columns and the number of samples in each."""


def draw(bench: Bench, results: Results, folder: Path) -> list[Path]:
    """A sheet for each regime that has a trained model of ours; the paths.

    One that was drawn before stays where the models that it shows are gone, or of older code.
    """
    paths = []
    for name in results.regimes():
        path = folder / f"bench-model-{name}.png"
        cells = [Cell(**r["cell"]) for r in results.records if r["cell"]["regime"] == name]
        kept = [c for c in cells if c.method in METHODS and bench.has_weights(c)]
        first = {c.method: c for c in reversed(kept)}
        if not {"ours", BOX} & set(first) or name == "pairs_control":
            paths += [path] * path.is_file()
            continue
        regime = bench.regime(name)
        methods = {m: bench.trained(first[m])[0] for m in METHODS if m in first}
        rows = [
            _row(regime, methods, patch, source, target)
            for (source, target), patch in _choose(regime)
        ]
        if rows:
            took = f"{bench.minutes:g} CPU minutes for each method"
            save_sheet(path, rows, f"{name}: {took}" if name != BOX else "the bundle in the box")
            paths.append(path)
    return paths


def _choose(regime: Regime) -> list[tuple[tuple[str, str], Patch]]:
    """A held-out patch for each pair, of another place wherever there is one."""
    chosen: list[tuple[tuple[str, str], Patch]] = []
    for pair in PAIRS:
        patches = (regime.test.read(i, regime.names) for i in regime.test_at)
        fit = [p for p in patches if set(pair) <= set(p.layers)]
        used = {p.place_id for _, p in chosen}
        fresh = [p for p in fit if p.place_id not in used] or fit[len(chosen) :]
        # The most detailed of the first few: a lake says little of any method.
        if fresh:
            chosen.append((pair, max(fresh[:8], key=lambda p: _detail(p, pair))))
    return chosen


def _detail(patch: Patch, pair: tuple[str, str]) -> float:
    layer = patch.layers[pair[1]]
    known = layer.values[0][layer.valid]
    return float(len(np.unique(known))) if known.dtype == np.uint8 else float(known.std())


def _row(
    regime: Regime, methods: dict[str, Method], patch: Patch, source: str, target: str
) -> list[Panel | None]:
    by_name = regime.codec.by_name
    shown, truth = patch.layers[source], patch.layers[target]
    panels: list[Panel | None] = [
        Panel(shown.values, shown.valid, by_name[source], "observed"),
        Panel(truth.values, truth.valid, by_name[target], "truth"),
    ]
    everywhere = np.ones_like(truth.valid)
    for name, count in METHODS.items():
        if name not in methods:
            continue
        made = methods[name].answer(ask(regime, [patch], source, [target], samples=count))
        samples = draws_of(regime, made, [target])[target][0].samples
        panels += [Panel(s, everywhere, by_name[target], name) for s in samples]
    return panels
