"""Last step of `make pretrained`: a bundle and its card, from a pipeline folder into the box."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mm_model.bundle import MANIFEST, WEIGHTS, load_bundle
from mm_model.data.files import write_atomically
from mm_model.errors import BundleError
from mm_model.evaluation.card import model_card
from mm_model.pretrained import PRETRAINED


def put_in_box(pipeline: Path, box: Path = PRETRAINED) -> None:
    """Copy models/bundle of a pipeline folder into the box and write its card beside it.

    Raises:
        BundleError: the bundle is damaged, or the report is of another one.
    """
    bundle = pipeline / "models" / "bundle"
    manifest = load_bundle(bundle).manifest
    metrics = json.loads((pipeline / "reports" / "metrics.json").read_bytes())
    if metrics["bundle_id"] != manifest.bundle_id:
        raise BundleError(
            f"{pipeline}/reports is of another bundle",
            got=metrics["bundle_id"],
            allowed=manifest.bundle_id,
            remedy="run the stage evaluate",
        )
    lineage = {k: v for k, v in manifest.provenance.items() if isinstance(v, str) and v}
    card = model_card(manifest, manifest.modalities, metrics, lineage)
    box.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS, MANIFEST):
        shutil.copyfile(bundle / name, box / name)
    write_atomically(box / "card.md", card.encode())


if __name__ == "__main__":
    put_in_box(Path.cwd())
