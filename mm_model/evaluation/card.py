"""The model card: what a bundle is, in Markdown, from its manifest and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mm_model.bundle import Manifest
from mm_model.evaluation.report import table
from mm_model.modalities import Modality

_INTENDED = """\
Fills in modalities that are missing at a place, from any subset of those that are there, and makes
consistent sets of all of them from nothing; for research on generation and data fusion, for
pre-training, and for tests of processing chains. What it returns is *generated*: a plausible
picture, not a measurement. Not for decisions about people or property, for mapping of record,
navigation, damage assessment, or as evidence of what was on the ground."""

_LIMITS = """\
- Where the observed modalities do not determine the target (radar does not know the season) each
  sample is one of several possible answers: ask for more than one.
- Small structures (roads, houses, field borders) are hinted at, not drawn.
- Sets of modalities that never occurred together in training are decoded one at a time.
- Another ground sampling distance, sensor, or landscape than those trained on is extrapolation.
- Figures hold for the held-out places named here and for no others."""


def model_card(
    manifest: Manifest,
    modalities: Sequence[Modality],
    metrics: Mapping[str, Any],
    lineage: Mapping[str, str],
) -> str:
    """The card of one bundle.

    Args:
        manifest: of the bundle.
        modalities: of its model.
        metrics: the content of metrics.json.
        lineage: where it comes from, as version tags.
    """
    bands = [
        f"- `{m.name}`: {m.title} ({', '.join(m.band_names)}; "
        f"{f'{len(m.classes)} classes' if m.is_categorical else _unit(m)})"
        for m in modalities
    ]
    sources: Mapping[str, Mapping[str, str]] = manifest.provenance.get("sources", {})
    licences = [_licence(name, source) for name, source in sources.items()] or ["not recorded"]
    origin = [f"- {key}: `{value}`" for key, value in sorted(lineage.items())]
    sections = {
        "What": "Any subset of these modalities in, every other one out:\n\n" + "\n".join(bands),
        "Trained on": _training(manifest),
        "Data licences": "\n".join(f"- {licence}" for licence in licences),
        "Figures": table(metrics),
        "Intended use": _INTENDED,
        "Limits": _LIMITS,
        "Origin": "\n".join([f"- bundle: `{manifest.bundle_id}`", *origin]),
    }
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items()) + "\n"


def _training(manifest: Manifest) -> str:
    """What it was trained on and for how long, with what it began with."""
    provenance = manifest.provenance
    own = provenance.get("training") or {}
    counts = own or manifest.statistics
    distances = " and ".join(f"{gsd_m:g}" for gsd_m in manifest.gsd_m)
    sentences = [
        f"{counts['patches']:,} patches of {counts['places']:,} places at {distances} m, "
        f"source `{provenance.get('data_source', 'unknown')}`.",
        f"Training took {_effort(own)}." if own else "How long is not recorded.",
    ]
    if begun := provenance.get("start"):
        sentences.append(
            f"It began with the weights and the normalisation of bundle `{begun['bundle_id']}`, "
            f"after {_effort(begun)} of training: {_effort(manifest.effort)} in all."
        )
    return " ".join(sentences)


def _effort(record: Mapping[str, Any]) -> str:
    minutes = record["seconds"] / 60
    return f"{record['steps']:,} steps, {record['samples']:,} samples, {minutes:,.1f} minutes"


def _licence(name: str, source: Mapping[str, str]) -> str:
    attribution = source.get("attribution")
    return f"`{name}`: {source['licence']}" + (f" ({attribution})" if attribution else "")


def _unit(modality: Modality) -> str:
    return "no unit" if modality.unit == "1" else modality.unit
