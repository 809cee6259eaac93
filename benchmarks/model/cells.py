"""Cells: one method, trained from one seed on one regime, judged, and never made twice.

A record is good for as long as the code that made it is the same, and so are trained weights, which
depend on less of it: a change of how models are judged trains none again, and a change of the scene
model trains no specialist again. Comments, docstrings and layout change neither.
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks import record
from benchmarks.model.downstream import evaluate_downstream
from benchmarks.model.joint import OTHER_STEPS, evaluate_joint
from benchmarks.model.judges import Judges, open_judges
from benchmarks.model.methods import OF_SCENES, STEPS, TRAINED, Method, SceneMethod, factories
from benchmarks.model.pairs import evaluate_pairs, summary
from benchmarks.model.regimes import BOX, NIR, RGB, Regime, Scale, choices, open_regime
from benchmarks.model.scenes import evaluate_scenes
from benchmarks.model.season import evaluate_season
from benchmarks.model.training import Effort
from mm_model.bundle import load_manifest
from mm_model.data.files import write_atomically
from mm_model.pretrained import PRETRAINED

HERE = Path(__file__).parent
_CORE = (
    *("training/dataset.py", "training/state.py"),
    *("generative/noise.py", "generative/precision.py"),
    *("codec.py", "modalities.py", "conditions.py"),
)
_SCENE = ("nn", "generative", "training")
_DATA = ("data/sources", "data/stats.py")
_LEARNS = ("regimes.py", "training.py", "methods.py", "specialists.py", "trivial.py")
_SPEAKS = ("__main__.py", "report.py", "measures.py", "tables.py", "sheets.py")
_JUDGES = ("regimes.py", "training.py", "specialists.py", "judges.py")
JUDGED = ("complete", BOX)  # the regimes that more than pairs are judged on
_JUDGING_S = 300.0  # of a cell, as long as none was seen
_FIGURES = ("evaluation/distributions.py", "evaluation/probes.py", "evaluation/metrics.py")


@dataclass(frozen=True)
class Cell:
    """One entry of the table."""

    regime: str
    method: str
    seed: int

    def __str__(self) -> str:
        return f"{self.regime}-{self.method}-{self.seed}"


def code_digest(files: Iterable[Path]) -> str:
    """Of what the code does, and of the model's size and optimisation in params.yaml."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(ast.dump(_without_docstrings(ast.parse(file.read_text()))).encode())
    digest.update(choices().model.chosen.model_dump_json().encode())
    digest.update(choices().train.model_dump_json(exclude={"steps", "workers"}).encode())
    return digest.hexdigest()


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [n for n in body if not _is_text(n)]
            node.body = kept  # type: ignore[attr-defined]
    return tree


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


@cache
def _digest_of(what: str, method: str = "") -> str:
    package = record.ROOT / "mm_model"
    names = (*_CORE, *_DATA, *(_SCENE if method in OF_SCENES else ()))
    core = {f for name in names for f in _files(package / name)}
    own = {f.name: f for f in _files(HERE)}
    bundle = load_manifest(PRETRAINED).bundle_id if method == BOX else ""
    if what == "weights":
        return code_digest([*core, *(own[n] for n in _LEARNS)]) + bundle
    if what == "judges":
        data = [f for name in _DATA for f in _files(package / name)]
        return code_digest([package / "codec.py", *data, *(own[n] for n in _JUDGES)])
    told = [f for n, f in own.items() if n not in _SPEAKS]
    return code_digest([*core, *(package / n for n in _FIGURES), *told]) + bundle


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


class Bench:
    """Where cells lie, and what they are made with.

    Args:
        folder: for everything; data are shared by all budgets.
        minutes: of training for each model, as CPU time.
        scale: how much of everything else.
    """

    def __init__(self, folder: Path, minutes: float, scale: Scale) -> None:
        self.root, self.minutes, self.scale = folder, minutes, scale
        _digest_of("judges")  # now: files may change while it runs
        for method in factories():
            _digest_of("record", method), _digest_of("weights", method)
        self.data = folder / f"data-{scale.data_key}"
        self.folder = folder / (f"{minutes:g}min" + ("" if scale == Scale() else f"-{scale.key}"))
        self._regimes: dict[str, Regime] = {}

    @property
    def budget_s(self) -> float:
        """CPU seconds for each trained model."""
        return self.minutes * 60

    def regime(self, name: str) -> Regime:
        """Prepared at the first call."""
        if name not in self._regimes:
            self._regimes[name] = open_regime(name, self.scale, self.data)
        return self._regimes[name]

    def judges(self, regime: Regime) -> Judges:
        steps = self.scale.judge_steps
        name = f"judges-{regime.name}-{steps}-{_digest_of('judges')[:12]}.safetensors"
        return open_judges(regime, steps, self.data / name)

    def find(self, cell: Cell, *, any_code: bool = False) -> dict[str, Any] | None:
        """The record of a cell, if it is there and of this code, or of any."""
        file = self._file(cell)
        if not file.is_file():
            return None
        found: dict[str, Any] = json.loads(file.read_text())
        is_of_this = found["digest"] == _digest_of("record", cell.method)
        return found if any_code or is_of_this else None

    def run(self, cell: Cell) -> dict[str, Any]:
        """The record of a cell, made if it is not there."""
        found = self.find(cell)
        if found is not None:
            return found
        method, effort = self.trained(cell)
        made = {
            "cell": asdict(cell),
            "digest": _digest_of("record", cell.method),
            "commit": record.commit(),
            "minutes": self.minutes,
            "effort": asdict(effort),
            "parameters": sum(p.numel() for p in method.module.parameters()),
            **self._evaluate(cell, method),
        }
        write_atomically(self._file(cell), json.dumps(made, indent=1).encode())
        return made

    def trained(self, cell: Cell) -> tuple[Method, Effort]:
        """A cell's method in evaluation mode: from its file, or trained and stored there."""
        regime = self.regime(cell.regime)
        torch.manual_seed(cell.seed)
        method = factories()[cell.method](regime)
        file = self.weights(cell)
        digest = _digest_of("weights", cell.method)
        kept = _load(file, method, digest)
        effort = kept or method.train(
            regime, seed=cell.seed, budget_s=self.budget_s, label=str(cell)
        )
        if kept is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            about = {"digest": digest, "effort": asdict(effort)}
            tensors = {n: t.contiguous().clone() for n, t in method.module.state_dict().items()}
            partial = file.with_suffix(".partial")
            save_file(tensors, partial, metadata={"about": json.dumps(about)})
            partial.replace(file)
        method.module.eval()
        return method, effort

    def has_weights(self, cell: Cell) -> bool:
        """Whether what a cell learnt is there, and of this code."""
        file = self.weights(cell)
        return file.is_file() and _about(file)["digest"] == _digest_of("weights", cell.method)

    def weights(self, cell: Cell) -> Path:
        """The file of what a cell learnt."""
        return self.folder / "models" / f"{cell}.safetensors"

    def _file(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell}.json"

    def _evaluate(self, cell: Cell, method: Method) -> dict[str, Any]:
        regime, scale = self.regime(cell.regime), self.scale
        # Where nothing but pairs was seen, every target is decoded by itself: four times the work.
        patches = scale.patches // 2 if cell.regime.startswith("pairs") else scale.patches
        only = (RGB, NIR) if cell.method == "unet_whole" else None

        def pairs(count: int, steps: int = STEPS) -> dict[str, dict[str, Any]]:
            return evaluate_pairs(
                method,
                regime,
                patches=count,
                samples=scale.samples,
                steps=steps,
                seed=cell.seed,
                only=only,
            )

        parts: dict[str, Callable[[], Any]] = {"pairs": lambda: pairs(patches)}
        if isinstance(method, SceneMethod) and cell.regime in JUDGED:
            few = max(1, patches // 4)
            parts["steps"] = lambda: {
                str(steps): summary(pairs(few, steps)) for steps in (STEPS, *OTHER_STEPS)
            }
            parts["joint"] = lambda: evaluate_joint(
                method, regime, self.judges(regime), sets=scale.joint, seed=cell.seed
            )
            parts["downstream"] = lambda: evaluate_downstream(
                method,
                regime,
                patches=patches,
                labelled=scale.labelled,
                maps=scale.maps,
                steps=scale.downstream_steps,
                seed=cell.seed,
            )
            if cell.method == BOX:  # no other is told of dates
                parts["season"] = lambda: evaluate_season(
                    method, regime, places=scale.test_places, seed=cell.seed
                )
            if method.has_scene:
                parts["scenes"] = lambda: evaluate_scenes(
                    method, regime, patches=len(regime.test_at), taught=scale.probe_patches
                )
        found: dict[str, Any] = {}
        seconds: dict[str, float] = {}
        for name, part in parts.items():
            began = time.perf_counter()
            found[name] = part()
            seconds[name] = round(time.perf_counter() - began, 1)
        return {**found, **summary(found["pairs"]), "judging_s": seconds}


def _load(file: Path, method: Method, digest: str) -> Effort | None:
    """Fill a method from a file, if that is there and of this code."""
    if not file.is_file() or (about := _about(file))["digest"] != digest:
        return None
    with safe_open(file, framework="pt") as content:
        method.module.load_state_dict({n: content.get_tensor(n) for n in content.keys()})  # noqa: SIM118
    return Effort(**about["effort"])


def _about(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as content:
        about: dict[str, Any] = json.loads(content.metadata()["about"])
    return about


def run_all(bench: Bench, cells: Sequence[Cell], at_once: int) -> list[dict[str, Any]]:
    """The records of all cells, saying what goes on and how long it will take.

    Several at once, of one thread each: two such trainings on two cores take in a third more
    samples than two that have both cores in turn (measured).
    """
    open_ = [c for c in cells if bench.find(c) is None]
    _say(f"{len(cells)} cells, {len(cells) - len(open_)} of them are there: {bench.folder}")
    for name in dict.fromkeys(c.regime for c in open_):
        regime = bench.regime(name)  # prepared once, before many ask for it
        if name in JUDGED:
            bench.judges(regime)
    judged_s: dict[str, float] = {}
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("spawn"), _one_thread) as pool:
        running = {pool.submit(_run, bench.root, bench.minutes, bench.scale, c): c for c in open_}
        for number, future in enumerate(as_completed(running), 1):
            cell, made = running.pop(future), future.result()
            judged_s[cell.method] = sum(made["judging_s"].values())
            left = sum(_expected_s(bench, c, judged_s) for c in running.values()) / at_once
            psnr = made.get("pairs_psnr_of_mean_db", float("nan"))
            effort = made["effort"]
            _say(
                f"{cell}, {number} of {len(open_)}: {psnr:.2f} dB, {effort['samples']:,} samples "
                f"in {effort['cpu_s']:.0f} CPU s, judged in {judged_s[cell.method]:.0f} s; about "
                f"{left / 60:.0f} min left for all"
            )
    return [bench.run(cell) for cell in cells]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _run(root: Path, minutes: float, scale: Scale, cell: Cell) -> dict[str, Any]:
    return _bench(root, minutes, scale).run(cell)


@cache
def _bench(root: Path, minutes: float, scale: Scale) -> Bench:
    """A process's own, which keeps what it has opened."""
    return Bench(root, minutes, scale)


def _expected_s(bench: Bench, cell: Cell, judged_s: dict[str, float]) -> float:
    """Seconds that a cell takes: its training, and judging as long as the method took before."""
    training = bench.minutes * 60 if cell.method in TRAINED else 0
    return training + judged_s.get(cell.method, max(judged_s.values(), default=_JUDGING_S))


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
