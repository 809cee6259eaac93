"""Figures over seeds, and Markdown tables of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BySeed = Mapping[int, float]
"""Seed → figure; empty where nothing is known."""


@dataclass(frozen=True)
class Results:
    """The records of cells."""

    records: Sequence[Mapping[str, Any]]

    def of(self, regime: str, method: str, *path: str | int) -> BySeed:
        """A figure that lies at a path within the records of a regime and method; a number in the
        path is a place in a list.
        """
        found: dict[int, float] = {}
        for record in self.records:
            cell = record["cell"]
            if (cell["regime"], cell["method"]) == (regime, method):
                value: Any = record
                for part in path:
                    there = isinstance(value, Mapping) and part in value
                    value = value[part] if there or isinstance(part, int) else None
                if value is not None and math.isfinite(value):
                    found[cell["seed"]] = float(value)
        return found

    def regimes(self) -> list[str]:
        return list(dict.fromkeys(r["cell"]["regime"] for r in self.records))

    def methods(self, regime: str) -> list[str]:
        there = (r["cell"] for r in self.records)
        return list(dict.fromkeys(c["method"] for c in there if c["regime"] == regime))

    def pairs(self, regime: str) -> list[str]:
        """Names of the ordered pairs of a regime, in declared order."""
        found: dict[str, None] = {}
        for record in self.records:
            if record["cell"]["regime"] == regime:
                found |= dict.fromkeys(record["pairs"])
        return list(found)


def minus(a: BySeed, b: BySeed) -> BySeed:
    """Differences, seed by seed."""
    return {seed: a[seed] - b[seed] for seed in a if seed in b}


def over(a: BySeed, b: BySeed) -> BySeed:
    """Quotients, seed by seed; where the divisor is positive."""
    return {seed: a[seed] / b[seed] for seed in a if b.get(seed, 0) > 0}


def mean_of(parts: Iterable[BySeed]) -> BySeed:
    """Mean of several figures, for seeds that have them all."""
    columns = list(parts)
    seeds = set.intersection(*(set(c) for c in columns)) if columns else set()
    return {seed: float(np.mean([c[seed] for c in columns])) for seed in sorted(seeds)}


def mean(values: BySeed) -> float:
    return float(np.mean(list(values.values()))) if values else math.nan


def spread(values: BySeed) -> float:
    """Standard deviation over seeds; NaN below two."""
    return float(np.std(list(values.values()), ddof=1)) if len(values) > 1 else math.nan


def flat(figures: Mapping[str, BySeed]) -> dict[str, float]:
    """Each figure's mean, and `…_spread` where there are seeds; what is not known is left out."""
    found = {}
    for name, values in figures.items():
        if values:
            found[name] = mean(values)
            if len(values) > 1:
                found[f"{name}_spread"] = spread(values)
    return found


def shown(values: BySeed, digits: int = 2) -> str:
    """The mean ± its spread."""
    if not values:
        return "–"
    deviation = spread(values)
    tail = "" if math.isnan(deviation) else f" ± {deviation:.{digits}f}"
    return f"{mean(values):.{digits}f}{tail}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
