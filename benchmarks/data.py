"""The data engine: each part beside the limit that it is held against.

`python -m benchmarks.data` (that is `make bench-data`) measures all of it; with names, as in
`python -m benchmarks.data workers`, those parts alone, and leaves what was measured of the others.
"""

from __future__ import annotations

import argparse
import importlib
from datetime import UTC, datetime

from benchmarks import record

PARTS = (
    "ratio",
    "store",
    "alignment",
    "real_shifts",
    "storage",
    "many",
    "share",
    "workers",
    "kills",
    "tile",
)
"""`many` and `share` take the longest: 100,000 patches each. `workers` wants a machine that does
nothing else."""


def measure() -> tuple[dict[str, float], dict[str, str]]:
    """All parts."""
    figures: dict[str, float] = {}
    notes: dict[str, str] = {}
    for part in PARTS:
        found, said = measure_part(part)
        figures |= found
        notes |= said
    return figures, notes


def measure_part(part: str) -> tuple[dict[str, float], dict[str, str]]:
    """One part; its note says when, on what, and how busy that was at the end."""
    figures, notes = importlib.import_module(f"benchmarks.data_{part}").measure()
    place = record.machine()
    where = f"{place['processor']}, load {place['load_1_min']}"
    about = f"({datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {where}) {notes.pop('', '')}".strip()
    return figures, {**notes, f"part {part}": about}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    chosen = parser.parse_args().parts
    (record.ROOT / "build").mkdir(exist_ok=True)
    for part in chosen or PARTS:
        print(f"== {part}", flush=True)
        figures, notes = measure_part(part)
        for key, value in figures.items():
            print(f"{key:48} {value:.4g}", flush=True)
        record.merge("data", figures, notes)
        record.write_page()


if __name__ == "__main__":
    main()
