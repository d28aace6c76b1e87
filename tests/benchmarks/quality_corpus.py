"""The text of tests/benchmarks/quality.py: Python sources of installed packages, split by groups of similar files.

Files that are nearly the same (copies, generated variants) form a group, and a group lies in one split. Each text comes
once.
"""

import hashlib
import importlib.metadata
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from orthotrain.data.near_duplicates import groups

PACKAGES = ("transformers", "torch", "sympy", "scipy", "scikit-learn", "numpy", "networkx", "peft", "torchmetrics",
            "lightning", "datasets", "accelerate", "matplotlib", "huggingface-hub", "mpmath", "triton")  # fmt: skip
SHARES = {"val": 0.007, "test": 0.007}
SIZES = (500, 200_000)
"""Smallest and largest file, in bytes: larger ones are tables and generated code."""


def versions() -> dict[str, str]:
    """Return the versions of the packages."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def sources() -> Iterator[tuple[str, str]]:
    """Yield name and text of the Python files of the packages, in the order of their names."""
    root = Path(sysconfig.get_paths()["purelib"])
    for package in PACKAGES:
        listed = {file for file in importlib.metadata.files(package) or () if file.suffix == ".py"}
        for file in sorted(listed, key=str):
            path = root / file
            if path.is_file() and SIZES[0] <= path.stat().st_size <= SIZES[1]:
                yield str(file), path.read_text(encoding="utf-8", errors="replace")


def write(folder: Path) -> dict[str, str]:
    """Write train.jsonl, val.jsonl and test.jsonl, unless they are there; return the digest of each."""
    paths = {split: folder / f"{split}.jsonl" for split in ("train", "val", "test")}
    if not all(path.exists() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        names, texts = zip(*sources(), strict=True)
        first: dict[int, str] = {}
        lines: dict[str, dict[str, None]] = {split: {} for split in paths}
        for name, text, group in zip(names, texts, groups(texts), strict=True):
            chosen = split_of(first.setdefault(group, name))
            lines[chosen][json.dumps({"text": text})] = None
        for split, path in paths.items():
            path.write_text("\n".join(lines[split]) + "\n", encoding="utf-8")
    return {split: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for split, path in paths.items()}


def split_of(name: str) -> str:
    """Return the split of a group whose first file has this name."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") / 2**64
    bound = 0.0
    for split, share in SHARES.items():
        bound += share
        if place < bound:
            return split
    return "train"
