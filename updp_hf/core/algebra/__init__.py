"""Affine maps: reading them off modules, composing them, fitting them, writing them back."""
