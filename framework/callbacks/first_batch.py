"""A check of the network that runs once, before the first batch of a training or an evaluation."""

from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from orthotrain.models.network_checks import evaluating, same_buffers, same_draws


class FirstBatchCheck(L.Callback):
    """Try a network once, before its first batch of a kind that a subclass chooses, in evaluation mode.

    All ranks try it with the batch of the first one: sharded ranks must run the same passes, and end together.
    """

    def __init__(self) -> None:
        self.checked = False

    def applies(self, module: Any, batch: Any) -> bool:
        """Tell whether the network is to be tried with a batch; a subclass implements it."""
        raise NotImplementedError

    def shared(self, batch: Any) -> Any:
        """Return the part of a batch that the check needs."""
        return batch

    def try_network(self, trainer: L.Trainer, module: Any, batch: Any) -> None:
        """Refuse a network that does not fit; a subclass implements it.

        Args:
            trainer: The trainer.
            module: The module, whose network is in evaluation mode; no gradients are computed.
            batch: What :meth:`shared` has returned on the first rank.
        """
        raise NotImplementedError

    def check(self, trainer: L.Trainer, module: Any, batch: Any) -> None:
        """Try the network, unless that was done."""
        if self.checked or not self.applies(module, batch):
            return
        self.checked = True
        # a tensor is received on the device of its sender
        batch = move_data_to_device(trainer.strategy.broadcast(self.shared(batch)), trainer.strategy.root_device)
        with torch.inference_mode(False), torch.no_grad(), evaluating(module.model):
            self.try_network(trainer, module, batch)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check the network before the first batch of a training."""
        self.check(trainer, pl_module, batch)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the network before the first batch of a validation."""
        self.check(trainer, pl_module, batch)

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check the network before the first batch of a test."""
        self.check(trainer, pl_module, batch)


def tried_logits(module: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the logits of a batch; the network's buffers and the generators of random numbers are restored."""
    with same_draws(batch["input_ids"].device), same_buffers(module.model):
        output = module.network_output(batch)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def two_rows(network: nn.Module, tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return two rows ``(1, length)`` of tokens of a batch that differ in their second half."""
    settings = vars(getattr(network, "config", nn.Module()))
    special = [value for name, value in settings.items() if name.endswith("token_id")]  # a value may be a list
    known = tokens.unique()
    usual = known[[token not in special for token in known.tolist()]]
    known = usual if len(usual) > 1 else known
    places = torch.arange(length, device=known.device)
    row = known[places % len(known)][None]
    other = row.clone()
    other[:, length // 2 :] = known[(places[length // 2 :] + (len(known) + 1) // 2) % len(known)]
    return row, other
