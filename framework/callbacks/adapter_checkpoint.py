"""Checkpoints of the trained parameters alone, a few megabytes each, from which training resumes."""

import json
import re
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from safetensors.torch import save_file
from torch import Tensor, nn

from orthotrain.callbacks.merge_rotations import merging_of
from orthotrain.callbacks.step_callback import StepCallback
from orthotrain.checkpoints.writing import FROZEN
from orthotrain.console.failures import naming
from orthotrain.errors import ConfigurationError, check_count
from orthotrain.files.atomic_writes import discard, make_temporary_folder, publish, remove_folder, remove_leftovers
from orthotrain.files.torch_files import crc32_of
from orthotrain.layers.protocols import mergeable_layers
from orthotrain.layers.sharding import whole

WEIGHTS_FILE, DESCRIPTION_FILE, RESUME_FILE = "adapter.safetensors", "adapter.json", "resume.ckpt"
FILES = (WEIGHTS_FILE, DESCRIPTION_FILE, RESUME_FILE)
_STEP = re.compile(r"step-\d{6,18}", re.ASCII)
_SAMPLES = 4096


class AdapterCheckpoint(StepCallback, Checkpoint):
    """Save the trained parameters every N optimizer steps and at the end, without the frozen ones.

    Each checkpoint is a folder such as ``step-000500``, which gets its name when it is complete. It holds:

    - ``adapter.safetensors``: the trained parameters by their names in the network
      (:func:`orthotrain.adapters.load_adapter_state` loads them).
    - ``adapter.json``: the step and the run's configuration.
    - ``resume.ckpt``: a Lightning checkpoint with the optimizer and the loops, without the frozen weights. Pass this
      file as ``ckpt_path`` to resume: :func:`restore_frozen` takes the frozen weights from the freshly built network.

    The callback replaces Lightning's default checkpoints; a ``ModelCheckpoint`` in the same run works as usual.

    Args:
        every_n_steps: Optimizer steps between checkpoints, at least 1.
        keep: How many of the newest checkpoints are kept, at least 1.
        dirpath: Folder of the checkpoints; None for ``adapters`` in the run folder.

    Raises:
        ConfigurationError: If a number is below 1; when fitting starts, if nothing is trained, if the frozen weights
            would change, or if checkpoints are written in the background or shard by shard.
    """

    def __init__(self, every_n_steps: int = 500, keep: int = 3, dirpath: str | Path | None = None) -> None:
        check_count("AdapterCheckpoint: every_n_steps", every_n_steps)
        check_count("AdapterCheckpoint: keep", keep)
        self.every_n_steps, self.keep, self.dirpath = every_n_steps, keep, dirpath
        self.last_model_path = self.best_model_path = ""
        self._saved: list[str] = []
        self._fingerprints: dict[str, tuple[str, int]] = {}
        self._tensors: dict[str, Tensor] | None = None  # trained tensors of the checkpoint that is being written

    def folder_of(self, trainer: L.Trainer) -> Path:
        """Return the folder of the checkpoints, as this rank names it."""
        return Path(self.dirpath or Path(trainer.log_dir or ".") / "adapters")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note fingerprints of the frozen weights; refuse a run that such checkpoints could not resume."""
        if merging_of(trainer) is not None:
            raise ConfigurationError(
                "AdapterCheckpoint leaves out the frozen weights, but MergeRotations changes them: use ModelCheckpoint"
            )
        if getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            raise ConfigurationError(
                "AdapterCheckpoint writes one file of the trained parameters: set save_distributed_checkpoint to false"
            )
        if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
            raise ConfigurationError("AdapterCheckpoint needs its files complete at once, not an AsyncCheckpointIO")
        if not any(parameter.requires_grad for parameter in pl_module.parameters()):
            raise ConfigurationError("AdapterCheckpoint found no trained parameter to save")
        frozen = {name: pl_module.state_dict()[name] for name in frozen_names(pl_module)}
        self._fingerprints = {name: (str(tensor.dtype), fingerprint(tensor)) for name, tensor in frozen.items()}

    def on_step_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after every ``every_n_steps`` optimizer steps."""
        if trainer.global_step // self.every_n_steps > self.step_before // self.every_n_steps:
            self._save(trainer, pl_module)

    def save_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str:
        """Save the current step unless it is saved already; :class:`FinalCheckpoint` calls this when a run ends.

        Returns:
            The file to resume from.
        """
        if self._saved[-1:] != [_folder_name(trainer.global_step)]:
            self._save(trainer, pl_module)
        return self.last_model_path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the last step."""
        self.save_step(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take the frozen weights out of this callback's own checkpoints; other checkpoints keep them."""
        if self._tensors is None:
            return
        frozen = self._fingerprints
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k not in frozen}
        checkpoint[FROZEN] = {name: list(values) for name, values in frozen.items()}
        if not checkpoint["state_dict"]:  # a sharded network is gathered on rank 0 alone
            return
        prefix = "model." if isinstance(getattr(pl_module, "model", None), nn.Module) else ""
        for name, _ in pl_module.named_parameters():
            if name not in frozen:
                tensor = checkpoint["state_dict"][name].detach()
                self._tensors[name.removeprefix(prefix)] = tensor.to("cpu", copy=True).contiguous()

    def state_dict(self) -> dict[str, Any]:
        """Save the names of the kept checkpoints, which a resumed run goes on counting."""
        return {"saved": list(self._saved)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the checkpoints that were kept; a name of another form is dropped, with a message."""
        saved = state_dict.get("saved")
        names = saved if isinstance(saved, list) else [saved]
        self._saved = [name for name in names if isinstance(name, str) and _STEP.fullmatch(name)]
        if len(self._saved) < len(names):
            other = next(name for name in names if name not in self._saved)
            rank_zero_info(
                f"ignored: the checkpoint lists {str(other)[:80]!r}, which is no name of an adapter's folder"
            )

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = Path(trainer.strategy.broadcast(self.folder_of(trainer)))
        target = folder / _folder_name(trainer.global_step)
        self._saved = [name for name in self._saved if name != target.name] + [target.name]
        partial: Any = None  # rank 0 makes the folder, and broadcasts its path
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            partial = make_temporary_folder(target)
        try:
            self._write(trainer, pl_module, trainer.strategy.broadcast(partial), target)
        except BaseException:
            if partial is not None:
                discard(partial)
            raise
        self._saved, dropped = self._saved[-self.keep :], self._saved[: -self.keep]
        for name in dropped if trainer.is_global_zero else ():
            with suppress(OSError):
                _remove(folder / name)
        self.last_model_path = str(target / RESUME_FILE)
        trainer.strategy.barrier("AdapterCheckpoint")

    def _write(self, trainer: L.Trainer, pl_module: L.LightningModule, partial: Path, target: Path) -> None:
        """Fill the folder ``partial``, the same one on all ranks, and rename it to ``target``."""
        tensors = self._tensors = {}
        try:
            with naming(target):
                trainer.save_checkpoint(partial / RESUME_FILE)
                if not trainer.is_global_zero:
                    return
                save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
                description = {
                    "step": trainer.global_step,
                    "epoch": trainer.current_epoch,
                    "parameters": sum(tensor.numel() for tensor in tensors.values()),
                    "config": dict(pl_module.hparams),
                    "crc32": {WEIGHTS_FILE: crc32_of(partial / WEIGHTS_FILE)},
                }
                text = json.dumps(description, indent=1, default=str)
                (partial / DESCRIPTION_FILE).write_text(text, encoding="utf-8")
                publish(partial, target)
        finally:
            self._tensors = None


def restore_frozen(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Complete a checkpoint of :class:`AdapterCheckpoint` in place with the frozen tensors of a freshly built module.

    Any other checkpoint is left as it is. The frozen tensors must be those that the adapter was trained on: their
    shapes and a sample of their values are compared, in the dtype that they had in that run.

    Args:
        checkpoint: A Lightning checkpoint, full or written by :class:`AdapterCheckpoint`.
        module: The module that the checkpoint will be loaded into.

    Raises:
        ConfigurationError: If a frozen tensor is missing in the module, or has other values.
    """
    frozen = checkpoint.get(FROZEN)
    if frozen is None:
        return
    own = module.state_dict()
    if missing := [name for name in frozen if name not in own]:
        raise ConfigurationError(f"the adapter checkpoint is of another model: this model has no {missing[0]}")
    for name, (dtype, expected) in frozen.items():
        if fingerprint(own[name], getattr(torch, dtype.removeprefix("torch."))) != expected:
            raise ConfigurationError(
                f"the frozen {name} is not the one that the adapter checkpoint was trained on: build the network from "
                "the same pretrained weights (and the same seed for the others), or resume a full checkpoint"
            )
        checkpoint["state_dict"][name] = own[name]


def frozen_names(module: nn.Module) -> list[str]:
    """Return the names of the entries of a module's state dict that training does not change.

    These are the parameters without gradient and the buffers of mergeable layers, which hold quantized weights. Other
    buffers may change (running statistics, metrics) and count as trained, as do all generators.
    """
    rotations = {id(p) for _, layer in mergeable_layers(module) for p in layer.rotation_parameters()}
    inside = tuple(f"{name}." for name, _ in mergeable_layers(module))
    parameters = dict(module.named_parameters(remove_duplicate=False))
    trained = {name for name, p in parameters.items() if p.requires_grad or id(p) in rotations}
    return [
        name for name in module.state_dict() if name not in trained and (name in parameters or name.startswith(inside))
    ]


def fingerprint(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """Return a CRC-32 of the shape and of some thousand evenly spaced values, cast to ``dtype`` first.

    If the tensor is sharded, all ranks must call this.
    """
    tensor = whole(tensor)
    flat = tensor.detach().flatten()
    sample = flat[:: max(1, flat.numel() // _SAMPLES)].to("cpu", dtype or tensor.dtype).contiguous()
    return zlib.crc32(sample.view(torch.uint8).numpy().tobytes(), zlib.crc32(str(tuple(tensor.shape)).encode()))


def _remove(folder: Path) -> None:
    """Remove the folder of an adapter; leave a link, and a folder with files that this callback does not write."""
    if folder.is_symlink() or not {path.name for path in folder.iterdir()} <= set(FILES):
        rank_zero_warn(f"{str(folder)!r} is no adapter that this callback wrote, and is not removed")
    else:
        remove_folder(folder)


def _folder_name(step: int) -> str:
    return f"step-{step:06d}"
