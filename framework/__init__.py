"""Orthogonal training for PyTorch on Lightning: POET pretraining and OFTv2 finetuning."""

__version__ = "0.1.0"
