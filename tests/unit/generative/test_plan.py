from __future__ import annotations

import itertools

import pytest

from mm_model.generative.plan import Pass, plan

ALL = ("a", "b", "c", "d")


def sets(*groups: str) -> list[tuple[frozenset[str], int]]:
    return [(frozenset(g), 10 - i) for i, g in enumerate(groups)]


def passes(*groups: tuple[str, str]) -> tuple[Pass, ...]:
    return tuple(Pass(frozenset(t), frozenset(d)) for t, d in groups)


@pytest.mark.parametrize(
    ("observed", "targets", "seen", "expected"),
    [
        # Everything together was seen: one pass, all observed pixels shown.
        ("a", "bcd", sets("abcd"), passes(("bcd", "a"))),
        # Nothing observed: one after another, each beside those before it.
        ("", "abcd", sets("abcd"), passes(("d", ""), ("c", "d"), ("b", "cd"), ("a", "bcd"))),
        # Pairs only: each target beside what it was seen with.
        ("a", "bc", sets("ab", "ac"), passes(("b", "a"), ("c", "a"))),
        # Never seen together: from z alone, one at a time, though b and c were a pair.
        ("a", "bc", sets("bc", "ad"), passes(("b", ""), ("c", ""))),
        # Mixed: c was never beside a.
        ("a", "bc", sets("ab", "bc"), passes(("b", "a"), ("c", ""))),
        # Never more together than training saw.
        ("", "abc", sets("ab", "bc"), passes(("c", ""), ("b", "c"), ("a", "b"))),
        # More observed pixels win over more targets.
        ("ab", "cd", sets("acd", "abc"), passes(("c", "ab"), ("d", "a"))),
        # A target that no set holds.
        ("a", "d", sets("ab"), passes(("d", ""))),
        ("", "d", [], passes(("d", ""))),
        ("a", "", sets("ab"), ()),
    ],
)
def test_plan(observed: str, targets: str, seen: list, expected: tuple[Pass, ...]) -> None:
    assert plan(observed, list(targets), seen) == expected


def test_every_pass_stays_within_a_seen_set_and_all_targets_are_made_once() -> None:
    pairs = [frozenset(p) for p in itertools.combinations(ALL, 2)]
    for world in itertools.combinations(pairs, 3):
        seen = [(s, 1) for s in world]
        for observed in itertools.chain.from_iterable(
            itertools.combinations(ALL, n) for n in range(4)
        ):
            targets = [n for n in ALL if n not in observed]
            made = plan(observed, targets, seen)
            assert sorted(t for p in made for t in p.targets) == sorted(targets)
            for one in made:
                together = one.targets | one.direct
                assert len(together) == 1 or any(together <= s for s in world)


def test_order_of_sets_does_not_matter() -> None:
    seen = sets("ab", "acd", "bcd", "cd")
    plans = {plan("a", ["b", "c", "d"], order) for order in itertools.permutations(seen)}
    assert len(plans) == 1
