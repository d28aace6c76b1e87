"""Tokenized rows of instruction data in memory."""

import hashlib
from array import array
from typing import ClassVar, Literal

import numpy as np

from orthotrain.data.instructions.examples import EncodedExample

IGNORED = -100
"""The label of a token that does not count in the loss."""


class TokenRows:
    """Rows of tokens in flat arrays, with about 5 bytes for a token.

    Attributes:
        prompt_padding: The side on which prompts are padded before they are answered.
    """

    # generation continues at the end of the prompt
    prompt_padding: ClassVar[Literal["left", "right"]] = "left"

    def __init__(self) -> None:
        self._tokens, self._targets = array("i"), array("b")
        self._starts, self._prompt_lengths = array("q", [0]), array("i")
        self.references: list[str] = []
        """The last response of each row."""

    def append(self, row: EncodedExample, reference: str) -> None:
        """Add a row."""
        self._tokens.extend(row.tokens)
        self._targets.extend(row.targets)
        self._starts.append(len(self._tokens))
        self._prompt_lengths.append(row.prompt_length)
        self.references.append(reference)

    def digest(self) -> str:
        """Return the blake2b of the tokens and of the flags of predicted tokens, in the order of the rows."""
        content = hashlib.blake2b(digest_size=32)
        for part in (self._starts, self._tokens, self._targets):
            content.update(memoryview(part).cast("B"))
        return content.hexdigest()

    def __len__(self) -> int:
        return len(self.references)

    @property
    def lengths(self) -> np.ndarray:
        """Number of inputs of each row, int64: the number of its tokens minus one."""
        return np.diff(np.frombuffer(self._starts, np.int64)) - 1

    @property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens before the last response of each row; 0 if truncation cut the prompt."""
        return np.array(self._prompt_lengths)

    def tokens(self, row: int) -> np.ndarray:
        """Return all tokens of a row, int64."""
        return np.array(self._tokens[self._starts[row] : self._starts[row + 1]], np.int64)

    def inputs_and_labels(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's inputs and labels, int64 of shape ``(length,)``.

        ``labels[t]`` is the token after ``inputs[t]``, or -100 if this token does not belong to a response.
        """
        tokens = self.tokens(row)
        targets = np.array(self._targets[self._starts[row] : self._starts[row + 1]], bool)
        labels = np.where(targets, tokens, IGNORED)
        return tokens[:-1], labels[1:]

    def prompt(self, row: int) -> list[int]:
        """Return the tokens before the last response; no tokens if truncation cut the prompt."""
        start = self._starts[row]
        return self._tokens[start : start + self._prompt_lengths[row]].tolist()
