"""`python -m mm_model.cli` is `mm`."""

from mm_model.cli import main

main()
