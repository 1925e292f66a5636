"""Benchmarks of operators and layers beside their peers; `python -m benchmarks.run` runs them all."""
