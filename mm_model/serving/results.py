"""What `write_scene` wrote, as one file to be sent."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

from mm_model.api import MANIFEST, SIDECAR, TIFF, ZIP, Manifest, ManifestFile, Provenance
from mm_model.data import raster
from mm_model.data.files import needs_room
from mm_model.modalities import Modality
from mm_model.serving.answers import ZIP_DATE, encode_record

ZIP_NAME = "generated.zip"


def pack(
    paths: Sequence[Path], targets: Sequence[Modality], *, zipped: bool | None = None
) -> tuple[Path, str, Provenance]:
    """A lone GeoTIFF as it is, several moved into a zip with a `manifest.json`.

    Args:
        paths: of the GeoTIFFs, in one folder; their names begin as `write_scene` has them begin.
        targets: what they are of.
        zipped: whether a lone one is zipped, too; None: if it has a sidecar, which goes with it.

    Returns:
        The file, its media type, and how it was made.
    """
    header = raster.read_header(paths[0])
    provenance = Provenance.from_tags(header.tags)
    beside = [side for path in paths if (side := path.with_name(path.name + SIDECAR)).is_file()]
    if len(paths) == 1 and not (bool(beside) if zipped is None else zipped):
        return paths[0], TIFF, provenance
    files = []
    for path in paths:
        (name,) = (m.name for m in targets if path.stem.partition("_")[0] == m.name)
        rest = path.stem.removeprefix(name).lstrip("_")
        number = int(rest or 0) if rest != "uncertainty" else None
        files.append(ManifestFile(name=path.name, modality=name, sample=number))
    grid = header.grid
    manifest = Manifest(
        provenance=provenance,
        crs=grid.crs,
        transform=grid.transform,
        height=grid.height,
        width=grid.width,
        files=tuple(files),
    )
    packed = paths[0].with_name(ZIP_NAME)
    # Stored: the GeoTIFFs are compressed already.
    with needs_room(ZIP_NAME), zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(zipfile.ZipInfo(MANIFEST, ZIP_DATE), encode_record(manifest))
        for path in [*paths, *beside]:
            entry = zipfile.ZipInfo(path.name, ZIP_DATE)
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as into:
                shutil.copyfileobj(source, into, 2**20)
            path.unlink()  # at once: both would take twice the room
    return packed, ZIP, provenance
