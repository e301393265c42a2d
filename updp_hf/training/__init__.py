"""The Trainer that prunes, and what it needs."""
