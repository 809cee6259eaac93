"""Ours beside what people would use instead, at equal compute: `python -m benchmarks.model`.

A *cell* is one method, trained from one seed on one data regime and judged on held-out places.
Cells lie below build/bench-model and are not made twice, so that a run may be cut off at any time;
the report is made from those that are there.
"""
