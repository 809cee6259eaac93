"""The modules of the scene model: torch alone."""
