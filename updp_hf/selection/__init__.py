"""Which sites to prune: budgets, selectors and the scores that they go by."""
