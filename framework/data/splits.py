"""The splits of a data set, and which of them a document, a row or a part of a text belongs to."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from orthotrain.console.termination import check

SPLITS = ("train", "val", "test")
ALWAYS_TRAIN = ""
"""The key of documents that no split holds out."""


@dataclass(frozen=True)
class Splitter:
    """Assigns whole documents and rows to splits.

    Attributes:
        seed: Another seed gives another split.
        val_fraction: Share of the documents for validation.
        test_fraction: Share of the documents for the test.

    Example:
        >>> Splitter(seed=0, val_fraction=0.3, test_fraction=0.3)("dir/3.py")
        'val'
    """

    seed: int
    val_fraction: float
    test_fraction: float = 0.0

    def __call__(self, key: str) -> str:
        """Return ``train``, ``val`` or ``test``: a hash of the seed and the key decides, on every machine alike.

        Args:
            key: The name or the content of the document or the row, or the key of its group of near-duplicates.
        """
        if key == ALWAYS_TRAIN:
            return "train"
        digest = hashlib.sha256(f"split\0{self.seed}\0{key}".encode()).digest()
        fraction = int.from_bytes(digest[:8], "little") / 2**64
        if fraction < self.val_fraction:
            return "val"
        return "test" if fraction < self.val_fraction + self.test_fraction else "train"

    def split(self, documents: Iterable[Any]) -> Iterator[tuple[str, Any]]:
        """Yield each document behind its split."""
        for document in documents:
            yield self(document.key), document


@dataclass(frozen=True)
class PositionSplitter:
    """Cuts a text of few documents into contiguous parts: train, validation and test, in this order.

    A part ends at the end of a line, if a line ends in its last tenth (at most `LINE` characters). Each part of a
    document is a document of its own, so that no text belongs to two splits.

    Attributes:
        ends: Characters of all documents before the end of each part.
        rest: Split of the text behind the parts; ``None`` leaves this text out.
    """

    LINE = 1000

    ends: tuple[int, int, int]
    rest: str | None = None

    def split(self, documents: Iterable[Any]) -> Iterator[tuple[str, Any]]:
        """Yield each document, or each part of it, behind its split."""
        part = position = 0
        begun = False  # whether the part holds the beginning of a document, whose end has not come
        for document in documents:
            text = document.text
            while part < len(SPLITS) and position + len(text) > self.ends[part]:
                size = self.ends[part] - (self.ends[part - 1] if part else 0)
                room = self.ends[part] - position if size else 0
                cut = text.rfind("\n", max(0, room - min(self.LINE, size // 10)), room) + 1 or room if room else 0
                if cut or begun:
                    yield SPLITS[part], replace(document, text=text[:cut], complete=True)
                text, position, part, begun = text[cut:], position + cut, part + 1, False
            if (split := (*SPLITS, self.rest)[part]) is None:
                return
            yield split, replace(document, text=text)
            position, begun = position + len(text), not document.complete


def fitting_splitter(
    documents: Iterable[Any], splitter: Splitter, limit_bytes: int | None = None, rest: str | None = None
) -> Splitter | PositionSplitter:
    """Return a splitter that leaves no split without text: by position, if a split by document would.

    Args:
        documents: The documents. They are read until each split has one.
        splitter: The splitter by document. A split whose fraction is 0 needs no text.
        limit_bytes: How much of the text to divide; ``None`` divides all.
        rest: See `PositionSplitter`.
    """
    shares = {"val": splitter.val_fraction, "test": splitter.test_fraction}
    missing = {"train", *(split for split, share in shares.items() if share)}
    characters = read = 0
    for document in documents:
        check()
        missing.discard(splitter(document.key))
        if not missing:
            return splitter
        characters += len(document.text)
        read += len(document.text.encode())
        if limit_bytes is not None and read >= limit_bytes:  # no other document begins before the limit
            characters = characters * limit_bytes // read
            break
    val, test = (round(characters * share) for share in shares.values())
    return PositionSplitter((characters - val - test, characters - test, characters), rest)
