"""Honest measurements: `python -m benchmarks --help`. Each benchmark has the name of its file."""
