"""Benchmarks: single ops with pytest-benchmark (`test_*.py`), the demo's figures (`demo.py`), results as files."""
