"""Which patches share their shards, and how those are made from parts or from a store that stands.

Units that follow one another form a chunk of at most `shard_patches` patches. Where a chunk ends is
said by the names of units, not by their number (content-defined chunking, as rsync and backup tools
do it): a unit that is added or taken away changes the chunk it falls into, and no other. A chunk is
named by what is in it, so that one that is there under its name need not be made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mm_model.data.index import INDEX, SCHEMA
from mm_model.data.parts import read_part
from mm_model.data.shards import ChunkWriter
from mm_model.data.storage import Folder, open_folder
from mm_model.data.store import about, read_rows
from mm_model.errors import DataError, MMError
from mm_model.modalities import Modality


@dataclass(frozen=True)
class Piece:
    """Patches `first` … `first + count - 1` of `of` patches of the unit with this key."""

    key: str
    first: int
    count: int
    of: int


@dataclass(frozen=True)
class Chunk:
    """Pieces whose patches share their shards, one a modality."""

    pieces: tuple[Piece, ...]

    @property
    def name(self) -> str:
        content = json.dumps([[p.key, p.first, p.count] for p in self.pieces])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def chunks_of(units: Iterable[tuple[str, str, int]], shard_patches: int) -> list[Chunk]:
    """The chunks of units in their order.

    Args:
        units: (id, key, patches) of each.
        shard_patches: the most that a chunk may have; a unit with more becomes several chunks.
    """
    chunks: list[Chunk] = []
    pending: list[Piece] = []
    size = 0

    def cut() -> None:
        nonlocal size
        if pending:
            chunks.append(Chunk(tuple(pending)))
        pending.clear()
        size = 0

    for unit_id, key, count in units:
        if size + count > shard_patches:
            cut()
        for first in range(0, count, shard_patches):
            part = min(shard_patches, count - first)
            pending.append(Piece(key, first, part, count))
            size += part
            if count > shard_patches:
                cut()
        if _share(unit_id) < count / shard_patches:
            cut()
    cut()
    return chunks


def _share(unit_id: str) -> float:
    """A number from 0 to 1 that is the unit's own."""
    digest = hashlib.blake2b(unit_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


class Standing:
    """A store that stands, and what of it can be taken over; empty where there is none.

    Attributes:
        shards: their folder.
        units: key → number of patches.
        chunks: names.
    """

    def __init__(self, path: Path) -> None:
        said = about(path)
        self._path = path
        self.shards = open_folder(said.get("shards", path))
        self.units: dict[str, int] = {}
        self.chunks: dict[str, int] = {}
        self._pieces: dict[str, list[tuple[int, int, Piece]]] = {}
        for group, one in enumerate(said.get("chunks", [])):
            chunk = Chunk(tuple(Piece(*piece) for piece in one))
            self.chunks[chunk.name] = group
            before = 0
            for piece in chunk.pieces:
                self.units[piece.key] = piece.of
                self._pieces.setdefault(piece.key, []).append((group, before, piece))
                before += piece.count

    def rows_of_chunk(self, name: str) -> pa.Table:
        return self._group(self.chunks[name])

    def rows_of_piece(self, wanted: Piece) -> pa.Table:
        """Rows of the index of these patches, wherever they lie now."""
        found = []
        for group, before, piece in self._pieces[wanted.key]:
            begin = max(wanted.first, piece.first)
            end = min(wanted.first + wanted.count, piece.first + piece.count)
            if begin < end:
                table, starts = self._group(group), self._starts(group)
                first = before + begin - piece.first
                row, stop = starts[first], starts[first + end - begin]
                found.append(table.slice(row, stop - row))
        return pa.concat_tables(found)

    @lru_cache(maxsize=4)  # noqa: B019 - it lives as long as one preparation
    def _group(self, group: int) -> pa.Table:
        try:
            with pq.ParquetFile(self._path / INDEX) as index:
                return index.read_row_group(group).cast(SCHEMA)
        except (OSError, pa.ArrowInvalid) as error:
            raise damaged(self._path, error) from error

    @lru_cache(maxsize=4)  # noqa: B019
    def _starts(self, group: int) -> Sequence[int]:
        ids = self._group(group)["patch_id"].to_numpy(zero_copy_only=False)
        first = np.flatnonzero(ids[1:] != ids[:-1]) + 1
        return [0, *first.tolist(), len(ids)]


def damaged(store: Path, error: Exception) -> DataError:
    return DataError(
        f"{store} is damaged, and nothing can be taken over from it",
        got=str(error).splitlines()[0],
        remedy="remove it, and run the stage prepare again",
    )


@dataclass(frozen=True)
class ChunkWork:
    """A chunk to be made, and for each piece its rows in the store that stands; None: a part."""

    chunk: Chunk
    rows: tuple[pa.Table | None, ...]

    def __str__(self) -> str:
        return f"shards {self.chunk.name}"


@dataclass(frozen=True)
class ChunkMaker:
    """Writes the shards of a chunk, then its rows of the index beside the parts.

    Attributes:
        parts: where parts are, and rows go.
        standing: shards of the store that stands.
        shards: where shards go.
        modalities: that are kept.
    """

    parts: Folder
    standing: Folder
    shards: Folder
    modalities: Sequence[Modality]

    def __call__(self, work: ChunkWork) -> int | MMError:
        try:
            with ChunkWriter(self.shards, work.chunk.name, self._by_name) as writer:
                for piece, rows in zip(work.chunk.pieces, work.rows, strict=True):
                    for _, layers in self._patches(piece, rows):
                        writer.append(layers)
            with self.parts.create(rows_name(work.chunk)) as new:
                pq.write_table(writer.rows, new.path)
        except MMError as error:
            return error
        except pa.ArrowInvalid as error:
            return DataError(
                f"a part of {work}",
                got=str(error).splitlines()[0],
                remedy=f"it was cut off when the machine died: remove {self.parts.url}",
            )
        return sum(piece.count for piece in work.chunk.pieces)

    @property
    def _by_name(self) -> Mapping[str, Modality]:
        return {m.name: m for m in self.modalities}

    def _patches(self, piece: Piece, rows: pa.Table | None) -> Iterator[tuple[str, Any]]:
        if rows is not None:
            return read_rows(rows, self.standing)
        chosen = range(piece.first, piece.first + piece.count)
        return read_part(self.parts, piece.key, piece.of, self._by_name, chosen)


def rows_name(chunk: Chunk) -> str:
    return f"{chunk.name}.rows"


def read_made(parts: Folder, chunk: Chunk) -> pa.Table:
    """The rows that a ChunkMaker has left."""
    with parts.local(rows_name(chunk)) as path:
        return pq.read_table(path).cast(SCHEMA)
