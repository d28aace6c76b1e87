"""Exports checkpoints as Hugging Face folders or PEFT adapters, and rebuilds networks from checkpoints."""

from orthotrain.export.checkpoint_model import CheckpointModel, load_network, make_plain_
from orthotrain.export.folder import export_checkpoint, export_huggingface

__all__ = ["CheckpointModel", "export_checkpoint", "export_huggingface", "load_network", "make_plain_"]
