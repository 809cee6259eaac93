"""Where patches come from: the synthetic Earth, and manifests of GeoTIFF files."""
