"""The sites of depth pruning: one kind in each file."""
