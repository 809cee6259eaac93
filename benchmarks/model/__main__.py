"""Train and judge what is asked for, then write the report from all cells that are there."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import record
from benchmarks.model import regimes
from benchmarks.model.cells import Bench, Cell, run_all
from benchmarks.model.methods import applies, factories
from benchmarks.model.report import write_report


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(os.cpu_count() or 1)
    scale = regimes.SMALL if arguments.small else regimes.Scale()
    if arguments.patches:
        scale = replace(scale, patches=arguments.patches)
    bench = Bench(arguments.folder, arguments.minutes, scale)
    wanted = []
    for name in arguments.regimes:
        if missing := regimes.available(name):
            print(f"left out: {name}, {missing}")
        else:
            wanted.append(name)
    # Seeds outermost: what is cut off leaves whole tables of fewer seeds.
    cells = [
        Cell(regime, method, seed)
        for seed in range(arguments.seeds)
        for regime in wanted
        for method in arguments.methods
        if applies(method, regime)
    ]
    if not arguments.report:
        run_all(bench, cells, os.cpu_count() or 1)
    publish = not arguments.small and not arguments.dry
    write_report(bench, cells, publish=publish, any_code=arguments.any_code)


def _parse() -> argparse.Namespace:
    def several(allowed: tuple[str, ...]) -> Callable[[str], list[str]]:
        def parse(text: str) -> list[str]:
            names = text.split(",")
            if unknown := [n for n in names if n not in allowed]:
                raise argparse.ArgumentTypeError(f"{unknown} not of {', '.join(allowed)}")
            return [n for n in allowed if n in names]

        return parse

    methods = tuple(factories())
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    add = parser.add_argument
    add("--minutes", type=float, default=8, help="CPU minutes a trained model")
    add("--seeds", type=int, default=3)
    add("--regimes", type=several(regimes.NAMES), default=list(regimes.NAMES), metavar="A,B")
    add("--methods", type=several(methods), default=list(methods), metavar="A,B")
    add("--patches", type=int, help="held-out patches for the pairs (48)")
    add("--small", action="store_true", help="little of everything, to see that it runs")
    add("--report", action="store_true", help="run nothing, report what is there")
    add("--any-code", action="store_true", help="report cells of older code, too, by their commit")
    add("--dry", action="store_true", help="write the report below the folder only")
    add("--folder", type=Path, default=record.ROOT / "build" / "bench-model")
    return parser.parse_args()


if __name__ == "__main__":
    main()
