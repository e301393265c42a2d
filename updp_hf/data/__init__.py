"""Images for the recipes: where they come from, how they are read, augmented and mixed."""
