"""The splits of a data set, and which of them a document or a row belongs to."""

import hashlib
from dataclasses import dataclass

SPLITS = ("train", "val", "test")


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
            key: The name or the content of the document or the row.
        """
        digest = hashlib.sha256(f"split\0{self.seed}\0{key}".encode()).digest()
        fraction = int.from_bytes(digest[:8], "little") / 2**64
        if fraction < self.val_fraction:
            return "val"
        return "test" if fraction < self.val_fraction + self.test_fraction else "train"
