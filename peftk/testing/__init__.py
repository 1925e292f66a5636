"""What proves a backend: cases of every operator, and one table of tolerances. Used by tests and benchmarks."""
