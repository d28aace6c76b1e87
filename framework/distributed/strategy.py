"""Lightning's strategy for FSDP2, with checkpoints that a run with any other strategy can resume."""

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from orthotrain.checkpoints.reading import check_finite, read_checkpoint
from orthotrain.checkpoints.restore_checks import check_layout, check_optimizer
from orthotrain.checkpoints.shards import REST, check_shards, load_shards, save_shards
from orthotrain.distributed.agreement import on_any_rank
from orthotrain.distributed.optimizer_8bit import step_locally
from orthotrain.distributed.optimizer_state import (
    empty_tensors,
    joined_state,
    like_parameter,
    optimizer_key,
    sharded_state,
    split_state,
    whole_state,
)
from orthotrain.errors import ConfigurationError


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices: each rank holds a part of the parameters, gradients and optimizer state.

    A checkpoint is the file that a single device would write. ``ModelParallelStrategy`` alone would number the
    optimizer's state by the order of the network's parameters, and not by the order of the parameter groups as every
    optimizer does, so that another strategy would restore momenta to the wrong parameters. It would also need state for
    every parameter, although a merge has just dropped the state of the generators.

    Args:
        save_distributed_checkpoint: Whether each rank writes its own shard into a folder, instead of one file for all.
            Such a checkpoint resumes on the same number of ranks; ``orthotrain consolidate FOLDER FILE`` makes it one
            file.
        process_group_backend: Backend of the collectives; None for the default of the device.
        timeout: How long a collective waits for a rank that does not answer, in YAML as HH:MM:SS.
    """

    def __init__(
        self,
        save_distributed_checkpoint: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint, process_group_backend, timeout)
        self._loaded_distributed = False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether the optimizer's state is loaded after the checkpoint has been read."""
        return not self._loaded_distributed

    def setup_environment(self) -> None:
        """Shard over all ranks."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        """Build the optimizers, and let optimizers of bitsandbytes step the shards.

        Raises:
            ConfigurationError: If the 8-bit blocks of bitsandbytes would have to be written shard by shard.
        """
        super().setup_optimizers(trainer)
        if any([step_locally(optimizer) for optimizer in self.optimizers]) and self._save_distributed_checkpoint:
            raise ConfigurationError(
                "save_distributed_checkpoint: true with an optimizer of bitsandbytes, whose blocks of 8 bits lie "
                "across shards: set it to false"
            )

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state of an optimizer: whole on rank 0, or this rank's part for a distributed checkpoint."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        if self._save_distributed_checkpoint:
            return optimizer.state_dict()
        state = whole_state(optimizer)
        return state if self.is_global_zero else {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike, storage_options: Any = None
    ) -> None:
        """Write one file, or the folder of a distributed checkpoint.

        Raises:
            ConfigurationError: If the checkpoint cannot be written, with the reason.
        """
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            # not super(): Lightning removes a folder of this name, on every rank, before it begins to write
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, path, storage_options)
            return
        shards = {"state_dict": checkpoint.pop("state_dict")}
        states = [split_state(state) for state in checkpoint.pop("optimizer_states", [])]
        shards |= {optimizer_key(number): tensors for number, (tensors, _) in enumerate(states)}
        rest = {**checkpoint, "optimizer_states": [rest for _, rest in states]}
        save_shards(shards, rest, path, lambda failed: on_any_rank(failed, self.root_device))

    def load_checkpoint(self, checkpoint_path: str | os.PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint without running code from it; load the shards of a distributed checkpoint at once.

        Raises:
            ConfigurationError: If the checkpoint is damaged, or holds more than tensors and plain values.
        """
        path = Path(self.broadcast(checkpoint_path))
        self._loaded_distributed = path.is_dir()
        if self._loaded_distributed:
            return self._load_shards(path)
        checkpoint = read_checkpoint(path)
        check_layout(checkpoint, str(path))
        return checkpoint

    def _load_shards(self, path: Path) -> dict[str, Any]:
        assert self.model is not None and self.lightning_module is not None
        metadata, rest = check_shards(path), read_checkpoint(path / REST)
        check_layout(rest, str(path))
        states = rest.get("optimizer_states", [])
        if self.optimizers and len(states) != len(self.optimizers):
            raise ConfigurationError(
                f"checkpoint {str(path)!r} has the state of {len(states)} optimizers and this run has "
                f"{len(self.optimizers)}"
            )
        shards: dict[str, Any] = {"state_dict": get_model_state_dict(self.model)}
        shards |= {optimizer_key(n): empty_tensors(metadata, n, o) for n, o in enumerate(self.optimizers)}
        load_shards(shards, path)
        self.model.load_state_dict(shards["state_dict"], strict=self.lightning_module.strict_loading)
        for number, optimizer in enumerate(self.optimizers):
            joined = joined_state(shards[optimizer_key(number)], states[number])
            check_optimizer(joined, optimizer, number, str(path))
            optimizer.load_state_dict(joined)
        self._check_finite(path)
        return rest

    def _check_finite(self, path: Path) -> None:
        """Refuse a checkpoint, on every rank, if the part of any rank holds values that are not finite."""
        assert self.model is not None
        error = None
        try:
            parameters = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
            parts = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in parameters.items()}
            check_finite(parts, parts, f"checkpoint {str(path)!r}")
        except ConfigurationError as found:
            error = found
        if on_any_rank(error is not None, self.root_device):
            raise error or ConfigurationError(f"checkpoint {str(path)!r} holds values that are not finite")

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's part of the network."""
        if not self._loaded_distributed:
            assert self.model is not None
            own = self.model.state_dict(keep_vars=True)
            parts = {n: like_parameter(t, own[n]) if n in own else t for n, t in checkpoint["state_dict"].items()}
            self.model.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's part of the optimizers' state."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(sharded_state(saved, optimizer))
