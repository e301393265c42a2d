"""What can be pruned, what is to be pruned, and how much."""
