"""Which selector chooses the best sites, and what it costs."""
