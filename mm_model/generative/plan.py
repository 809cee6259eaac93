"""Which targets are decoded together, and which observed modalities the decoder sees with them.

Decoding more modalities at once than ever occurred together in training gives garbage, whatever the
model (measured). So every pass of the decoder stays within one set that training has seen. The
scene z is sampled once, from everything observed, and shared by all passes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """One run of the decoder: its targets, and the observed modalities that it sees directly."""

    targets: frozenset[str]
    direct: frozenset[str]


def plan(
    observed: Collection[str],
    targets: Sequence[str],
    seen_sets: Iterable[tuple[frozenset[str], int]],
    alone: Collection[str] = (),
) -> tuple[Pass, ...]:
    """The passes that make all targets.

    Each pass takes the seen set with the most observed modalities, then the most open targets, then
    the most patches. Where no seen set holds a target beside anything observed, that target comes
    from z alone, by itself; where nothing is observed, targets come together.

    Args:
        observed: modalities with any known pixel.
        targets: modalities to make; none of them observed.
        seen_sets: sets that occurred together in training, with the number of their patches.
        alone: targets that get a pass of their own each, so that asking for them changes nothing
            in the others.
    """
    known = frozenset(observed)
    sets = sorted(seen_sets, key=lambda s: (-s[1], sorted(s[0])))
    passes = []
    groups = [{t} for t in targets if t in alone]
    for open_ in [{t for t in targets if t not in alone}, *groups]:
        while open_:
            useful = [s for s, _ in sets if s & open_]
            # max keeps the first of equals: the set with the most patches.
            best = max(useful, key=_rank(known, open_), default=frozenset())
            direct = best & known
            if direct or (not known and best):
                made = frozenset(best & open_)
            else:
                made = frozenset({next(t for t in targets if t in open_)})
            passes.append(Pass(made, frozenset(direct)))
            open_ -= made
    return tuple(passes)


def _rank(known: frozenset[str], open_: set[str]) -> Callable[[frozenset[str]], tuple[int, int]]:
    return lambda s: (len(s & known), len(s & open_))
