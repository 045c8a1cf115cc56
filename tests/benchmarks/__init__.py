"""Benchmarks: `python -m tests.benchmarks NAME`. Run on request; no test asserts a time."""
