"""The data card, in Markdown: what, where, when, under which licence, and how much of what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date

import numpy as np
import pandas as pd

from mm_model.catalogue.census import MOST_LAYERS, Census
from mm_model.catalogue.collection import ITEMS, MAP
from mm_model.data.quality import excluded_layers
from mm_model.modalities import Modality

HISTOGRAMS, CLASSES = "histograms.png", "classes.png"
_QUANTILES = (0.01, 0.5, 0.99)


def data_card(
    name: str,
    census: Census,
    licences: Mapping[str, Mapping[str, str]],
    index: pd.DataFrame,
) -> str:
    """The card of a patch store; its pictures lie beside it.

    Args:
        name: of the collection.
        census: of the store.
        licences: data set → licence and attribution.
        index: of the store.
    """
    classes = [m for m in census.modalities if m.is_categorical]
    sections = {
        "What": _what(census),
        "Which modalities occur together": _sets(census),
        "Where": f"![Map of the places, by the modalities present]({MAP})\n\n{_where(census)}",
        "When": _when(census),
        "Where it comes from": _origin(census, licences),
        "Training, validation and test": _splits(census),
        "Values": f"![How often values occur, by modality]({HISTOGRAMS})\n\n{_values(census)}",
        **(
            {"Classes": f"![Share of each class]({CLASSES})\n\n{_classes(census, classes)}"}
            if classes
            else {}
        ),
        "What was left out": _left_out(index),
        "Read it": _read(census),
    }
    head = (
        f"{len(census.patches):,} patches of {len(census.places):,} places,"
        f" {distances(census.patches['gsd_m'])} a pixel, each with any of"
        f" {', '.join(f'`{m.name}`' for m in census.modalities)}: co-registered on one grid, in"
        " physical units, with a mask where nothing is known."
    )
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"# Data card of {name}\n\n{head}\n\n{body}\n"


def _what(census: Census) -> str:
    rows = []
    for m in census.modalities:
        row = census.layers.loc[m.name]
        native = distances(row["native_gsd_m"]) if row["native_gsd_m"] else "not known"
        share = 100 * row["layers"] / len(census.patches)
        valid = f"{100 * row['valid_fraction']:.1f} %" if row["layers"] else "–"
        of = f"{len(m.classes)} classes" if m.is_categorical else ", ".join(m.band_names)
        rows.append(
            (
                f"`{m.name}`",
                m.title,
                of,
                _unit(m),
                native,
                f"{row['layers']:,}",
                f"{share:.1f} %",
                valid,
            )
        )
    head = (
        "modality",
        "what",
        "bands",
        "unit",
        "measured at",
        "layers",
        "of patches",
        "valid pixels",
    )
    return table(head, rows)


def _sets(census: Census) -> str:
    total = len(census.patches)
    rows = [
        (_named(census, members), f"{patches:,}", _percent(patches, total), f"{places:,}")
        for members, patches, places in census.sets
    ]
    return table(("modalities of a patch", "patches", "share", "places"), rows)


def _where(census: Census) -> str:
    patches = census.patches
    box = patches[["xmin", "ymin", "xmax", "ymax"]]
    located = box.dropna()
    systems = patches.groupby("crs").size().sort_values(ascending=False, kind="stable")
    rows = [(_system(str(crs)), f"{n:,}") for crs, n in systems.items()]
    parts = []
    if len(located):
        parts.append(
            f"Longitude {located['xmin'].min():.3f}° to {located['xmax'].max():.3f}°, latitude"
            f" {located['ymin'].min():.3f}° to {located['ymax'].max():.3f}° (WGS 84)."
        )
    if len(located) < len(patches):
        parts.append(f"{len(patches) - len(located):,} patches lie nowhere.")
    return " ".join(parts) + "\n\n" + table(("reference system", "patches"), rows)


def _when(census: Census) -> str:
    layers = census.layers
    first, last = (layers[k].to_numpy(np.float64) for k in ("first_day", "last_day"))
    rows = [
        (f"`{name}`", f"{dated:,}", f"{every - dated:,}", _day(first[i]), _day(last[i]))
        for i, (name, every, dated) in enumerate(
            zip(layers.index, layers["layers"], layers["dated"], strict=True)
        )
    ]
    return table(("modality", "dated layers", "undated layers", "first day", "last day"), rows)


def _origin(census: Census, licences: Mapping[str, Mapping[str, str]]) -> str:
    counts = census.patches.groupby("source").agg(
        n=("patch_id", "size"), places=("place_id", "nunique")
    )
    rows = [(f"`{s}`", f"{n:,}", f"{p:,}") for s, n, p in counts.itertuples()]
    terms = [
        (f"`{name}`", one["licence"], one.get("attribution") or "–")
        for name, one in sorted(licences.items())
    ]
    return "\n\n".join(
        [
            table(("source", "patches", "places"), rows),
            table(("data set", "licence", "attribution"), terms),
        ]
    )


def _splits(census: Census) -> str:
    names = [m.name for m in census.modalities]
    rows = []
    for split, mine in census.patches.groupby("split", sort=False):
        has = [int((mine["members"].to_numpy() >> i & 1).sum()) for i in range(len(names))]
        rows.append(
            (
                str(split),
                f"{len(mine):,}",
                f"{mine['place_id'].nunique():,}",
                *map("{:,}".format, has),
            )
        )
    head = ("split", "patches", "places", *(f"with `{n}`" for n in names))
    return table(head, sorted(rows, key=lambda row: -int(row[1].replace(",", ""))))


def _values(census: Census) -> str:
    rows = []
    for m in census.modalities:
        values = census.values[m.name]
        for name, band in zip(m.band_names, values.bands, strict=False):
            if values.pixels:
                figures = [
                    band.moments.mean,
                    band.moments.std,
                    band.least,
                    *(band.quantile(q) for q in _QUANTILES),
                    band.greatest,
                ]
                rows.append(
                    (f"`{m.name}` {name}", _unit(m), f"{values.layers:,}", *map(_figure, figures))
                )
    head = (
        "band",
        "unit",
        "layers counted",
        "mean",
        "deviation",
        "least",
        "1 %",
        "median",
        "99 %",
        "greatest",
    )
    return table(head, rows) + f"\n\n{_counted(census)}"


def _counted(census: Census) -> str:
    if all(v.layers < MOST_LAYERS for v in census.values.values()):
        return "Over all valid pixels of all layers."
    return (
        f"Over all valid pixels of at most {MOST_LAYERS:,} layers of a modality, in even steps over"
        " the store."
    )


def _classes(census: Census, modalities: Sequence[Modality]) -> str:
    tables = []
    for m in modalities:
        values = census.values[m.name]
        rows = [
            (str(c.code), c.name, f"{(n := values.classes[c.code]):,}", _percent(n, values.pixels))
            for c in m.classes
        ]
        head = ("code", f"class of `{m.name}`", "pixels", "share")
        tables.append(table(head, rows) + f"\n\nCounted in {values.layers:,} layers.")
    return "\n\n".join(tables)


def _left_out(index: pd.DataFrame) -> str:
    left = excluded_layers(index)
    moved = int(((index["moved_rows_px"] != 0) | (index["moved_cols_px"] != 0)).sum())
    return (
        f"{len(left):,} patches lack a layer that lay elsewhere than the others; {moved:,} layers"
        " were moved onto the others. What was checked, and what was found, stands in"
        " `data/validation.json` and `data/docs`."
    )


def _read(census: Census) -> str:
    name = census.modalities[0].name
    return (
        f"`{ITEMS}` holds a STAC item for each patch, `collection.json` what they have in common;"
        " `../patches/index.parquet` a row for each layer. All are found by their outlines:\n\n"
        "```python\n"
        "import geopandas, pyarrow as pa\n\n"
        f'items = geopandas.read_parquet("{ITEMS}")\n'
        f'some = items[["{name}" in names for names in items["mm:modalities"]]]\n'
        f'asset = some.assets.iloc[0]["{name}"]\n'
        'table = pa.ipc.open_file(pa.memory_map(asset["href"])).read_all()\n'
        'values = table["values"].combine_chunks().to_numpy_ndarray()[asset["mm:row"]]\n'
        "```"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar or a line break in a cell cannot break it."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _named(census: Census, members: int) -> str:
    return ", ".join(f"`{name}`" for name in census.names(members))


def _unit(modality: Modality) -> str:
    return "–" if modality.unit == "1" else modality.unit


def distances(values: Sequence[float] | pd.Series[float]) -> str:
    """Each of them once, in metres, to three digits."""
    rounded = {float(f"{v:.3g}") for v in values}  # degrees make a distance of their own a place
    *others, last = (f"{v:g}" for v in sorted(rounded))
    return f"{', '.join(others)} and {last} m" if others else f"{last} m"


def _system(crs: str) -> str:
    if not crs:
        return "none"
    return crs if len(crs) < 40 else crs.split('"')[1] if '"' in crs else f"{crs[:40]}…"


def _day(ordinal: float) -> str:
    return "–" if np.isnan(ordinal) else date.fromordinal(int(ordinal)).isoformat()


def _percent(count: int, total: int) -> str:
    return f"{100 * count / total:.3g} %" if total else "–"


def _figure(value: float) -> str:
    return f"{value:.4g}"
