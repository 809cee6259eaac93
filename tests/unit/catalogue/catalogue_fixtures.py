"""Grids of all sorts, and all modalities of which there is a sort."""

from mm_model.geo.grid import Grid
from mm_model.modalities import MODALITIES

MODALITIES_OF_ODD = tuple(MODALITIES.values())
SHAPE = (8, 12)
# A system that no authority names.
_WKT = (
    'PROJCS["made here",GEOGCS["WGS 84",DATUM["WGS_1984",SPHEROID["WGS 84",6378137,298.257223563]],'
    'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
    'PARAMETER["latitude_of_origin",0],PARAMETER["central_meridian",7.5],'
    'PARAMETER["scale_factor",1],PARAMETER["false_easting",0],PARAMETER["false_northing",0],'
    'UNIT["metre",1]]'
)
ODD_GRIDS = (
    Grid("EPSG:32633", (10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0), *SHAPE),
    Grid("EPSG:32733", (10.0, 0.0, 480_000.0, 0.0, -10.0, 7_000_000.0), *SHAPE),
    Grid("EPSG:32601", (10.0, 0.0, 303_850.0, 0.0, -10.0, 5_998_800.0), *SHAPE),
    Grid(_WKT, (10.0, 0.0, 1_000.0, 0.0, -10.0, 5_500_000.0), *SHAPE),
    Grid("", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), *SHAPE),
)
LICENCES = {
    "source0": {"licence": "CC-BY-4.0", "attribution": "Some | body, <b>2024</b>"},
    "source1": {"licence": "public domain", "attribution": ""},
}
