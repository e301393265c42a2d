"""What the exported graph of a model says: calls, the role of each, blocks."""
