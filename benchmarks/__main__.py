"""Run benchmarks by name, or all of them; the page is made again after each."""

from __future__ import annotations

import argparse
import importlib

from benchmarks import record

NAMES = ("data", "stac", "train", "generate", "scene", "serve", "hostile", "demo")
"""`demo` last: it clones, installs and takes most of the time."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    arguments = parser.parse_args()
    (record.ROOT / "build").mkdir(exist_ok=True)
    for name in arguments.names or NAMES:
        print(f"== {name}", flush=True)
        figures, notes = importlib.import_module(f"benchmarks.{name}").measure()
        for key, value in figures.items():
            print(f"{key:48} {value:.4g}", flush=True)
        record.write(name, figures, notes)
        record.write_page()


if __name__ == "__main__":
    main()
