"""An evaluation as files: metrics.json, table.md, picture sheets, and an example of an input."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm_model.data.files import write_atomically
from mm_model.evaluation.distances import save_distances
from mm_model.evaluation.evaluate import Evaluation, Example, Samples
from mm_model.modalities import Kind, Modality
from mm_model.pictures import Panel, save_sheet

_EXAMPLE_PX = 32


def write_report(evaluation: Evaluation, folder: Path) -> None:
    """Write metrics.json, table.md, example.json and sheets/*.png into a folder."""
    sheets = folder / "sheets"
    sheets.mkdir(parents=True, exist_ok=True)
    for stale in sheets.glob("*.png"):
        stale.unlink()
    by_name = {m.name: m for m in evaluation.modalities}
    for observed in dict.fromkeys(e.observed for e in evaluation.examples):
        rows = [_panels(e, by_name) for e in evaluation.examples if e.observed == observed]
        save_sheet(sheets / f"from-{'-'.join(observed)}.png", rows, f"From {', '.join(observed)}")
    save_sheet(
        sheets / "from-nothing.png",
        _joint_panels(evaluation.joint, by_name),
        "From nothing: each row is one scene, generated jointly",
    )
    if len(evaluation.metrics["distances"]) > 1:
        save_distances(sheets / "by-distance.png", evaluation.metrics["distances"])
    example = _input_example(evaluation)
    for name, text in (
        ("table.md", table(evaluation.metrics)),
        ("example.json", json.dumps(example, allow_nan=False)),
        # Last: where metrics.json is, the report is whole.
        ("metrics.json", json.dumps(evaluation.metrics, indent=1, allow_nan=False) + "\n"),
    ):
        write_atomically(folder / name, text.encode())


def table(metrics: Mapping[str, Any]) -> str:
    """The rows as two Markdown tables: continuous targets, and classes. Where there are several
    ground sampling distances, each row is there once for each of them.
    """
    distances: Sequence[Mapping[str, Any]] = metrics.get("distances", ())
    by_distance = len(distances) > 1
    rows: Sequence[Mapping[str, Any]] = metrics["rows"]
    if by_distance:
        each = zip(*(d["rows"] for d in distances), strict=True)
        rows = [
            {**r, **d} for same in each for d, r in zip(map(_gsd, distances), same, strict=True)
        ]
    lines = [
        f"{metrics['patches']} held-out patches of {metrics['places']} places, "
        f"{metrics['samples']} samples each, {metrics['steps']} steps. Figures: one sample / mean "
        "of the samples. PSNR and SSIM take the span of a modality's display range as peak.",
        "",
    ]
    for kind, columns in _COLUMNS.items():
        of_kind = [r for r in rows if r["kind"] == kind]
        if of_kind:
            place = ["distance"] if by_distance else []
            heads = ["observed", "target", *place, "patches", *(head for head, _, _ in columns)]
            lines += [_line(heads), _line(["---"] * len(heads))]
            for r in of_kind:
                figures = [_figures(r, key, digits) for _, key, digits in columns]
                at = [f"{r['gsd_m']:g} m"] if by_distance else []
                lines.append(
                    _line([", ".join(r["observed"]), r["target"], *at, str(r["patches"]), *figures])
                )
            lines.append("")
    return "\n".join(lines)


# Column's title, key of its figure ({} is filled with nothing, or with what marks the mean of the
# samples), decimals.
_COLUMNS = {
    Kind.CONTINUOUS: (
        ("PSNR, dB", "psnr{}_db", 1),
        ("SSIM", "ssim{}", 2),
        ("MAE", "mae{}", 3),
        ("spectral angle, °", "spectral_angle{}_deg", 1),
        ("spread of samples", "spread", 3),
    ),
    Kind.CATEGORICAL: (
        ("mIoU", "miou{}", 3),
        ("accuracy", "accuracy{}", 3),
        ("disagreement of two samples", "spread", 3),
    ),
}


def _gsd(distance: Mapping[str, Any]) -> dict[str, float]:
    return {"gsd_m": distance["gsd_m"]}


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _figures(row: Mapping[str, Any], key: str, digits: int) -> str:
    keys = [key.format(suffix) for suffix in ("", "_of_mean")] if "{}" in key else [key]
    values = [row.get(k) for k in keys]
    if values[0] is None:
        return "–"
    text = " / ".join("–" if v is None else f"{v:.{digits}f}" for v in values)
    has_unit = row["unit"] not in ("1", "class") and key in ("mae{}", "spread")
    return f"{text} {row['unit']}" if has_unit else text


def _panels(example: Example, modalities: Mapping[str, Modality]) -> list[Panel | None]:
    """Observed layers, then for each target what was generated and what is real. A single target
    has room for three samples.
    """
    layers = example.patch.layers
    row: list[Panel | None] = [
        Panel(
            layers[n].values,
            layers[n].valid,
            modalities[n],
            f"observed, {example.patch.gsd_m:g} m",
        )
        for n in example.observed
    ]
    for name, samples in example.generated.items():
        everywhere = np.ones(example.patch.grid.shape, np.bool_)
        shown = samples[: 3 if len(example.generated) == 1 else 1]
        for k, values in enumerate(shown):
            title = f"generated, sample {k + 1}" if len(shown) > 1 else "generated"
            row.append(Panel(values, everywhere, modalities[name], title))
        real = layers.get(name)
        row.append(
            None if real is None else Panel(real.values, real.valid, modalities[name], "real")
        )
    return row


def _joint_panels(
    joint: Mapping[str, Samples], modalities: Mapping[str, Modality]
) -> list[list[Panel | None]]:
    count = min(len(samples) for samples in joint.values())
    return [
        [
            Panel(v[k], np.ones(v.shape[2:], np.bool_), modalities[name], "generated")
            for name, v in joint.items()
        ]
        for k in range(count)
    ]


def _input_example(evaluation: Evaluation) -> dict[str, Any]:
    """A corner of a held-out layer, as the registered model takes it: modality → nested lists, null
    where nothing is known.
    """
    example = evaluation.examples[0]
    name = example.observed[0]
    layer = example.patch.layers[name]
    known = np.broadcast_to(layer.valid, layer.values.shape)
    values = np.where(known, layer.values, 0).astype(object)
    if layer.values.dtype.kind == "f":
        values[~known] = None
    return {name: values[:, :_EXAMPLE_PX, :_EXAMPLE_PX].tolist()}
