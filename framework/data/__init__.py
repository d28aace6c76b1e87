"""Data modules: text, instructions and labels, tokenized once, in an order of all ranks that resumes mid-epoch."""

from orthotrain.data.corpus.text_data import TextData
from orthotrain.data.corpus.token_cache import CorruptCacheError, TokenCache
from orthotrain.data.instructions.instruction_data import InstructionData
from orthotrain.data.labels.labeled_data import LabeledData
from orthotrain.data.tokenizer_state import stored_tokenizer, tokenizer_from_state

__all__ = [
    "CorruptCacheError",
    "InstructionData",
    "LabeledData",
    "TextData",
    "TokenCache",
    "stored_tokenizer",
    "tokenizer_from_state",
]
