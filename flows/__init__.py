"""Prefect flows: when, where, again; the work is in mm_model."""
