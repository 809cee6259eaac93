"""How every stage begins and ends."""

from __future__ import annotations

import sys
from collections.abc import Callable

from mm_model.errors import MMError


def run(main: Callable[[], None]) -> None:
    """Run a stage; an error of ours ends it as one line on stderr and exit code 1."""
    try:
        main()
    except MMError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
