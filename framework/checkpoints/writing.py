"""Lightning's plugin that writes and reads checkpoint files.

A file appears under its name only when it is complete and can be read again. Reading runs no code from the file.
"""

import os
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from orthotrain.checkpoints.restore_checks import check_layout
from orthotrain.checkpoints.stored_paths import is_own_checkpoint
from orthotrain.errors import ConfigurationError
from orthotrain.files.archive_contents import dotted
from orthotrain.files.atomic_writes import remove_folder, remove_leftovers, write_atomically
from orthotrain.files.torch_files import check_readable, read_file

FROZEN = "frozen_fingerprints"
"""Entry of a checkpoint without the frozen weights: their fingerprints."""

_MOST_DEPTH = 95
"""Levels of nested values. The reader accepts a few more."""

_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, Counter, torch.Size)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file and renames the file; reads plain values and tensors only.

    If a run dies while it writes, the older file of that name is still there, and the next save removes the temporary
    file. Lightning itself writes and reads paths with a protocol (``s3://``).

    Args:
        folders: Returns the checkpoint folders of the run. A checkpoint outside of them is removed only if this object
            has saved it.
    """

    def __init__(self, folders: Callable[[], Iterable[str | Path]] | None = None) -> None:
        super().__init__()
        self.folders = folders
        self._own: set[Path] = set()  # a Tuner of Lightning saves a file outside of the folders, and removes it later

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            ConfigurationError: The checkpoint cannot be written, for example on a full disk or because of an object in
                it. Older checkpoints are intact.
        """
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        self._own.add(Path(path))
        plain = plain_copy(checkpoint)

        def write(file: IO[bytes]) -> None:
            torch.save(plain, file)
            file.flush()
            check_readable(file, path)

        try:
            if self.folders is not None:  # no other run writes to this folder: remove the files of killed runs
                remove_leftovers(Path(path).parent)
            write_atomically(Path(path), write)
        except ConfigurationError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            raise unwritable(path, reason_of(error)) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint file onto the CPU, and compare every byte with its checksum.

        Raises:
            ConfigurationError: The file is damaged or malformed, the path is the folder of a distributed checkpoint, or
                ``weights_only`` is False.
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
        """Remove a checkpoint of this run, a file or a folder. For any other path, only a warning is printed."""
        folders = () if self.folders is None else self.folders()
        if Path(path) not in self._own and not any(is_own_checkpoint(path, folder) for folder in folders):
            rank_zero_warn(f"{str(path)!r} is not a checkpoint in the folder of this run, and is not removed")
        elif "://" in str(path):
            super().remove_checkpoint(path)
        elif Path(path).is_dir() and not Path(path).is_symlink():
            remove_folder(Path(path))
        else:
            Path(path).unlink(missing_ok=True)


def needs_consolidating(path: str | Path) -> ConfigurationError:
    """Return the error for the folder of a distributed checkpoint where a checkpoint file is needed."""
    return ConfigurationError(
        f"checkpoint {str(path)!r} is a folder, as FSDP2 writes it with save_distributed_checkpoint: resume it with "
        f"trainer/fsdp2.yaml, or convert it to a file with orthotrain consolidate {path} FILE.ckpt"
    )


def unwritable(path: str | Path, reason: str) -> ConfigurationError:
    """Return the error for a checkpoint that cannot be written."""
    return ConfigurationError(
        f"checkpoint {str(path)!r} cannot be written ({reason}); the older ones are intact: make room and go on with "
        "--ckpt_path last"
    )


def reason_of(error: BaseException) -> str:
    """Return the message of the operating system for an error or for one of its causes; else the error's first line."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.strerror:
            return chain.strerror
        chain = chain.__cause__ or chain.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def plain_copy(checkpoint: Any) -> Any:
    """Return a checkpoint with the types that can be read again; the values in the file will be equal to the result.

    A tensor that repeats values of its storage (``expand``) is copied. Paths become strings. Numbers and dictionaries
    of other classes (NumPy's, Lightning's) become those of Python.

    Args:
        checkpoint: Nested plain values and tensors.

    Raises:
        ConfigurationError: The checkpoint has an object, a key that is neither a string nor an integer, a tensor of a
            kind that cannot be read, or a value that contains itself.
    """
    return _PlainCopy().value(checkpoint, ())


class _PlainCopy:
    """Copies nested values. A value at several positions is copied once, because the file stores it once."""

    def __init__(self) -> None:
        self.made: dict[int, Any] = {}

    def value(self, value: Any, keys: tuple[Any, ...]) -> Any:
        if type(value) in _PLAIN:
            return value
        if len(keys) > _MOST_DEPTH:
            raise _refused("nested too deeply, or contains itself", keys[:4])
        if id(value) not in self.made:
            self.made[id(value)] = self._make(value, keys)
        return self.made[id(value)]

    def _make(self, value: Any, keys: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            return _plain_tensor(value, keys)
        if isinstance(value, dict):
            return self._dictionary(value, keys)
        if type(value) in (list, tuple):
            return type(value)(self.value(inner, (*keys, number)) for number, inner in enumerate(value))
        if type(value) is set and all(type(inner) in (str, int, bool) for inner in value):
            return value
        if isinstance(value, np.generic):
            return self.value(value.item(), keys)
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        for plain, convert in ((int, int), (float, float), (str, str.__str__)):
            if isinstance(value, plain):
                return convert(value)
        raise _refused(f"a {type(value).__name__}", keys)

    def _dictionary(self, value: dict, keys: tuple[Any, ...]) -> dict:
        for key in value:
            if type(key) not in (str, int):
                raise _refused(f"a dictionary with the key {key!r}, which is neither a string nor an integer", keys)
        made: Any = OrderedDict() if isinstance(value, OrderedDict) else {}
        made.update((key, self.value(inner, (*keys, key))) for key, inner in value.items())
        if hasattr(value, "_metadata"):  # the versions of modules in a state dict
            made._metadata = value._metadata
        return made


def _plain_tensor(value: Tensor, keys: tuple[Any, ...]) -> Tensor:
    has_own_pickle = type(value).__reduce_ex__ is not Tensor.__reduce_ex__
    if type(value) not in (Tensor, nn.Parameter) and not has_own_pickle:
        raise _refused(f"a tensor of the class {type(value).__name__}", keys)
    if value.layout != torch.strided or value.is_quantized or value.is_meta or value.is_nested:
        raise _refused(f"a tensor that is sparse, quantized, nested or without values ({value.layout})", keys)
    if value.is_conj() or value.is_neg():
        value = value.resolve_conj().resolve_neg()
    repeats = any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True))
    return value.contiguous() if repeats else value


def _refused(kind: str, keys: tuple[Any, ...]) -> ConfigurationError:
    return ConfigurationError(
        f"{dotted(keys, 'the checkpoint')} is {kind}, which cannot be read again from a checkpoint: store plain values "
        "(numbers, strings, lists, dictionaries) and tensors"
    )
