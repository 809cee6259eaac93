"""What the benchmarks share: sides that take turns, data of their own, a project of their own."""

from __future__ import annotations

import os
import re
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from benchmarks import record
from mm_model.adapters.environment import DEFAULT_PORTS
from mm_model.bundle import Bundle, Manifest, load_bundle, save_bundle
from mm_model.codec import Codec
from mm_model.config import Params, SyntheticConfig, load_params
from mm_model.data.prepare import prepare
from mm_model.data.sources.synthetic import SyntheticSource
from mm_model.data.stats import compute_statistics
from mm_model.data.store import PatchStore
from mm_model.nn.model import SceneModel, Size
from mm_model.training.dataset import PatchDataset
from mm_model.training.regress import fit_regressions


def params() -> Params:
    """The project's own choices: what is measured is what the demo runs."""
    return load_params(record.ROOT / "params.yaml")


def take_turns(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, the sides in turn, after one call of each that is not counted.

    A machine that slows down for a while slows all sides, so that their ratio still holds.
    """
    for side in sides.values():
        side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            began = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(seconds: Mapping[str, list[float]], of: str, over: str) -> float:
    """Median over the turns of one side's time divided by the other's."""
    pairs = zip(seconds[of], seconds[over], strict=True)
    return statistics.median(a / b for a, b in pairs)


def synthetic_source(chosen: Params, places: int) -> SyntheticSource:
    """The project's synthetic Earth, of so many places without gaps in their modalities."""
    assert chosen.prepare.synthetic is not None
    config = SyntheticConfig(
        **{**chosen.prepare.synthetic.model_dump(), "places": places, "complete_share": 1.0}
    )
    return SyntheticSource(
        config, chosen.prepare.patch_px, chosen.prepare.gsd_m[0], chosen.selected
    )


def make_store(chosen: Params, path: Path, places: int) -> PatchStore:
    """A store of synthetic patches with every modality."""
    prepare(
        synthetic_source(chosen, places),
        path,
        chosen.selected,
        shard_patches=chosen.prepare.shard_patches,
        min_valid_fraction=chosen.prepare.min_valid_fraction,
        alignment=chosen.prepare.alignment,
    )
    return PatchStore(path)


def make_bundle(chosen: Params, folder: Path) -> tuple[Bundle, PatchStore]:
    """A bundle of the chosen size as a training begins, which is as fast as a trained one."""
    store = make_store(chosen, folder / "patches", places=2)
    statistics_ = compute_statistics(store, range(len(store)), chosen.selected)
    torch.manual_seed(0)
    model = SceneModel(
        chosen.selected,
        Size(**chosen.model.chosen.model_dump()),
        Codec(chosen.selected, statistics_),
        statistics_["sets"],
        patch_px=chosen.prepare.patch_px,
        regressions=True,
    )
    fit_regressions(
        model, PatchDataset(store, range(len(store)), chosen.selected, seed=0, batch=1), seed=0
    )
    manifest = Manifest(model.config, chosen.prepare.gsd_m[:1], statistics_)
    save_bundle(folder / "bundle", model.eval(), manifest)
    return load_bundle(folder / "bundle"), store


@contextmanager
def temporary_project() -> Iterator[Path]:
    """An empty project with ports and state of its own, apart from services that may run here."""
    before = dict(os.environ)
    foreign = re.compile(r"(MM_|MLFLOW_|PREFECT_|RAY_|DVC_)")
    # Short, since Unix sockets lie below it.
    folder = Path(tempfile.mkdtemp(prefix="mm-bench-", dir="/tmp"))
    try:
        for key in before:
            if foreign.match(key):
                del os.environ[key]
        os.environ["MM_PROJECT"] = str(folder)
        with ExitStack() as stack:
            for service in DEFAULT_PORTS:
                probe = stack.enter_context(socket.socket())
                probe.bind(("127.0.0.1", 0))
                os.environ[f"MM_{service.upper()}_PORT"] = str(probe.getsockname()[1])
        yield folder
    finally:
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)
