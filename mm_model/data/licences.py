"""What the data come from, and under which licence: said once, for cards and catalogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mm_model.config import PrepareConfig, parse, read_yaml
from mm_model.data.sources.manifest import ManifestFile
from mm_model.data.sources.stac import request
from mm_model.modalities import Modality


def licences(
    config: PrepareConfig, modalities: Sequence[Modality], folder: Path
) -> Mapping[str, Mapping[str, str]]:
    """Name of a data set, or of a product of a catalogue → its licence and attribution.

    Args:
        config: the section `prepare`.
        modalities: the active ones.
        folder: the pipeline folder.

    Raises:
        ConfigError: the manifest or the search is wrong.
    """
    if config.source == "stac" and config.stac is not None:
        return request.licences(folder / config.stac.search, modalities)
    if config.source == "synthetic" or config.geotiff is None:
        return {"synthetic": {"licence": "computed by this project, free of any right"}}
    path = folder / config.geotiff.manifest
    manifest = parse(ManifestFile, read_yaml(path), str(path))
    return {
        name: {"licence": s.licence, "attribution": s.attribution or ""}
        for name, s in manifest.sources.items()
    }
