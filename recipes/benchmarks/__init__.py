"""What proves the package: `python -m recipes.benchmarks.NAME` from the root of the repository."""
