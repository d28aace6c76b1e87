"""Writing checkpoints so that a file of that name is always a whole one, and reading them without running code."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from orthotrain.checkpoints.layout_checks import check_layout
from orthotrain.checkpoints.storable import storable
from orthotrain.checkpoints.stored_paths import is_own_checkpoint
from orthotrain.errors import ConfigurationError
from orthotrain.files.plain_files import check_readable, read_file
from orthotrain.files.temporary import remove_folder, remove_leftovers, write_atomically

FROZEN = "frozen_fingerprints"
"""The entry of a checkpoint that leaves out what is frozen."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the final place, flushes to the disk and renames; reads plain values and tensors only.

    A run that dies at any moment leaves the older file of that name, or none; what it was writing is removed at the
    next save. Paths with a protocol (``s3://``) are left to Lightning.

    Args:
        folders: Returns the folders of the run's checkpoints, outside of which none is removed; None for those that
            this object has written to.
    """

    def __init__(self, folders: Callable[[], Iterable[str | Path]] | None = None) -> None:
        super().__init__()
        self.folders = folders
        self._written: set[Path] = set()
        self._own: set[Path] = set()  # a search of Lightning's Tuner saves elsewhere, and removes the file at its end

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            ConfigurationError: If it cannot be written, naming why (a full disk, an object in it); older checkpoints
                are intact.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        self._written.add(Path(path).parent)
        self._own.add(Path(path))
        plain = storable(checkpoint)

        def write(file: IO[bytes]) -> None:
            torch.save(plain, file)
            file.flush()
            check_readable(file, path)

        self._write(path, write)

    def _write(self, path: str | Path, write: Callable[[IO[bytes]], None]) -> None:
        try:
            if self.folders is not None:  # a run has its folder for itself, and may remove what a killed one has left
                remove_leftovers(Path(path).parent)
            write_atomically(Path(path), write)
        except ConfigurationError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
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
        """Read a checkpoint onto the CPU, compared with its checksums.

        Raises:
            ConfigurationError: If code in the file is to be run, it is damaged or malformed, or it is the folder of a
                distributed checkpoint.
        """
        if weights_only is False:
            raise ConfigurationError(f"weights_only=False would run code from {str(path)!r}: leave it out")
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        if Path(path).is_dir():
            raise needs_consolidating(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"Checkpoint file not found: {path}")
        checkpoint = read_file(Path(path))
        check_layout(checkpoint, str(path))
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a checkpoint of this run, the folder of a distributed one at once; anything else is left and named."""
        folders = self._written if self.folders is None else self.folders()
        if Path(path) not in self._own and not any(is_own_checkpoint(path, folder) for folder in folders):
            rank_zero_warn(f"{str(path)!r} is no checkpoint in the folder of this run, and is not removed")
        elif "://" in str(path):
            super().remove_checkpoint(path)
        elif Path(path).is_dir() and not Path(path).is_symlink():
            remove_folder(Path(path))
        else:
            Path(path).unlink(missing_ok=True)


def needs_consolidating(path: str | Path) -> ConfigurationError:
    """Return the error of who needs a file and is given the folder of a distributed checkpoint."""
    return ConfigurationError(
        f"checkpoint {str(path)!r} is a folder, as FSDP2 writes it with save_distributed_checkpoint: resume it with "
        f"trainer/fsdp2.yaml, or make it a file by orthotrain consolidate {path} FILE.ckpt"
    )


def reason_of(error: BaseException) -> str:
    """Return the operating system's word for what went wrong, wherever in the chain of causes it stands."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.strerror:
            return chain.strerror
        chain = chain.__cause__ or chain.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0]
