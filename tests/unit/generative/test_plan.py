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
        # Never seen together, and nothing leads there: from z alone, one at a time, though b and c
        # were a pair.
        ("a", "bc", sets("bc", "ad"), passes(("b", ""), ("c", ""))),
        # c was never beside a, but b, which is made in any case, was beside both.
        ("a", "bc", sets("ab", "bc"), passes(("b", "a"), ("c", "b"))),
        # … or is made because it leads to c.
        ("a", "c", sets("ab", "bc"), passes(("b", "a"), ("c", "b"))),
        # Of several that lead there the last; what else is wanted is made as it would be anyway.
        ("a", "b", sets("ac", "ad", "bc", "bd"), passes(("d", "a"), ("b", "d"))),
        ("a", "bc", sets("ac", "ad", "bc", "bd"), passes(("c", "a"), ("d", "a"), ("b", "d"))),
        # What leads sees all that it was seen with; what it leads to, nothing that it was not.
        ("ab", "c", sets("abd", "cd"), passes(("d", "ab"), ("c", "d"))),
        # One lead for two.
        ("a", "bc", sets("ad", "bd", "cd"), passes(("d", "a"), ("b", "d"), ("c", "d"))),
        # No way of more than one step.
        ("a", "d", sets("ab", "bc", "cd"), passes(("d", ""))),
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
    assert plan(observed, list(targets), ALL, seen) == expected


def test_every_pass_stays_within_a_seen_set_and_all_targets_are_made_once() -> None:
    pairs = [frozenset(p) for p in itertools.combinations(ALL, 2)]
    for world in itertools.combinations(pairs, 3):
        seen = [(s, 1) for s in world]
        for observed in itertools.chain.from_iterable(
            itertools.combinations(ALL, n) for n in range(4)
        ):
            targets = [n for n in ALL if n not in observed]
            made = plan(observed, targets[:2], ALL, seen)
            names = [t for p in made for t in p.targets]
            assert set(names) >= set(targets[:2])
            assert len(names) == len(set(names) - set(observed))
            there = set(observed)
            for one in made:
                together = one.targets | one.direct
                assert len(together) == 1 or any(together <= s for s in world)
                assert one.direct <= there
                there |= one.targets


def test_a_modality_of_its_own_leads_nowhere() -> None:
    """What was learnt later must not change what the model makes of the others."""
    seen = sets("ad", "bd")
    assert plan("a", ["b"], ALL, seen, alone=["d"]) == passes(("b", ""))


def test_order_of_sets_does_not_matter() -> None:
    seen = sets("ab", "acd", "bcd", "cd")
    plans = {plan("a", ["b", "c", "d"], ALL, order) for order in itertools.permutations(seen)}
    assert len(plans) == 1
