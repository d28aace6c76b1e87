"""Writing checkpoints so that a file of that name is always a whole one, and reading them without running code."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from orthotrain.errors import ConfigurationError

PARTIAL_SUFFIX, OLD_SUFFIX = ".partial", ".old"

FROZEN = "frozen_fingerprints"
"""The entry of a checkpoint that leaves out what is frozen."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the final place, flushes to the disk and renames; reads plain values and tensors only.

    A run that dies at any moment leaves the older file of that name, or none; what it was writing is removed at the
    next save. Paths with a protocol (``s3://``) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            ConfigurationError: If it cannot be written, naming why (a full disk); older checkpoints are intact.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            write_atomically(Path(path), lambda file: torch.save(checkpoint, file))
        except (OSError, RuntimeError) as error:
            raise ConfigurationError(
                f"checkpoint {str(path)!r} cannot be written ({reason_of(error)}); the older ones are intact: make "
                "room and go on with --ckpt_path last"
            ) from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Raises:
            ConfigurationError: If code in the file is to be run, or it is the folder of a distributed checkpoint.
        """
        if weights_only is False:
            raise ConfigurationError(f"weights_only=False would run code from {str(path)!r}: leave it out")
        if Path(path).is_dir():
            raise needs_consolidating(path)
        return super().load_checkpoint(path, map_location, weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint, the folder of a distributed one at once."""
        if Path(path).is_dir() and not Path(path).is_symlink():
            remove_folder(Path(path))
        else:
            super().remove_checkpoint(path)


def partial_of(path: Path) -> Path:
    """Return where a file or a folder lies while it is written or removed."""
    return path.with_name(f".{path.name}{PARTIAL_SUFFIX}")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a file that takes its name only when it is whole and on the disk.

    Args:
        path: The final place; folders are made.
        write: Gets the open file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if path.is_dir():  # a distributed checkpoint of that name, which a rename cannot replace
            publish(partial, path)
        else:
            os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def needs_consolidating(path: str | Path) -> ConfigurationError:
    """Return the error of who needs a file and is given the folder of a distributed checkpoint."""
    return ConfigurationError(
        f"checkpoint {str(path)!r} is a folder, as FSDP2 writes it with save_distributed_checkpoint: resume it with "
        f"trainer/fsdp2.yaml, or make it a file by orthotrain consolidate {path} FILE.ckpt"
    )


def publish(partial: Path, target: Path) -> None:
    """Give a finished folder, or file, its name once all of it is on the disk; an older one of that name goes.

    A run that dies between the two renames leaves the older one under another name: :func:`remove_leftovers` gives it
    its own back.
    """
    for path in [*(partial.iterdir() if partial.is_dir() else ()), partial]:
        _sync(path)
    old = target.with_name(f".{target.name}{OLD_SUFFIX}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(partial, target)
    _sync(target.parent)
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder that has lost its name before its first file: none that lacks some looks like a checkpoint."""
    nameless = partial_of(folder)
    shutil.rmtree(nameless, ignore_errors=True)
    os.replace(folder, nameless)
    shutil.rmtree(nameless, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed run was writing, or had not yet removed; only one run may write to a folder."""
    for old in folder.glob(f".*{OLD_SUFFIX}"):
        target = old.with_name(old.name[1 : -len(OLD_SUFFIX)])
        with suppress(OSError):  # another rank has been faster
            if not target.exists():
                os.replace(old, target)
    for leftover in [*folder.glob(f".*{PARTIAL_SUFFIX}"), *folder.glob(f".*{OLD_SUFFIX}")]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def reason_of(error: BaseException) -> str:
    """Return the operating system's word for what went wrong, wherever in the chain of causes it stands."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.strerror:
            return chain.strerror
        chain = chain.__cause__ or chain.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
