"""Measurements: `latency.py` puts networks side by side, `bench_*.py` are pytest-benchmark suites."""
