"""From rasters to a checked store of patches: numpy and disk, no torch."""
