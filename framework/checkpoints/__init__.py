"""Checkpoints: written whole, read without running code, and resumed."""
