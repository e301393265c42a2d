"""The method as mathematics: it needs torch and the layout of merged models, nothing else."""
