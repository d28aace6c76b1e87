"""Builds and loads networks, and checks their sizes and options first."""

from orthotrain.models.builders import CausalLM, ModelBuilder, PretrainedModel
from orthotrain.models.skeletons import check_described
from orthotrain.models.vocabulary import check_vocabulary

__all__ = ["CausalLM", "ModelBuilder", "PretrainedModel", "check_described", "check_vocabulary"]
