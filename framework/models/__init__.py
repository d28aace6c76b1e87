"""Builds and loads networks, and checks their sizes and options first."""

from orthotrain.models.builders import (
    CausalLM,
    ModelBuilder,
    PretrainedModel,
    check_vocabulary,
    enable_checkpointing,
)
from orthotrain.models.pretrained_options import check_attention_of, check_options

__all__ = [
    "CausalLM",
    "ModelBuilder",
    "PretrainedModel",
    "check_attention_of",
    "check_options",
    "check_vocabulary",
    "enable_checkpointing",
]
