"""Great Expectations on the index: the suite is made from the modalities; the only importer of it.

The frame that is judged has a row for each patch × modality: the index, the split of the patch, and
three derived columns (see `judged_frame`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import great_expectations as gx
import great_expectations.expectations as gxe
import numpy as np
import pandas as pd
from great_expectations.expectations.row_conditions import Column
from great_expectations.render.renderer import ValidationResultsPageRenderer
from great_expectations.render.view import DefaultJinjaPageView

from mm_model.config import ValidateConfig
from mm_model.data import quality
from mm_model.data.files import write_atomically
from mm_model.data.split import MARGIN, SPLITS, TEST, TRAIN
from mm_model.errors import DataError
from mm_model.modalities import Modality

KEY = ["patch_id", "modality"]
# Failing rows that are kept and named for each expectation.
_NAMED_ROWS = 20
_COMPLETE = (
    *KEY,
    *("place_id", "source", "crs", "height", "width", "gsd_m", "sha256", "split"),
    *("min", "max", "mean", "valid_fraction", "pixels_per_gsd"),
)


def judged_frame(index: pd.DataFrame, splits: pd.DataFrame) -> pd.DataFrame:
    """The index with `split` and what is derived from it, here and by `quality.derive`.

    `pixels_per_gsd` is the side of a pixel over gsd_m, of both sides that which is farther from 1,
    and null where the transform is incomplete; `grids_of_patch` counts the grids that layers of a
    patch have; `splits_of_place` counts the splits that patches of a place are in, where margin
    counts as training.
    """
    frame = index.merge(splits[["patch_id", "split"]], on="patch_id", how="left")
    along = np.hypot(frame["a"], frame["d"]) / frame["gsd_m"]
    across = np.hypot(frame["b"], frame["e"]) / frame["gsd_m"]
    frame["pixels_per_gsd"] = along.where((along - 1).abs() > (across - 1).abs(), across)
    frame.loc[frame[[*"abcdef"]].isna().any(axis=1), "pixels_per_gsd"] = np.nan
    grid = frame.groupby(["crs", *"abcdef", "height", "width"], dropna=False).ngroup()
    frame["grids_of_patch"] = grid.groupby(frame["patch_id"]).transform("nunique")
    side = frame["split"].replace(MARGIN, TRAIN)
    frame["splits_of_place"] = side.groupby(frame["place_id"]).transform("nunique")
    return quality.derive(frame)


def build_suite(
    modalities: Sequence[Modality],
    *,
    patch_px: int,
    min_valid_fraction: float,
    max_shift_px: float,
    limits: ValidateConfig,
) -> gx.ExpectationSuite:
    """Everything that an index of these modalities must satisfy."""
    names = [m.name for m in modalities]
    between = gxe.ExpectColumnValuesToBeBetween
    expectations: list[Any] = [
        gxe.ExpectCompoundColumnsToBeUnique(column_list=KEY),
        gxe.ExpectColumnValuesToBeInSet(column="modality", value_set=names),
        gxe.ExpectColumnValueLengthsToBeBetween(column="crs", min_value=1),
        gxe.ExpectColumnValuesToMatchRegex(column="sha256", regex=r"^[0-9a-f]{64}$"),
        gxe.ExpectColumnValuesToMatchRegex(
            column="acquired_at",
            # Groups that capture nothing: pandas warns of the others.
            regex=r"^\d{4}(?:-\d{2}(?:-\d{2}(?:T[\d:.]+(?:Z|[+-][\d:]+)?)?)?)?$",
        ),
        gxe.ExpectColumnValuesToBeInSet(column="height", value_set=[patch_px]),
        gxe.ExpectColumnValuesToBeInSet(column="width", value_set=[patch_px]),
        between(column="gsd_m", min_value=0, strict_min=True),
        between(column="native_gsd_m", min_value=0, strict_min=True),
        between(column="pixels_per_gsd", min_value=0.99, max_value=1.01),
        between(column="grids_of_patch", min_value=1, max_value=1),
        between(column="valid_fraction", min_value=min_valid_fraction, max_value=1),
        gxe.ExpectColumnValuesToBeInSet(column="split", value_set=list(SPLITS)),
        gxe.ExpectColumnDistinctValuesToContainSet(column="split", value_set=[TRAIN, TEST]),
        between(column="splits_of_place", min_value=1, max_value=1),
        gxe.ExpectColumnDistinctValuesToContainSet(
            column="modality", value_set=names, row_condition=Column("split") == TRAIN
        ),
    ]
    expectations += [gxe.ExpectColumnValuesToNotBeNull(column=c) for c in _COMPLETE]
    mostly = 1 - limits.tolerated_share
    for column, greatest in {
        "white_share": limits.max_white_share,
        "saturated_share": limits.max_saturated_share,
        "days_apart": limits.max_days_apart,
        "shift_px": max_shift_px,
    }.items():
        expectations.append(between(column=column, max_value=greatest, mostly=mostly))
    expectations.append(gxe.ExpectColumnValuesToBeNull(column="near_duplicate_of", mostly=mostly))
    for modality in modalities:
        low, high = modality.valid_range
        if not modality.is_categorical:  # decibels that are power, reflectance that is numbers
            least, most = modality.quantity.traits.plausible_median
            condition = Column("modality") == modality.name
            expectations.append(
                between(column="median", min_value=least, max_value=most, row_condition=condition)
            )
        for column in ("min", "max"):
            condition = Column("modality") == modality.name
            expectations.append(
                gxe.ExpectColumnValuesToBeInSet(
                    column=column, value_set=list(modality.class_codes), row_condition=condition
                )
                if modality.is_categorical
                else between(column=column, min_value=low, max_value=high, row_condition=condition)
            )
    return gx.ExpectationSuite(name="index", expectations=expectations)


def validate(
    index: pd.DataFrame,
    splits: pd.DataFrame,
    modalities: Sequence[Modality],
    *,
    patch_px: int,
    min_valid_fraction: float,
    max_shift_px: float,
    limits: ValidateConfig,
    report: Path,
    docs: Path,
) -> int:
    """Judge an index; the report (JSON) and the Data Docs (one page) are written in any case.

    Returns:
        How many expectations were met: all of them.

    Raises:
        DataError: one was not; the message names the rows.
    """
    suite = build_suite(
        modalities,
        patch_px=patch_px,
        min_valid_fraction=min_valid_fraction,
        max_shift_px=max_shift_px,
        limits=limits,
    )
    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    asset = context.data_sources.add_pandas("patches").add_dataframe_asset("index")
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch(
        {"dataframe": judged_frame(index, splits)}
    )
    result = batch.validate(
        context.suites.add(suite),
        result_format={
            "result_format": "COMPLETE",
            "unexpected_index_column_names": KEY,
            "include_unexpected_rows": False,
        },
    )
    outcomes = [_outcome(one) for one in result.results]
    failed = [o for o in outcomes if not o["success"]]
    alignment = quality.alignment_table(index)
    summary = {
        "success": not failed,
        "rows": len(index),
        "alignment": alignment,
        "excluded_layers": quality.excluded_layers(index),
        "expectations": outcomes,
    }
    write_atomically(report, (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode())
    write_atomically(docs / "index.html", _page(result, alignment).encode())
    if failed:
        raise DataError(
            f"{len(failed)} of {len(outcomes)} expectations of the data are not met",
            got=" | ".join(_sentence(o) for o in failed),
            remedy=f"see {docs / 'index.html'}",
        )
    return len(outcomes)


def _outcome(result: Any) -> dict[str, Any]:
    """One expectation's result, without batch ids and times, so that equal data give equal text."""
    config = result.expectation_config
    kwargs = {k: v for k, v in config.kwargs.items() if k not in ("batch_id", "row_condition")}
    condition = config.kwargs.get("row_condition")
    rows = result.result.get("unexpected_index_list") or []
    observed = result.result.get("observed_value")
    return {
        "expectation": config.type,
        "arguments": _plain(kwargs),
        "where": "" if condition is None else _where(condition),
        "success": bool(result.success),
        "unexpected": int(result.result.get("unexpected_count") or 0),
        "rows": _plain(rows[:_NAMED_ROWS]),
        "observed": _plain(observed),
        "error": (result.exception_info or {}).get("exception_message"),
    }


def _where(condition: Any) -> str:
    made = condition if isinstance(condition, dict) else condition.dict()
    return f"{made['column']['name']} {made['operator']} {made['parameter']}"


def _sentence(outcome: dict[str, Any]) -> str:
    what = outcome["arguments"].get("column") or " × ".join(outcome["arguments"]["column_list"])
    where = f" where {outcome['where']}" if outcome["where"] else ""
    rows = "; ".join(
        f"{r['patch_id']} {r['modality']}"
        + "".join(f" ({k} {v})" for k, v in r.items() if k not in KEY)
        for r in outcome["rows"]
    )
    more = outcome["unexpected"] - len(outcome["rows"])
    named = f": {rows}{f' and {more} more' if more > 0 else ''}" if rows else ""
    return f"{outcome['expectation']} of {what}{where}{named}{outcome['error'] or ''}"


def _plain(value: Any) -> Any:
    """JSON's own types, for NumPy's, sets and numbers that JSON lacks."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


# Great Expectations' page takes styles, scripts and icons from the network; a page of data must be
# readable without, so these go, and a few lines of style stand in.
_FOREIGN = re.compile(
    r'<script\b.*?</script>|<link\b[^>]*>|<img\b[^>]*src="http[^>]*>'
    r'|<div class="modal\b.*?(?=<div class="container|</body>)|<footer\b.*?</footer>'
    r'|<a\b[^>]*href="http[^>]*>.*?</a>|background(?:-image)?:\s*url\([^)]*http[^)]*\)',
    re.DOTALL | re.IGNORECASE,
)
_STYLE = """<style>
body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%;margin:.5rem 0 1.5rem}
td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left;vertical-align:top}
.text-success::before{content:"✔";color:#187a33}.text-danger::before{content:"✘";color:#b00020}
.text-warning::before{content:"!";color:#a60}.badge{font-weight:600}
button,nav,.navbar,.cooltip .top,.page-actions-card{display:none}
</style></head>"""


def _alignment_section(alignment: Sequence[dict[str, Any]]) -> str:
    heads = ("source", "reference", "modality", "layers", "known", "median_px", "p95_px", "moved")
    lines = [
        "<tr>" + "".join(f"<td>{escape(str(row[h]))}</td>" for h in heads) + "</tr>"
        for row in alignment
    ]
    titles = "".join(f"<th>{h.replace('_px', ', px')}</th>" for h in heads)
    return (
        "<h2>Alignment</h2><p>How far layers lie from the reference layer of their patch, as"
        " stored. Of the others it is not known; they may share too little structure.</p>"
        f"<table><tr>{titles}</tr>{''.join(lines)}</table></body>"
    )


def _page(result: Any, alignment: Sequence[dict[str, Any]]) -> str:
    document = ValidationResultsPageRenderer(run_info_at_end=True).render(result)
    html = str(DefaultJinjaPageView().render(document))
    page = _FOREIGN.sub("", html).replace("</head>", _STYLE, 1)
    return page.replace("</body>", _alignment_section(alignment), 1)
