"""Tokens and labels of rows in memory, and the batches that are made of them."""

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from orthotrain.data.instructions.token_rows import IGNORED
from orthotrain.data.labels.rows import LabelTask
from orthotrain.data.loaders import BatchDataset
from orthotrain.data.sampling import LengthGroupedSampler


class LabeledRows:
    """Rows of one split in flat arrays. Classes are numbered as they come; ``names`` gives their names.

    Attributes:
        first: Name of a class -> place of the first row with this class.
    """

    def __init__(self) -> None:
        self._tokens, self._types, self._starts = array("i"), array("b"), array("q", [0])
        self._labels, self._label_starts = array("d"), array("q", [0])
        self.first: dict[str, str] = {}
        self._numbers: dict[str, int] = {}

    def append(self, tokens: list[int], types: list[int], labels: Sequence[str | float | None], where: str) -> None:
        """Add a row: its labels are names of classes or numbers, None for a token that has no label."""
        self._tokens.extend(tokens)
        self._types.extend(types)
        self._starts.append(len(self._tokens))
        self._labels.extend(self._number(label, where) for label in labels)
        self._label_starts.append(len(self._labels))

    def _number(self, label: str | float | None, where: str) -> float:
        if label is None:
            return IGNORED
        if not isinstance(label, str):
            return label
        self.first.setdefault(label, where)
        return self._numbers.setdefault(label, len(self._numbers))

    @property
    def names(self) -> list[str]:
        """Names of the classes, in the order of their numbers."""
        return list(self._numbers)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64."""
        return np.diff(np.frombuffer(self._starts, np.int64))

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens and token types of a row, int64 of shape ``(length,)``, and its labels, fp64."""
        part = slice(self._starts[number], self._starts[number + 1])
        own = slice(self._label_starts[number], self._label_starts[number + 1])
        return (
            np.array(self._tokens[part], np.int64),
            np.array(self._types[part], np.int64),
            np.array(self._labels[own]),
        )

    def digest(self) -> str:
        """Return the blake2b of tokens, labels and names, in the order of the rows."""
        content = hashlib.blake2b("\0".join(self.names).encode(), digest_size=32)
        for part in (self._starts, self._tokens, self._types, self._label_starts, self._labels):
            content.update(memoryview(part).cast("B"))
        return content.hexdigest()


class LabeledBatches(BatchDataset):
    """Batches of rows, padded on the right to the longest row.

    A batch is ``input_ids`` and ``attention_mask``, int64 of shape ``(B, T)``, and ``labels``: classes, int64 of shape
    ``(B,)``; classes of tokens, int64 of shape ``(B, T)`` with -100 where a token has no label; or numbers, fp32 of
    shape ``(B,)``. Where a second text has another token type, ``token_type_ids`` is there too.

    Args:
        rows: The rows.
        task: What the labels are.
        names: Names of all classes, in the order of the network's outputs.
        pad_token: The token that fills the end of a row.
        order: The row of each index.
    """

    def __init__(
        self, rows: LabeledRows, task: LabelTask, names: list[str], pad_token: int, order: np.ndarray | None = None
    ) -> None:
        self.rows, self.task, self.pad_token = rows, task, pad_token
        self.order = np.arange(len(rows)) if order is None else order
        self.classes = np.array([names.index(name) for name in rows.names], np.int64)
        """The network's output for each number of a class."""

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int | list[int]) -> dict[str, torch.Tensor]:
        """Return the batch of these rows; a batch of one row for a single index."""
        tokens, types, labels = zip(*(self.rows.row(n) for n in self.order[np.atleast_1d(index)].tolist()), strict=True)
        batch = {
            "input_ids": _padded(tokens, self.pad_token),
            "attention_mask": _padded([np.ones_like(row) for row in tokens], 0),
            "labels": self._labels(labels),
        }
        if any(row.any() for row in types):
            batch["token_type_ids"] = _padded(types, 0)
        return batch

    def _labels(self, labels: Sequence[np.ndarray]) -> torch.Tensor:
        if self.task == "regression":
            return torch.from_numpy(np.concatenate(labels)).float()
        numbers = [row.astype(np.int64) for row in labels]
        classes = [np.where(row == IGNORED, IGNORED, self.classes[row.clip(min=0)]) for row in numbers]
        return _padded(classes, IGNORED) if self.task == "token_classification" else torch.cat(_tensors(classes))

    def train_sampler(self, *arguments: int) -> LengthGroupedSampler:
        """Return the sampler of batches of similar length."""
        return LengthGroupedSampler(self.rows.lengths[self.order], *arguments)


def _tensors(rows: Sequence[np.ndarray]) -> list[torch.Tensor]:
    return [torch.from_numpy(row) for row in rows]


def _padded(rows: Sequence[np.ndarray], value: int) -> torch.Tensor:
    return pad_sequence(_tensors(rows), batch_first=True, padding_value=value)
