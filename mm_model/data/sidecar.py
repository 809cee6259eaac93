"""What GDAL and QGIS read beside a map: the names of its classes.

GeoTIFF has a place for colours but none for names; GDAL keeps them in `<file>.aux.xml` (PAM).
"""

from __future__ import annotations

from xml.sax.saxutils import escape

from mm_model.modalities import Modality


def sidecar(modality: Modality) -> bytes | None:
    """The sidecar of a modality's GeoTIFFs; None where values are numbers."""
    if not modality.is_categorical:
        return None
    names = {c.code: c.name for c in modality.classes}
    # A name for each code from 0 on: their place says which code they are of.
    lines = [
        f"      <Category>{escape(names.get(code, ''))}</Category>"
        for code in range(max(names) + 1)
    ]
    body = "\n".join(lines)
    return (
        '<PAMDataset>\n  <PAMRasterBand band="1">\n    <CategoryNames>\n'
        f"{body}\n    </CategoryNames>\n  </PAMRasterBand>\n</PAMDataset>\n"
    ).encode()
