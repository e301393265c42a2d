"""What one runs: the recipes, and the benchmarks that prove what they are worth."""
