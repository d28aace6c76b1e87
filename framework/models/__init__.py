"""Networks: how they are built or loaded, and what is checked before they are."""

from orthotrain.models.builders import (
    CausalLM,
    ModelBuilder,
    PretrainedModel,
    check_attention_of,
    check_options,
    check_vocabulary,
    enable_checkpointing,
)

__all__ = [
    "CausalLM",
    "ModelBuilder",
    "PretrainedModel",
    "check_attention_of",
    "check_options",
    "check_vocabulary",
    "enable_checkpointing",
]
