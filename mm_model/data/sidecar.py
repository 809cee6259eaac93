"""What GDAL and QGIS read beside a map: the names and colours of its classes.

GeoTIFF has no place for names, and one for colours only where there is a single band (a filled map
has two); GDAL keeps them in `<file>.aux.xml` (PAM).
"""

from __future__ import annotations

from xml.sax.saxutils import escape

from mm_model.modalities import Modality


def sidecar(modality: Modality) -> bytes | None:
    """The sidecar of a modality's GeoTIFFs; None where values are numbers."""
    if not modality.is_categorical:
        return None
    names, colors = {c.code: c.name for c in modality.classes}, modality.color_table
    # One of each for each code from 0 on: their place says which code they are of.
    codes = range(max(names) + 1)
    entries = [
        "      <Entry {} />".format(
            " ".join(f'c{n}="{v}"' for n, v in enumerate(colors.get(code, (0, 0, 0, 0)), 1))
        )
        for code in codes
    ]
    categories = [f"      <Category>{escape(names.get(code, ''))}</Category>" for code in codes]
    lines = [
        "<PAMDataset>",
        '  <PAMRasterBand band="1">',
        "    <ColorInterp>Palette</ColorInterp>",
        "    <ColorTable>",
        *entries,
        "    </ColorTable>",
        "    <CategoryNames>",
        *categories,
        "    </CategoryNames>",
        "  </PAMRasterBand>",
        "</PAMDataset>",
    ]
    return "\n".join([*lines, ""]).encode()
