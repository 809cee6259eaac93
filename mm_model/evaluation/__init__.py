"""Metrics in physical units on held-out places, and their pictures."""
