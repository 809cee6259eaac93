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
    """One run of the decoder: its targets, and the modalities that it sees directly, which are
    observed or made by a pass before.
    """

    targets: frozenset[str]
    direct: frozenset[str]


def plan(
    observed: Collection[str],
    targets: Sequence[str],
    names: Sequence[str],
    seen_sets: Iterable[tuple[frozenset[str], int]],
    alone: Collection[str] = (),
) -> tuple[Pass, ...]:
    """The passes that make all targets, and what leads to them.

    Each pass takes the seen set with the most observed modalities, then the most open targets, then
    the most patches. Where no seen set holds a target beside anything observed, another modality
    leads to it that was seen with both: it is made first, wanted or not, and the target beside it,
    both from the one scene. Of several the last declared one leads (what lies where before how it
    looks; measured). Where there is none, the target comes from z alone, by itself. Where nothing
    is observed, targets come one after another, the last one first, and each sees those before it:
    a scene leaves every pixel much freedom, in which targets that are made together do not agree
    (measured).

    Args:
        observed: modalities with any known pixel.
        targets: modalities to make, in the model's order; none of them observed.
        names: all of the model's modalities, in its order.
        seen_sets: sets that occurred together in training, with the number of their patches.
        alone: targets that get a pass of their own each, so that asking for them changes nothing
            in the others.
    """
    known = frozenset(observed)
    sets = sorted(seen_sets, key=lambda s: (-s[1], sorted(s[0])))
    passes: list[Pass] = []
    if not known:
        made: set[str] = set()
        together = [t for t in targets if t not in alone]
        for target in [*reversed(together), *(t for t in alone if t in targets)]:
            beside = max((s & made for s, _ in sets if target in s), key=len, default=frozenset())
            passes.append(Pass(frozenset({target}), beside))
            made.add(target)
        return tuple(passes)
    groups = [{t} for t in targets if t in alone]
    for open_ in [{t for t in targets if t not in alone}, *groups]:
        while open_:
            useful = [s for s, _ in sets if s & open_]
            # max keeps the first of equals: the set with the most patches.
            best = max(useful, key=_rank(known, open_), default=frozenset())
            if direct := best & known:
                now = frozenset(best & open_)
                passes.append(Pass(now, frozenset(direct)))
            else:
                now = frozenset({next(t for t in targets if t in open_)})
                lead = _lead(known, now, [n for n in names if n not in alone], sets)
                if lead is not None and not any(lead.targets <= p.targets for p in passes):
                    passes.append(lead)
                passes.append(Pass(now, lead.targets if lead else frozenset()))
            open_ -= now
    return tuple(passes)


def _rank(known: frozenset[str], open_: set[str]) -> Callable[[frozenset[str]], tuple[int, int]]:
    return lambda s: (len(s & known), len(s & open_))


def _lead(
    known: frozenset[str],
    target: frozenset[str],
    names: Sequence[str],
    sets: Sequence[tuple[frozenset[str], int]],
) -> Pass | None:
    """The pass that makes a modality which was seen with something known, and with the target."""
    for name in reversed(names):
        lead = frozenset({name})
        beside = max((s & known for s, _ in sets if lead <= s), key=len, default=frozenset())
        if name not in known and beside and any(lead | target <= s for s, _ in sets):
            return Pass(lead, frozenset(beside))
    return None
