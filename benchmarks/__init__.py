"""Honest measurements: `python -m benchmarks --help`. Names of benchmarks are names of files here."""
