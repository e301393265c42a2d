"""Sets of labelled images that are made on this machine."""
