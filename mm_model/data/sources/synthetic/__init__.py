"""Synthetic Earth: one procedural scene, from which every modality is made by plausible physics."""

from mm_model.data.sources.synthetic.sensors import Acquisition
from mm_model.data.sources.synthetic.source import CRS, SyntheticSource, render

__all__ = ["CRS", "Acquisition", "SyntheticSource", "render"]
