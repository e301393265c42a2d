"""Time and memory that pruning adds to training."""
