"""Data modules: text and instructions, tokenized once, in an order that all ranks share and that resumes mid-epoch."""

from orthotrain.data.corpus.text_data import TextData
from orthotrain.data.corpus.token_cache import CorruptCacheError, TokenCache
from orthotrain.data.instructions.instruction_data import InstructionData
from orthotrain.data.tokenizer_state import stored_tokenizer, tokenizer_from_state

__all__ = ["CorruptCacheError", "InstructionData", "TextData", "TokenCache", "stored_tokenizer", "tokenizer_from_state"]
