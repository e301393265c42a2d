"""Images that need no download."""
