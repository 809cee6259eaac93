"""The model card: what a bundle is, in Markdown, from its manifest and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_model.bundle import Manifest


def model_card(manifest: Manifest, metrics: Mapping[str, Any], lineage: Mapping[str, str]) -> str:
    """The card of one bundle."""
    raise NotImplementedError
