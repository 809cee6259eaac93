"""Satellite images that a STAC catalogue finds (docs/stac.md)."""
