"""POET layers: a frozen weight between two learned rotations."""
