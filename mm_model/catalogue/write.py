"""A patch store's catalogue, whole or not at all; and whether one still describes its store."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mm_model.catalogue.card import CLASSES, HISTOGRAMS, data_card
from mm_model.catalogue.census import take_census
from mm_model.catalogue.charts import save_classes, save_histograms, save_map
from mm_model.catalogue.collection import CARD, ITEMS, MAP, PAGE, collection
from mm_model.catalogue.items import COLLECTION, write_items
from mm_model.catalogue.page import page
from mm_model.catalogue.sheets import sheets
from mm_model.data.files import sync_folder
from mm_model.data.index import INDEX
from mm_model.data.store import PatchStore
from mm_model.errors import DataError
from mm_model.modalities import Modality


def write_catalogue(
    out: Path,
    name: str,
    store: PatchStore,
    splits: Path,
    modalities: Sequence[Modality],
    licences: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """Write collection.json, items.parquet, card.md with its pictures, and index.html into `out`.

    A folder that stands there is replaced. The same store, split and licences give the same bytes.

    Args:
        out: a folder beside the store's.
        name: id of the collection.
        store: the patches.
        splits: splits.parquet.
        modalities: the active ones.
        licences: data set → licence and attribution.

    Returns:
        The content of collection.json.
    """
    census = take_census(store, pd.read_parquet(splits), modalities)
    record = collection(name, census, licences, _made_of(store.path, splits))
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (partial / COLLECTION).write_text(text, encoding="utf-8")
    write_items(partial / ITEMS, store, census, record)
    save_map(partial / MAP, census)
    save_histograms(partial / HISTOGRAMS, census)
    if any(m.is_categorical for m in modalities):
        save_classes(partial / CLASSES, census)
    card = data_card(name, census, licences, store.index)
    (partial / CARD).write_text(card, encoding="utf-8")
    pictures = {path.name: path.read_bytes() for path in sorted(partial.glob("*.png"))}
    html = page(record["title"], card, pictures, sheets(store, census))
    (partial / PAGE).write_text(html, encoding="utf-8")
    sync_folder(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return record


def page_of(catalogue: Path, store: Path, splits: Path) -> Path:
    """The page of a catalogue that describes this store and split.

    Raises:
        DataError: there is none, or it describes others.
    """
    remedy = "run the stage catalogue (mm catalogue)"
    try:
        made_of = json.loads((catalogue / COLLECTION).read_bytes())["mm:made_of"]
    except FileNotFoundError:
        raise DataError(f"{catalogue} is no catalogue", remedy=remedy) from None
    if made_of != _made_of(store, splits):
        raise DataError(
            f"{catalogue} describes other patches or splits than those in {store.parent}",
            remedy=remedy,
        )
    return catalogue / PAGE


def _made_of(store: Path, splits: Path) -> dict[str, str]:
    files = (store / INDEX, splits)
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}
