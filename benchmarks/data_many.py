"""Many synthetic patches of every modality: memory by their number, and DVC at the largest.

Patches are small and cost next to nothing to make, so that what grows with their number is what is
seen. A pipeline of two stages (this source, then the project's own split) runs as `dvc repro`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import record, setting
from mm_model.config import Params
from mm_model.data.patch import Layer, Patch, Unit
from mm_model.data.prepare import prepare
from mm_model.geo.grid import Grid

PATCHES = (1_000, 10_000, 100_000)
SIDE_PX, PATCHES_PER_UNIT = 16, 50
_HERE = "benchmarks.data_many"


@dataclass(frozen=True)
class Noise:
    """Patches that cost next to nothing, of every modality."""

    patches: int
    chosen: Params

    def units(self) -> Sequence[Unit]:
        return [Unit(f"{i:06d}", "1") for i in range(self.patches // PATCHES_PER_UNIT)]

    def read(self, unit: Unit) -> Iterator[Patch]:
        rng = np.random.default_rng(int(unit.unit_id))
        shape, valid = (SIDE_PX, SIDE_PX), np.ones((SIDE_PX, SIDE_PX), np.bool_)
        for i in range(PATCHES_PER_UNIT):
            layers = {}
            for modality in self.chosen.selected:
                size = (len(modality.bands), *shape)
                if modality.is_categorical:
                    values: Any = rng.choice(np.array(modality.class_codes, np.uint8), size)
                else:
                    values = rng.uniform(*modality.valid_range, size).astype(np.float32)
                layers[modality.name] = Layer(values, valid, "2020-06-01", modality.gsd_m)
            left, top = 500_000.0 + 160 * i, 1_000_000.0 + 160 * int(unit.unit_id)
            grid = Grid("EPSG:32633", (10.0, 0.0, left, 0.0, -10.0, top), *shape)
            yield Patch(f"{unit.unit_id}/{i}", unit.unit_id, "noise", grid, 10.0, layers)


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """Peak memory, times and bytes."""
    figures: dict[str, float] = {}
    for patches in PATCHES:
        thousands = f"{patches // 1000}k"
        with tempfile.TemporaryDirectory(prefix="mm-bench-") as name:
            folder = Path(name)
            pipeline(folder, patches)
            seconds, cpu = dvc(folder, "repro")
            said = json.loads((folder / "said.json").read_text())
            figures[f"peak_rss_mb_{thousands}"] = said["peak_mb"]
            print(thousands, seconds, said, flush=True)
            if patches != PATCHES[-1]:
                continue
            files = list((folder / "data/patches").iterdir())
            figures |= {
                f"prepare_cpu_s_{thousands}": said["cpu_s"],
                f"prepare_cpu_ms_per_patch_{thousands}": 1e3 * said["cpu_s"] / patches,
                f"store_mb_{thousands}": sum(p.stat().st_size for p in files) / 1e6,
                f"store_files_{thousands}": len(files),
            }
            seconds, cpu = dvc(folder, "repro")
            figures[f"noop_repro_s_{thousands}"] = seconds
            figures[f"noop_repro_cpu_s_{thousands}"] = cpu
            before = {p.name: p.stat().st_size for p in files}
            pipeline(folder, patches + PATCHES_PER_UNIT)
            seconds, cpu = dvc(folder, "repro")
            said = json.loads((folder / "said.json").read_text())
            new = [p for p in (folder / "data/patches").glob("*.arrow") if p.name not in before]
            figures |= {
                f"add_one_unit_repro_s_{thousands}": seconds,
                f"add_one_unit_repro_cpu_s_{thousands}": cpu,
                f"add_one_unit_prepare_cpu_s_{thousands}": said["cpu_s"],
                f"add_one_unit_peak_rss_mb_{thousands}": said["peak_mb"],
                f"add_one_unit_new_shards_{thousands}": len(new),
                f"add_one_unit_new_shards_mb_{thousands}": sum(p.stat().st_size for p in new) / 1e6,
            }
    return figures, {
        "": f"Patches of {SIDE_PX} px, five modalities, {PATCHES_PER_UNIT} a unit, in one process; "
        "peak memory is that of the process that prepares.",
        "noop_repro_s_100k": "`dvc repro` of prepare and split when nothing has changed",
        "add_one_unit_repro_s_100k": "one unit more: prepare, DVC's hashing and copying, split",
        "add_one_unit_new_shards_100k": "files of the store that are not those of before",
    }


def pipeline(folder: Path, patches: int) -> None:
    """A folder with the stages, of so many patches."""
    chosen = yaml.safe_load((record.ROOT / "params.yaml").read_text())
    chosen["split"]["margin_m"] = 0  # units lie side by side
    (folder / "params.yaml").write_text(yaml.safe_dump(chosen))
    (folder / "many.yaml").write_text(yaml.safe_dump({"patches": patches}))
    split = {"cmd": "python -m mm_model.stages.split", "deps": ["data/patches"]}
    stages = {
        "prepare": {
            "cmd": f"python -m {_HERE}",
            "params": [{"many.yaml": ["patches"]}],
            "outs": [{"data/patches": {"persist": True}}],
        },
        "split": {**split, "params": ["split"], "outs": ["data/splits.parquet"]},
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
    if not (folder / ".dvc").is_dir():
        dvc(folder, "init", "--no-scm")


def dvc(folder: Path, *arguments: str) -> tuple[float, float]:
    """Run it quietly in the folder: seconds of the wall clock and of the CPU."""
    before = os.times()
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "dvc", *arguments, "-q"],
        cwd=folder,
        check=True,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(record.ROOT),
            "DVC_SITE_CACHE_DIR": str(folder / "site"),
            "DVC_NO_ANALYTICS": "1",
        },
    )
    after = os.times()
    cpu = after.children_user + after.children_system
    return time.perf_counter() - began, cpu - before.children_user - before.children_system


def _prepare_noise() -> None:
    """The stage, in its folder; leaves its CPU seconds and peak memory beside the store."""
    chosen = setting.params()
    patches = yaml.safe_load(Path("many.yaml").read_text())["patches"]
    prepare(
        Noise(patches, chosen),
        Path("data/patches"),
        chosen.selected,
        shard_patches=chosen.prepare.shard_patches,
        min_valid_fraction=0,
        alignment=chosen.prepare.alignment,
    )
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    said = {"peak_mb": int(peak) / 1024, "cpu_s": time.process_time()}
    Path("said.json").write_text(json.dumps(said))


if __name__ == "__main__":
    _prepare_noise()
