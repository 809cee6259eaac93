"""What is learnt from and judged on: three regimes of data, a control of the second, and a planet
for the bundle in the box.

Places of the synthetic Earth that no training sees are judged on; real rasters are split by the
project's own rule. A regime that hides modalities is a store of its own: an index without the
hidden layers beside links to the same files, so that statistics, batches and the sets that are
"seen together" follow from it by the project's own code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import record
from mm_model.bundle import load_manifest
from mm_model.codec import Codec
from mm_model.config import Params, SyntheticConfig, load_params
from mm_model.data.files import write_atomically
from mm_model.data.index import INDEX
from mm_model.data.patch import Patch, Unit
from mm_model.data.prepare import prepare
from mm_model.data.sources.geotiff import GeotiffSource
from mm_model.data.sources.synthetic import SyntheticSource
from mm_model.data.split import TEST, TRAIN, make_splits
from mm_model.data.stats import compute_statistics
from mm_model.data.store import PatchStore
from mm_model.errors import ConfigError
from mm_model.evaluation.evaluate import choose_patches
from mm_model.modalities import Modality
from mm_model.pretrained import PRETRAINED

RGB, NIR, SAR, MAP = "rgb", "nir", "sar", "map"
UNSEEN = frozenset({SAR, NIR})
"""The pair that `pairs` never shows."""
BOX = "box"
"""Places of a planet that the bundle in the box never saw."""
NAMES = ("complete", "pairs", "pairs_control", "real", BOX)

Show = Callable[[str, Collection[str]], Collection[str]]
"""(patch id, modalities that it has) → those that are shown."""


@dataclass(frozen=True)
class Scale:
    """How much of everything but training time.

    Attributes:
        train_places: of 64 patches.
        test_places: of 8 patches, for pairs; other places than those trained on.
        reference_places: further ones, of one patch, for what compares sets of scenes: patches of
            one place are alike, and no set that is made has two of them.
        patches: held-out patches of the pairs; samples: of each.
        joint: sets made from nothing.
        probe_patches: training patches that probes learn from.
        labelled, maps: training patches with colour and map that segmentation learns from, and
            with the map alone.
        judge_steps, downstream_steps: of the small networks that judge, or are taught.
    """

    train_places: int = 160
    test_places: int = 24
    reference_places: int = 480
    patches: int = 48
    samples: int = 8
    joint: int = 192
    probe_patches: int = 128  # 64 cells each
    labelled: int = 32
    maps: int = 256
    judge_steps: int = 800
    downstream_steps: int = 200

    @property
    def key(self) -> str:
        """Tells scales apart in names of folders."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]

    @property
    def data_key(self) -> str:
        """The same for data, which scales of the same places share."""
        return f"{self.train_places}-{self.test_places}-{self.reference_places}"


SMALL = Scale(6, 3, 40, 4, 2, 16, 8, 8, 8, 20, 10)
"""Enough to see every line run."""


@dataclass(frozen=True)
class Regime:
    """Data to learn from and to be judged on.

    Attributes:
        train, train_at: store and positions of the training patches.
        test, test_at: those of the held-out ones that pairs are judged on.
        reference: a store of further places.
        reference_at: positions there, each layer whole, of two sets of other places that are
            alike in number: what is generated is compared with the first, and so is the second.
        statistics: of the training patches, as `data.stats` gives them.
    """

    name: str
    modalities: tuple[Modality, ...]
    train: PatchStore
    train_at: tuple[int, ...]
    test: PatchStore
    test_at: tuple[int, ...]
    reference: PatchStore
    reference_at: tuple[tuple[int, ...], tuple[int, ...]]
    statistics: Mapping[str, Any]
    patch_px: int

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.modalities)

    @cached_property
    def codec(self) -> Codec:
        return Codec(self.modalities, self.statistics)

    @property
    def sets(self) -> list[frozenset[str]]:
        """Sets of modalities that training patches show."""
        return [frozenset(s["modalities"]) for s in self.statistics["sets"]]

    def positions_with(self, names: Collection[str]) -> list[int]:
        """Training patches that show all of the named modalities."""
        return [p for p, shown in zip(self.train_at, self._shown, strict=True) if shown >= {*names}]

    @cached_property
    def _shown(self) -> list[frozenset[str]]:
        grouped = self.train.index.groupby("patch_id")["modality"].agg(frozenset)
        return [grouped[self.train.patch_ids[p]] for p in self.train_at]


PLANET, BOX_PLANET = 11, 13  # of the synthetic Earth: `prepare.synthetic.seed`
# Of 1, 2, 3 and 4e-3 the best for ours after four CPU minutes; half an hour from random weights
# wants 1e-3 (docs/experiments.md).
_TRAINING = {"learning_rate": 2e-3, "ema": 0.998, "batch": 16, "only": None}


@cache
def choices() -> Params:
    """Those of the bundle in the box, but for what a training of minutes from random weights
    wants; read once: a run does not change its mind.
    """
    params = load_params(record.ROOT / "examples" / "pretrained" / "params.yaml")
    return params.model_copy(update={"train": params.train.model_copy(update=_TRAINING)})


def ordered_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """(source, target), all of them."""
    return list(itertools.permutations(names, 2))


def show_pair(modalities: Sequence[str], never: Collection[str] = ()) -> Show:
    """Exactly two modalities a patch, the pair being a function of the patch's id.

    Args:
        modalities: in declared order.
        never: a pair that no patch shows.
    """
    pairs = [p for p in itertools.combinations(modalities, 2) if set(p) != set(never)]

    def show(patch_id: str, there: Collection[str]) -> Collection[str]:
        possible = [p for p in pairs if set(p) <= set(there)]
        number = int.from_bytes(hashlib.sha256(patch_id.encode()).digest()[:8], "big")
        return possible[number % len(possible)] if possible else ()

    return show


def make_view(store: PatchStore, show: Show, path: Path) -> PatchStore:
    """The same patches with only the layers that are shown; one that shows none is left out."""
    path.mkdir(parents=True, exist_ok=True)
    shown = {
        str(patch_id): frozenset(show(str(patch_id), set(group)))
        for patch_id, group in store.index.groupby("patch_id", sort=False)["modality"]
    }
    rows = zip(store.index["patch_id"], store.index["modality"], strict=True)
    store.index[[name in shown[patch] for patch, name in rows]].to_parquet(path / INDEX)
    for shard in set(store.index["shard"]):
        link = path / shard
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(store.path / shard, path))
    return PatchStore(path)


def open_regime(name: str, scale: Scale, folder: Path) -> Regime:
    """Prepare a regime's data below a folder, or find them there.

    Raises:
        ConfigError: `real`, and the rasters are not here.
    """
    return _real(scale, folder) if name == "real" else _synthetic(name, scale, folder)


class _Places:
    """Some places of the synthetic Earth, in its order."""

    def __init__(self, source: SyntheticSource, first: int) -> None:
        self._source, self._units = source, list(source.units())[first:]

    def units(self) -> Sequence[Unit]:
        return self._units

    def read(self, unit: Unit) -> Iterator[Patch]:
        return self._source.read(unit)


def _synthetic(name: str, scale: Scale, folder: Path) -> Regime:
    chosen = choices()
    planet = BOX_PLANET if name == BOX else PLANET
    home = folder / BOX if name == BOX else folder
    whole = _store(home / "train", planet, scale.train_places, patches=64)
    judged = scale.train_places + scale.test_places
    # 9 patches a place, since a place is a square; choose_patches takes them in turn.
    test = _store(home / "test", planet, judged, 9, first=scale.train_places)
    all_places = judged + scale.reference_places
    reference = _store(home / "reference", planet, all_places, 1, first=judged)
    names = [m.name for m in chosen.selected]
    hide = {"pairs": show_pair(names, UNSEEN), "pairs_control": show_pair(names)}
    train = make_view(whole, hide[name], folder / name) if name in hide else whole
    for_pairs = list(dict.fromkeys(test.index["place_id"]))
    others = list(dict.fromkeys(reference.index["place_id"]))
    half = len(others) // 2
    return Regime(
        name,
        chosen.selected,
        train,
        tuple(range(len(train))),
        test,
        tuple(choose_patches(test, _at(test, for_pairs), 8 * len(for_pairs), 0)),
        reference,
        (_whole(reference, others[:half], scale), _whole(reference, others[half:], scale)),
        load_manifest(PRETRAINED).statistics
        if name == BOX
        else _statistics(train, range(len(train)), chosen.selected, folder / f"{name}-stats.json"),
        chosen.prepare.patch_px,
    )


def _store(path: Path, planet: int, places: int, patches: int, first: int = 0) -> PatchStore:
    chosen = choices()
    config = SyntheticConfig(
        seed=planet,
        places=places,
        patches_per_place=patches,
        complete_share=1.0,
    )
    source = SyntheticSource(
        config, chosen.prepare.patch_px, chosen.prepare.gsd_m[0], chosen.selected
    )
    _prepare(_Places(source, first), path, chosen.selected)
    return PatchStore(path)


def _real(scale: Scale, folder: Path) -> Regime:
    home = record.ROOT / "examples" / "real"
    chosen = load_params(home / "params.yaml")
    assert chosen.prepare.geotiff is not None
    manifest = home / chosen.prepare.geotiff.manifest
    source = GeotiffSource(
        manifest, chosen.prepare.patch_px, chosen.prepare.gsd_m[0], chosen.selected
    )
    _prepare(source, folder / "real", chosen.selected)
    store = PatchStore(folder / "real")
    splits = make_splits(store.index, chosen.split)
    at = {s: tuple(splits.index[splits["split"] == s].tolist()) for s in (TRAIN, TEST)}
    statistics = _statistics(store, at[TRAIN], chosen.selected, folder / "real-stats.json")
    return Regime(
        "real",
        chosen.selected,
        store,
        at[TRAIN],
        store,
        at[TEST],
        store,
        ((), ()),
        statistics,
        chosen.prepare.patch_px,
    )


def _prepare(source: Any, path: Path, modalities: tuple[Modality, ...]) -> None:
    chosen = choices().prepare
    prepare(
        source,
        path,
        modalities,
        shard_patches=chosen.shard_patches,
        min_valid_fraction=chosen.min_valid_fraction,
    )


def _statistics(
    store: PatchStore, positions: Sequence[int], modalities: Sequence[Modality], file: Path
) -> Mapping[str, Any]:
    """`compute_statistics`, kept in a file for as long as data and code are the same."""
    code = Path(compute_statistics.__code__.co_filename).read_bytes()
    hashes = pd.util.hash_pandas_object(store.index[["patch_id", "modality", "sha256"]])
    asked = hashlib.sha256(code + hashes.to_numpy().tobytes() + repr(list(positions)).encode())
    if file.is_file():
        kept: dict[str, Any] = json.loads(file.read_text())
        if kept["of"] == asked.hexdigest():
            return kept["statistics"]  # type: ignore[no-any-return]
    found = compute_statistics(store, positions, modalities)
    write_atomically(file, json.dumps({"of": asked.hexdigest(), "statistics": found}).encode())
    return found


def _at(store: PatchStore, places: Collection[str]) -> list[int]:
    owners = store.index.drop_duplicates("patch_id")["place_id"].tolist()
    wanted = set(places)
    return [i for i, place in enumerate(owners) if place in wanted]


def _whole(store: PatchStore, places: Collection[str], scale: Scale) -> tuple[int, ...]:
    """Patches of the places that have every pixel of every modality, as many as `joint` asks."""
    gaps = store.index.groupby("patch_id")["valid_fraction"].agg(["min", "size"])
    most = gaps["size"].max()
    fit = set(gaps.index[(gaps["min"] == 1) & (gaps["size"] == most)])
    positions = [p for p in _at(store, places) if store.patch_ids[p] in fit]
    return tuple(choose_patches(store, positions, scale.joint, 0))


def available(name: str) -> str | None:
    """Why a regime cannot be had here; None if it can."""
    if name != "real":
        return None
    from mm_model.data.sources import manifest

    try:
        manifest.load_manifest(record.ROOT / "examples" / "real" / "manifest.yaml")
    except ConfigError as error:
        return str(error)
    return None
