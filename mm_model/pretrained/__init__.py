"""The bundle in the box: a small model that comes with the package, to use or to go on from.

`tiny/` beside this file is a bundle like any other (see `bundle`), with its model card.
"""

from __future__ import annotations

from pathlib import Path

NAME = "pretrained"
"""What people call it, in `train.start` and in commands."""

PRETRAINED = Path(__file__).parent / "tiny"
"""Its folder."""
