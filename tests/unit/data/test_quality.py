"""Copies are found among all layers, however many resemble each other."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_model.data.quality import NEAR_BITS, _near_duplicates

BITS = 128


def index(looks: Sequence[int | None], places: Sequence[int], modality="any") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "patch_id": [f"patch{i}" for i in range(len(looks))],
            "place_id": [f"place{p}" for p in places],
            "modality": modality,
            "look": [None if look is None else f"{look:032x}" for look in looks],
        }
    )


def flip(look: int, bits: Sequence[int]) -> int:
    for bit in bits:
        look ^= 1 << bit
    return look


@given(st.data())
def test_every_pair_within_the_limit_is_found_and_no_other(data):
    base = data.draw(st.integers(0, (1 << BITS) - 1))
    bits = st.lists(st.integers(0, BITS - 1), max_size=4, unique=True)
    looks = [flip(base, data.draw(bits)) for _ in range(data.draw(st.integers(1, 9)))]
    places = [data.draw(st.integers(0, 3)) for _ in looks]
    found = _near_duplicates(index(looks, places))
    for row, (look, place) in enumerate(zip(looks, places, strict=True)):
        elsewhere = {
            f"patch{other}": (look ^ looks[other]).bit_count()
            for other in range(len(looks))
            if places[other] != place
        }
        near = {
            patch: differing for patch, differing in elsewhere.items() if differing <= NEAR_BITS
        }
        assert (row in found) == bool(near)
        if near:
            assert found[row] in near
            assert (near[found[row]] == 0) == (0 in near.values())  # copies go first


@pytest.mark.parametrize("spread", [[0, 1, 2], [20, 64, 127], [5, 50, 100], [63, 64, 65]])
def test_a_copy_is_found_among_thousands_that_share_most_bits(spread):
    rng = np.random.default_rng(0)
    count = 3000
    # Alike in 80 bits, as layers whose better half is a level sea; apart from each other elsewhere.
    looks = [int(low) << 80 for low in rng.choice(1 << 48, count, replace=False)]
    found = _near_duplicates(index([*looks, flip(looks[700], spread)], range(count + 1)))
    assert found[count] == "patch700"
    assert found[700] == f"patch{count}"


def test_one_picture_at_many_places_costs_no_comparison_of_all_pairs():
    count = 200_000  # 20 billion pairs
    found = _near_duplicates(index([7 << 60] * count, range(count)))
    assert len(found) == count
    assert found[0] == "patch1"
    assert found[count - 1] == "patch0"


def test_a_place_may_look_the_same_on_other_days_and_other_modalities_are_not_compared():
    same = index([5, 5, None], [1, 1, 2])
    other = index([5], [3], "another").set_axis([9])
    assert _near_duplicates(pd.concat([same, other])) == {}
