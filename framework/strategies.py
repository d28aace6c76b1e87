"""Lightning's strategy for FSDP2, with checkpoints that every other strategy resumes."""

import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from orthotrain.checkpoint import check_checkpoint, read_checkpoint
from orthotrain.layers.sharding import whole


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices: parameters, gradients and optimizer state are shared out.

    ``ModelParallelStrategy`` numbers the optimizer's state in its files by the order of the network's parameters and
    not, as every optimizer does, by that of the parameter groups: a file of one strategy would be read as the momenta
    of other parameters by the other. It also wants state for every parameter, where a merge has just dropped the
    generators'. Here a checkpoint is the file that a single device would write.

    Args:
        save_distributed_checkpoint: Whether each rank writes its own shard, into a folder, instead of one file. Such a
            checkpoint resumes on as many ranks, or is made one file by
            ``python -m orthotrain.consolidate FOLDER FILE``.
        process_group_backend: None for that of the device.
        timeout: How long a collective waits for a rank that does not answer.
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

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Collect the state of an optimizer; a full one is returned on rank 0 only."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer._optimizer
        if self._save_distributed_checkpoint:
            fill_missing_state(optimizer)
            return super().optimizer_state(optimizer)
        state = optimizer.state_dict()
        full = {key: {n: _to_cpu(value) for n, value in entry.items()} for key, entry in state["state"].items()}
        return {**state, "state": full} if self.is_global_zero else {}

    def load_checkpoint(self, checkpoint_path: str | os.PathLike, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint without running code from it; the shards of a distributed one are loaded at once.

        Raises:
            ConfigurationError: If it is damaged, or holds more than tensors and plain values.
        """
        path = Path(self.broadcast(checkpoint_path))
        self._loaded_distributed = path.is_dir()
        if self._loaded_distributed:
            check_checkpoint(path)
            return super().load_checkpoint(path, weights_only=True)
        return read_checkpoint(path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give every rank its part of the network."""
        if not self._loaded_distributed:
            assert self.model is not None
            own = self.model.state_dict(keep_vars=True)
            parts = {n: _like(t, own[n]) if n in own else t for n, t in checkpoint["state_dict"].items()}
            self.model.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give every rank its part of the optimizers' state."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(shard_optimizer_state(saved, optimizer))


def shard_optimizer_state(saved: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's full state dict with every tensor that is shaped like its parameter sharded like it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    sharded: dict[Any, dict[str, Any]] = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in saved["state"]:
            sharded[number] = {n: _like(value, parameter) for n, value in saved["state"][number].items()}
    return {**saved, "state": sharded}


@torch.no_grad()
def fill_missing_state(optimizer: Optimizer) -> None:
    """Give parameters without state, whose generators a merge has reset, zeros like those that have some.

    A distributed checkpoint must hold the same entries at every step. For torch's optimizers zeros, and a step count of
    zero, are what they would begin with.
    """
    example = next((entry for entry in optimizer.state.values() if entry), None)
    for group in optimizer.param_groups:
        for parameter in group["params"] if example else []:
            if not optimizer.state.get(parameter):
                optimizer.state[parameter] = {
                    name: torch.zeros_like(parameter if isinstance(value, DTensor) else value)
                    for name, value in example.items()  # type: ignore[union-attr]
                    if isinstance(value, Tensor)
                }


def _to_cpu(value: Any) -> Any:
    return whole(value).cpu() if isinstance(value, Tensor) else value


def _like(value: Any, parameter: Tensor) -> Any:
    if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value
