"""Accuracy at equal latency, against what one would do instead."""
