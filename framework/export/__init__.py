"""Hugging Face folders and PEFT adapters from checkpoints."""
