"""Modules that blend what the checkpoint has in a slot with what the pruned model will have."""
