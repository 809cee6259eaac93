"""Pure geometry of rasters: no input or output, no GDAL."""
