"""What every module of the framework does: build late, log honestly, optimize by groups."""

import math
from collections.abc import Callable
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orthotrain.callbacks.adapter_checkpoint import restore_frozen
from orthotrain.callbacks.throughput import Throughput
from orthotrain.checkpoint import compare_state
from orthotrain.errors import ConfigurationError
from orthotrain.layers.displacement_pool import DisplacementPool
from orthotrain.metrics import TokenLoss, bits_per_byte, count_targets
from orthotrain.models import ModelBuilder
from orthotrain.modules.optimization import Optimization


class BaseModule(L.LightningModule):
    """A LightningModule around any network; language modelling unless :meth:`loss` is overridden.

    Logged are ``train_loss``, ``grad_norm`` (before clipping), and for each evaluation split its loss, perplexity and,
    where the data module tells its ``bytes_per_token(split)``, bits per byte.

    Args:
        model: The network, or a callable without arguments that builds it when the strategy is set up.
        optimization: Learning rates, weight decay, optimizer and schedule.
    """

    def __init__(
        self,
        model: ModelBuilder | nn.Module | Callable[[], nn.Module],
        optimization: Optimization = Optimization(),
    ) -> None:
        super().__init__()
        self.model: nn.Module | None = model if isinstance(model, nn.Module) else None
        self._builder = None if isinstance(model, nn.Module) else model
        self.optimization = optimization
        self._wrapped = False
        self.evaluation_loss = nn.ModuleDict({split: TokenLoss() for split in ("val", "test")})

    def wrap(self, model: nn.Module) -> None:
        """Put this method's layers into the freshly built network, in place."""

    def configure_model(self) -> None:
        """Build and wrap the network once; called by the trainer, or by hand to look at the wrapped network."""
        if self._wrapped:
            return
        if self.model is None:
            assert self._builder is not None
            self.model = self._builder()
        self._check_vocabulary(self.model)
        self.wrap(self.model)
        DisplacementPool(self.model)
        self._wrapped = True

    def _check_vocabulary(self, model: nn.Module) -> None:
        data = getattr(self._trainer, "datamodule", None)
        tokens = getattr(data, "vocab_size", None)
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        rows = getattr(embedding, "num_embeddings", None)
        if isinstance(tokens, int) and isinstance(rows, int) and tokens > rows:
            raise ConfigurationError(
                f"the tokenizer's vocabulary of {tokens} does not fit the model's embedding of {rows} rows: "
                "set the model's vocab_size and the data's to the same number"
            )

    def configure_callbacks(self) -> list[L.Callback]:
        """Attach the callbacks that every run wants; a subclass adds its own to them."""
        return [Throughput()]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fill in the frozen weights that an adapter checkpoint leaves out; refuse a checkpoint of another model.

        Raises:
            ConfigurationError: Naming what differs.
        """
        restore_frozen(checkpoint, self)
        difference = compare_state(checkpoint["state_dict"], self.state_dict())
        if difference:
            raise ConfigurationError(
                f"the checkpoint is of another model: {difference}; use the config it was made with"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network."""
        assert self.model is not None, "call configure_model() first"
        return self.model(*args, **kwargs)

    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch; override for another objective.

        The default is next-token cross-entropy in nats: ``batch["input_ids"]`` and ``batch["labels"]``, both
        ``(B, T)``, the label at t being the token that follows the input at t; labels of -100 do not count.
        Everything else in the batch (``attention_mask``, ``position_ids``) goes to the network by its name.
        """
        return self.next_token_outputs(batch)[0]

    def next_token_outputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean next-token cross-entropy of a batch in nats, and the logits ``(B, T, V)``."""
        output = self(**{name: value for name, value in batch.items() if name != "labels"})
        logits = getattr(output, "logits", output)
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["labels"].flatten()), logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch."""
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Clear the validation metrics."""
        self.reset_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Clear the test metrics."""
        self.reset_metrics("test")

    def reset_metrics(self, split: str) -> None:
        """Clear what a split has accumulated.

        At the start of an evaluation and not at its end: ``validate`` runs in inference mode, and state that is created
        there cannot be updated by a later ``fit``.
        """
        self.split_loss(split).reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch to the validation loss."""
        self._evaluate("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch to the test loss."""
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log_evaluation("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Continue the prompts ``batch["input_ids"]`` ``(B, T)`` by up to 64 sampled tokens: ``(B, T + new)``."""
        assert self.model is not None
        return self.model.generate(  # type: ignore[operator]
            batch["input_ids"], max_new_tokens=64, do_sample=True, temperature=0.8, top_p=0.95
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient norm as it is before clipping."""
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.log("grad_norm", torch.nn.utils.get_total_norm(gradients))

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule over this network's parameter groups."""
        assert self.model is not None
        return self.optimization.configure(self.model, int(self.trainer.estimated_stepping_batches))

    def split_loss(self, split: str) -> TokenLoss:
        """Return the metric that accumulates the loss of ``val`` or ``test``."""
        return cast(TokenLoss, self.evaluation_loss[split])

    def _evaluate(self, split: str, batch: Any) -> None:
        self.split_loss(split).update(self.loss(batch), count_targets(batch))

    def _log_evaluation(self, split: str) -> None:
        loss = float(self.split_loss(split).compute())
        self.log_dict({f"{split}_{name}": value for name, value in self.evaluation_metrics(loss, split).items()},
                      prog_bar=True)  # fmt: skip

    def evaluation_metrics(self, loss: float, split: str) -> dict[str, float]:
        """Return what is logged for a split, from its mean loss in nats."""
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        bytes_per_token = getattr(getattr(self.trainer, "datamodule", None), "bytes_per_token", None)
        if bytes_per_token is not None:
            metrics["bits_per_byte"] = bits_per_byte(loss, bytes_per_token(split))
        return metrics
