"""A training that begins with the weights of a bundle instead of random ones.

Its normalisation stays the bundle's, since the weights mean nothing under another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_model.bundle import Bundle, Manifest
from mm_model.errors import BundleError, ConfigError
from mm_model.modalities import Modality
from mm_model.nn.model import SceneModel


def check_start(
    manifest: Manifest,
    path: Path,
    modalities: Sequence[Modality],
    size: Mapping[str, int],
    add: str | None = None,
) -> None:
    """Refuse a bundle that a training cannot begin with.

    Args:
        manifest: of the bundle.
        path: of the bundle, for messages.
        modalities: of params.yaml: the bundle's, or some of them, in its order.
        size: widths and depths that params.yaml chose: the bundle's.
        add: a modality of params.yaml that the bundle lacks and is to learn.

    Raises:
        ConfigError: params.yaml asks for another model than the bundle's.
        BundleError: the bundle does not say how long it was trained.
    """
    known = {m.name: m for m in manifest.modalities}
    if add is not None and (add in known or add not in [m.name for m in modalities]):
        raise ConfigError(
            "train.add",
            got=add,
            allowed=f"one of params.yaml's {[m.name for m in modalities]} that {path} lacks",
            remedy="name it under modalities and prepare data that has it",
        )
    modalities = [m for m in modalities if m.name != add]
    chosen = [m.name for m in modalities]
    if strange := [n for n in chosen if n not in known]:
        raise ConfigError(
            f"modalities of params.yaml that the bundle {path} lacks",
            got=", ".join(strange),
            allowed=", ".join(known),
            remedy="; ".join(f"add it with `mm train --add {n}`" for n in strange),
        )
    if chosen != (order := [n for n in known if n in chosen]):
        raise ConfigError(
            "order of modalities in params.yaml", got=chosen, allowed=f"{order}, as in {path}"
        )
    if changed := [m.name for m in modalities if _signal(m) != _signal(known[m.name])]:
        raise ConfigError(
            f"modalities that are declared otherwise than in the bundle {path}",
            got=", ".join(changed),
            allowed="the same quantity, bands and classes",
            remedy="train from scratch, or restore mm_model/modalities.py",
        )
    if size != manifest.model["size"]:
        raise ConfigError(
            "model.size", got=dict(size), allowed=f"{manifest.model['size']}, the size of {path}"
        )
    if not manifest.effort:
        raise BundleError(
            f"{path} does not say how long it was trained",
            allowed="provenance with the figures of its training",
            remedy="name a bundle that the stage train wrote",
        )


def continued(
    bundle: Bundle,
    seen_sets: Sequence[Mapping[str, Any]],
    patch_px: int,
    only: str | None = None,
) -> SceneModel:
    """The bundle's model, ready to learn on: its weights, its codec, its modalities.

    Args:
        bundle: what to begin with; it stays as it is.
        seen_sets: sets of modalities of its training and of the one that begins.
        patch_px: side of the patches of the one that begins.
        only: the part of the model that learns; None is all of it.
    """
    config = {**bundle.model.config, "seen_sets": seen_sets, "patch_px": patch_px}
    model = SceneModel.from_config(config)
    model.load_state_dict(bundle.model.state_dict())
    if only is not None:
        model.requires_grad_(False)
        model.get_submodule(only).requires_grad_(True)
    return model


def grown(
    bundle: Bundle,
    modality: Modality,
    statistics: Mapping[str, Any],
    seen_sets: Sequence[Mapping[str, Any]],
) -> SceneModel:
    """The bundle's model and one modality more, whose own parts alone can learn.

    Args:
        bundle: what to begin with; it stays as it is.
        modality: that the bundle lacks.
        statistics: the bundle's, with those of the modality (see `join_statistics`).
        seen_sets: of the data; those that hold the modality count.
    """
    known = {m.name for m in bundle.model.modalities} | {modality.name}
    sets = [
        {**s, "modalities": [n for n in s["modalities"] if n in known]}
        for s in seen_sets
        if modality.name in s["modalities"]
    ]
    return bundle.model.add(modality, statistics, merge_sets(sets))


def join_statistics(
    older: Mapping[str, Any], newer: Mapping[str, Any], name: str
) -> dict[str, Any]:
    """The older statistics, with those that the newer hold of one modality."""
    return {**older, "modalities": {**older["modalities"], name: newer["modalities"][name]}}


def join_correlations(older: Mapping[str, Any], newer: Mapping[str, Any]) -> dict[str, Any]:
    """The older statistics, with the newer's correlations of bands where they have none."""
    modalities = {}
    for name, record in older["modalities"].items():
        found = newer["modalities"].get(name, {})
        fresh = {key: found[key] for key in ("correlation",) if key in found}
        modalities[name] = {**fresh, **record}
    return {**older, "modalities": modalities}


def merge_sets(*parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The union of sets of modalities that were seen together; the patches of equal ones add up."""
    patches: dict[tuple[str, ...], int] = {}
    for seen in (s for part in parts for s in part):
        names = tuple(sorted(seen["modalities"]))
        patches[names] = patches.get(names, 0) + int(seen["patches"])
    return [{"modalities": list(names), "patches": count} for names, count in patches.items()]


def _signal(modality: Modality) -> tuple[object, ...]:
    """What the numbers of a modality mean."""
    return modality.quantity, modality.bands, modality.class_codes
