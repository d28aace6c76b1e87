"""Checkpoints: written whole, read without running code, and resumed."""

from orthotrain.checkpoints.reading import describe_checkpoint, read_checkpoint

__all__ = ["describe_checkpoint", "read_checkpoint"]
