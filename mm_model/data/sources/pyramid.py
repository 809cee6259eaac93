"""The same ground at several ground sampling distances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from mm_model.data.patch import Patch, Source, Unit


class Pyramid:
    """One source a distance, as one source.

    Ids of the finest stay as they are; those of a coarser one, of units and patches, end in its
    distance (`synthetic-00003@20m`), so that one more coarse distance changes no other id. Places
    keep their ids: a split keeps all of a ground together. A unit that a finer source has with the
    same fingerprint, such as a scene whose manifest fixes the distance, is read once.

    Args:
        sources: ground sampling distance in metres → source, the finest first.
    """

    def __init__(self, sources: Mapping[float, Source]) -> None:
        self._sources = sources

    def units(self) -> Sequence[Unit]:
        return [Unit(key, unit.fingerprint) for key, (_, unit, _) in sorted(self._members.items())]

    def read(self, unit: Unit) -> Iterator[Patch]:
        source, own, suffix = self._members[unit.unit_id]
        for patch in source.read(own):
            yield replace(patch, patch_id=patch.patch_id + suffix)

    @cached_property
    def _members(self) -> dict[str, tuple[Source, Unit, str]]:
        """Unit id → the source it is of, its unit there, what its ids end in."""
        members: dict[str, tuple[Source, Unit, str]] = {}
        known: set[Unit] = set()
        for gsd_m, source in self._sources.items():
            suffix = f"@{gsd_m:g}m" if members else ""
            fresh = [unit for unit in source.units() if unit not in known]
            members |= {unit.unit_id + suffix: (source, unit, suffix) for unit in fresh}
            known.update(fresh)
        return members
