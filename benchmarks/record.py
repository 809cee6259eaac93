"""What a benchmark leaves: benchmarks/results/<name>.json, and the page made from all of them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
VERSIONS_OF = ("torch", "ray", "mlflow", "prefect", "dvc", "rasterio", "pyarrow", "numpy")


def write(name: str, figures: Mapping[str, float], notes: Mapping[str, str]) -> None:
    """Store one benchmark's figures beside where and when they were measured.

    Args:
        name: of the benchmark; the file's stem.
        figures: flat names that carry their unit → numbers.
        notes: what a reader must know of some figures: figure name, or "" for all → text.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    record = {
        "name": name,
        "figures": {key: float(f"{value:.4g}") for key, value in figures.items()},
        "notes": dict(notes),
        "machine": machine(),
        "versions": {"python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in VERSIONS_OF},
        "commit": commit(),
        "tree": "clean" if not _git("status", "--porcelain", "-uno") else "with changes",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def merge(name: str, figures: Mapping[str, float], notes: Mapping[str, str]) -> None:
    """As `write`, but figures and notes of other parts stay as they were measured."""
    path = RESULTS / f"{name}.json"
    old = json.loads(path.read_text()) if path.is_file() else {"figures": {}, "notes": {}}
    write(name, {**old["figures"], **figures}, {**old["notes"], **notes})


def commit() -> str:
    """What is checked out."""
    return _git("rev-parse", "--short", "HEAD")


def machine() -> dict[str, Any]:
    """Processor, cores, memory and load of this machine."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "load_1_min": round(os.getloadavg()[0], 2),
    }


def write_page() -> None:
    """Make docs/benchmarks.md from all results."""
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench` from `benchmarks/results/*.json`; not edited by hand. Single runs on",
        "a shared machine: compare figures of one run, not those of two days.",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        place = record["machine"]
        lines += [
            "",
            f"## {record['name']}",
            "",
            f"{place['processor']}, {place['cores']} cores, {place['memory_gb']} GB, load "
            f"{place['load_1_min']} at the end; commit {record['commit']} ({record['tree']}), "
            f"{record['date']}; torch {record['versions']['torch']}.",
            "",
        ]
        if "" in record["notes"]:
            lines += [record["notes"][""], ""]
        parts = {k: v for k, v in record["notes"].items() if k.startswith("part ")}
        lines += [f"- `{name.removeprefix('part ')}` {about}" for name, about in parts.items()]
        lines += [""] if parts else []
        lines += ["| figure | value | |", "|---|---|---|"]
        lines += [
            f"| `{key}` | {value:g} | {record['notes'].get(key, '')} |"
            for key, value in record["figures"].items()
        ]
    PAGE.write_text("\n".join(lines) + "\n")


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
