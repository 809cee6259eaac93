"""Measurements that anyone can run again: `make bench`, or `python -m benchmarks NAME ...`."""

import os

# Before torch is imported: threads that wait by spinning starve each other wherever something else
# wants a core, and a measurement then tells of that alone. Replicas are started the same way.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
