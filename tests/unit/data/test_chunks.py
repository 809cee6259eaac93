import random

import pytest
from data_fixtures import PAIR, PlacesSource
from test_prepare import OPTIONS, hashes

from mm_model.data.chunks import chunks_of
from mm_model.data.prepare import prepare
from mm_model.data.store import PatchStore

MOST = 100


def units(numbers):
    """Ids, keys and sizes, of which the ids alone decide."""
    return [(f"u{n:05d}", f"key{n}", 1 + n * 7919 % 40) for n in numbers]


def names(numbers):
    return [chunk.name for chunk in chunks_of(units(numbers), MOST)]


def test_chunks_hold_every_patch_once_in_order_and_no_more_than_allowed():
    given = [*units(range(300)), ("u00301", "large", 1037), ("u00302", "empty", 0)]
    chunks = chunks_of(given, MOST)
    sizes = [sum(p.count for p in c.pieces) for c in chunks]
    assert max(sizes) <= MOST
    patches = [
        (p.key, i) for c in chunks for p in c.pieces for i in range(p.first, p.first + p.count)
    ]
    assert patches == [(key, i) for _, key, count in given for i in range(count)]
    assert len({c.name for c in chunks}) == len(chunks)
    assert sum(sizes) / len(sizes) > MOST / 3


@pytest.mark.parametrize("seed", range(5))
def test_units_that_come_or_go_change_the_chunks_that_they_fall_into(seed):
    numbers = list(range(0, 4000, 2))
    before = names(numbers)
    rng = random.Random(seed)
    one = 2 * rng.randrange(2000) + 1
    new = [n for n in names(sorted([*numbers, one])) if n not in before]
    assert 1 <= len(new) <= 8
    gone = [n for n in names([n for n in numbers if n != one - 1]) if n not in before]
    assert len(gone) <= 8
    # A region of its own, as most additions are.
    region = range(10_001, 10_101, 2)
    new = [n for n in names([*numbers, *region]) if n not in before]
    assert len(new) <= len(names(region)) + 2


def test_shards_of_other_units_are_the_same_files(tmp_path):
    out = tmp_path / "patches"
    prepare(PlacesSource(30, PAIR), out, PAIR, **OPTIONS)
    before = {p.name: p.stat().st_ino for p in out.glob("*.arrow")}
    prepare(PlacesSource(33, PAIR), out, PAIR, **OPTIONS)
    after = {p.name: p.stat().st_ino for p in out.glob("*.arrow")}
    kept = {n for n in before if after.get(n) == before[n]}
    assert len(before) - len(kept) <= 2  # the last chunk of either modality
    prepare(PlacesSource(33, PAIR), tmp_path / "whole", PAIR, **OPTIONS)
    assert hashes(out) == hashes(tmp_path / "whole")


def test_a_unit_larger_than_a_shard_is_divided_and_taken_over(tmp_path):
    options = {"shard_patches": 2, "min_valid_fraction": 0.0}
    out = tmp_path / "patches"
    prepare(PlacesSource(3, PAIR), out, PAIR, **options)  # three patches each
    assert max(PatchStore(out).index["row"]) == 1
    again = PlacesSource(3, PAIR)
    prepare(again, out, PAIR, **OPTIONS)  # other chunks of the same units
    assert not again.read_units
    prepare(PlacesSource(3, PAIR), tmp_path / "whole", PAIR, **OPTIONS)
    assert hashes(out) == hashes(tmp_path / "whole")
