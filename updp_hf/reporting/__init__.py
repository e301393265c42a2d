"""What is told of a run: its facts, tables, pictures and the model card."""
