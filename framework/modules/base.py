"""What every module of the framework does: build late, shard if asked to, log honestly, optimize by groups."""

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Self, cast

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from orthotrain.callbacks.adapter_checkpoint import restore_frozen
from orthotrain.callbacks.batch_seeds import BatchSeeds
from orthotrain.callbacks.even_predictions import EvenPredictions
from orthotrain.callbacks.final_checkpoint import FinalCheckpoint
from orthotrain.callbacks.finite_guard import FiniteGuard, look_before_saving
from orthotrain.callbacks.merge_rotations import check_merging
from orthotrain.callbacks.throughput import Throughput, logs_at
from orthotrain.checkpoints.reading import check_finite, compare_state, read_checkpoint
from orthotrain.checkpoints.rebuild import rebuild_module
from orthotrain.checkpoints.restore_checks import check_merges, check_optimizers, check_progress
from orthotrain.checkpoints.resume import adapt_ranks, begin_next_epoch, forget_end_of_epoch
from orthotrain.checkpoints.run_folder import checkpoint_folder_of, checkpoint_folders, leave_nothing
from orthotrain.checkpoints.stored_paths import keep_own_paths
from orthotrain.checkpoints.writing import AtomicCheckpointIO
from orthotrain.console.termination import check
from orthotrain.devices.accelerators import check_device
from orthotrain.devices.host_reads import read_waits
from orthotrain.distributed.agreement import agree_on_checkpoint, agree_on_step
from orthotrain.distributed.strategy import ShardedStrategy
from orthotrain.errors import ConfigurationError
from orthotrain.layers.mergeable import mergeable_layers
from orthotrain.layers.rotation.displacement_pool import DisplacementPool
from orthotrain.layers.sharding import shard_network, whole
from orthotrain.metrics import TokenLoss, bits_per_byte, count_targets
from orthotrain.models import ModelBuilder, check_vocabulary
from orthotrain.modules.attached_callbacks import clip_after_merges, unless_given
from orthotrain.modules.chunked_loss import cross_entropy
from orthotrain.modules.head_loss import HeadLoss, logits_of
from orthotrain.modules.micro_step import CompileMode, MicroStep
from orthotrain.modules.optimization import Optimization
from orthotrain.modules.unread_masks import unread_masks


class BaseModule(L.LightningModule):
    """A LightningModule around any network; language modelling unless :meth:`loss` is overridden.

    Logged are ``train_loss``, ``grad_norm`` (before clipping), and for each evaluation split its loss and, where
    :attr:`logs_perplexity`, perplexity and, if the data module tells its ``bytes_per_token(split)``, bits per byte.

    Args:
        model: The network, or a callable without arguments that builds it when the strategy is set up.
        optimization: Learning rates, weight decay, optimizer and schedule.
        chunked_loss: Whether the next-token loss goes by chunks of rows and never holds whole logits. None where the
            fp32 logits of a batch are large (128 MiB) and the network allows it, True to refuse a network that does
            not, False for never. Under ``torch.compile`` whole logits are taken.
        compile: How a training batch is computed: ``none`` eagerly, ``default`` and ``reduce-overhead`` with the
            network compiled by ``torch.compile``, ``cuda-graph`` with forward and backward replayed as CUDA graphs.

    Attributes:
        compile_mode: The value of ``compile``.
    """

    def __init__(
        self,
        model: ModelBuilder | nn.Module | Callable[[], nn.Module],
        optimization: Optimization = Optimization(),
        chunked_loss: bool | None = None,
        compile: CompileMode = "none",
    ) -> None:
        super().__init__()
        self.compile_mode, self.micro_step = compile, MicroStep(compile)
        self.model: nn.Module | None = model if isinstance(model, nn.Module) else None
        self._builder = None if isinstance(model, nn.Module) else model
        self.optimization = optimization
        self.head_loss = HeadLoss(chunked_loss)
        self.planned_bytes: int | None = None  # told by the command line, for the summary to compare with
        self.resume_from: str | None = None  # said by the command line, for ranks to compare
        self._wrapped = self._sharded = self._epoch_was_over = False
        self._restored: dict[str, Any] | None = None  # until its optimizers can be compared
        self.evaluation_loss = nn.ModuleDict({split: TokenLoss() for split in ("val", "test")})

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: str | torch.device | None = None,
        strict: bool = True,
        allow: Iterable[str | type] = (),
        trust_remote_code: bool = False,
        **given: Any,
    ) -> Self:
        """Rebuild a module with its weights from a checkpoint; nothing in the file is run.

        ``PoetModule.load_from_checkpoint("last.ckpt")`` is enough for a checkpoint of ``orthotrain fit``. A run of your
        own program has not stored how its network is built: give ``model=`` and ``layers=`` as they were.

        Args:
            checkpoint_path: The ``.ckpt`` file.
            map_location: Device of the module; None for the CPU.
            strict: Whether the file and the module must have the same tensors.
            allow: Classes of your own, or their dotted names, that the file may name.
            trust_remote_code: Whether code that comes with a pretrained model is run where the run has done so.
            given: Arguments of the module in place of the stored ones.

        Raises:
            ConfigurationError: If the file cannot be read, does not describe its module, names code that is not known,
                or does not fit.
        """
        for name in ("weights_only", "hparams_file"):
            if given.pop(name, None):
                raise ConfigurationError(f"load_from_checkpoint({name}=...): the file alone says it; leave {name} out")
        contents = read_checkpoint(checkpoint_path)
        module = rebuild_module(contents, cls, str(checkpoint_path), allow, trust_remote_code, given, strict)
        return module if map_location is None else module.to(map_location)

    def build(self, builder: Callable[[], nn.Module]) -> nn.Module:
        """Return the network that ``builder`` builds; a method that draws weights anew leaves them out here."""
        return builder()

    def wrap(self, model: nn.Module) -> None:
        """Put this method's layers into the freshly built network, in place."""

    def configure_model(self) -> None:
        """Build, wrap and, if the strategy says so, shard the network once.

        Called by the trainer, or by hand to look at the wrapped network.
        """
        strategy: Any = getattr(self._trainer, "strategy", None)
        if strategy is not None and type(strategy.checkpoint_io) is TorchCheckpointIO:
            trainer = self.trainer
            strategy.checkpoint_io = AtomicCheckpointIO(lambda: checkpoint_folders(trainer))
        if strategy is not None:
            check_merging(strategy, self.trainer.callbacks)  # type: ignore[attr-defined]
            agree_on_checkpoint(self.resume_from)
            check_device(strategy.root_device, str(self.trainer.precision))
        if self._wrapped:
            return
        try:
            self._build_and_wrap()
        except BaseException:
            if self._builder is not None:
                # a network that is half made, some weights without memory, could not be moved by Lightning's clean-up
                self.model = None
            raise
        self._wrapped = True
        if isinstance(strategy, ModelParallelStrategy):
            self._shard(strategy)
        # DistributedDataParallel reads this name: it neither compares nor broadcasts these
        self._ddp_params_and_buffers_to_ignore = constant_buffers(self)

    def _build_and_wrap(self) -> None:
        if self.model is None:
            assert self._builder is not None
            self.model = self.build(self._builder)
        check()
        self._check_vocabulary(self.model)
        self.wrap(self.model)
        self.head_loss.check(self.model)
        DisplacementPool(self.model)
        self.micro_step.prepare(self.model)

    def _shard(self, strategy: ModelParallelStrategy) -> None:
        assert self.model is not None
        if not isinstance(strategy, ShardedStrategy):
            raise ConfigurationError(
                "ModelParallelStrategy would restore the optimizer's state to other parameters than it was saved of: "
                "take orthotrain.distributed.strategy.ShardedStrategy, or -c trainer/fsdp2.yaml"
            )
        shard_network(self.model, strategy.device_mesh["data_parallel"])
        self._sharded = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A sharded network is where and what it should be, and a cast would take its generators out of fp32.
        network = self._modules.pop("model") if self._sharded else None
        try:
            return super()._apply(fn, recurse)
        finally:
            if network is not None:
                self._modules["model"] = network

    def _check_vocabulary(self, model: nn.Module) -> None:
        data = getattr(self._trainer, "datamodule", None)
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        check_vocabulary(getattr(data, "vocab_size", None), getattr(embedding, "num_embeddings", None))

    def configure_callbacks(self) -> list[L.Callback]:
        """Attach the callbacks that every run wants, unless the trainer has some; a subclass adds its own to them.

        Raises:
            ConfigurationError: If ``compile`` has a mode that the strategy cannot have, before data are prepared.
        """
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.micro_step.check(self.trainer.strategy, self.automatic_optimization)
        wanted = [Throughput(), BatchSeeds(), EvenPredictions(), FinalCheckpoint(), FiniteGuard()]
        return [*leave_nothing(self._trainer), *unless_given(self._trainer, wanted)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Look at what the last steps have left before it is written.

        Raises:
            TrainingDiverged: If some of it is not finite.
        """
        if self._trainer is not None:
            look_before_saving(self.trainer, self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Fit the checkpoint to this run: its paths, the number of ranks, and the frozen weights of an adapter.

        Raises:
            ConfigurationError: If the checkpoint is of another model, holds values that are not finite, or cannot be
                restored in this run, naming the entry.
        """
        if self._trainer is not None:
            self._fit_to_run(checkpoint)
            self._epoch_was_over = forget_end_of_epoch(checkpoint)
        if "state_dict" not in checkpoint:  # ModelParallelStrategy has loaded the network by now
            return
        restore_frozen(checkpoint, self)
        difference = compare_state(checkpoint["state_dict"], self.state_dict())
        if difference:
            raise ConfigurationError(
                f"the checkpoint is of another model: {difference}; use the config it was made with"
            )
        check_merges(checkpoint["state_dict"], checkpoint.get("global_step"))
        check_finite(checkpoint["state_dict"], [name for name, _ in self.named_parameters(remove_duplicate=False)])

    def _fit_to_run(self, checkpoint: dict[str, Any]) -> None:
        trainer = self.trainer
        check_progress(checkpoint, trainer)
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if isinstance(callback, ModelCheckpoint) and state:
                keep_own_paths(state, callback, checkpoint_folder_of(callback, trainer))
        if trainer.state.fn != TrainerFn.FITTING:
            return
        adapt_ranks(checkpoint, trainer.world_size)
        if trainer.optimizers:
            check_optimizers(checkpoint, trainer)
        else:  # they are built after the network has been restored
            self._restored = checkpoint

    def on_fit_start(self) -> None:
        """Compare the checkpoint's optimizers with those of the run, which exist by now.

        Raises:
            ConfigurationError: If they are others, naming what differs.
        """
        checkpoint, self._restored = self._restored, None
        if checkpoint is not None and self.trainer.strategy.lightning_restore_optimizer:
            check_optimizers(checkpoint, self.trainer)

    def on_train_start(self) -> None:
        """Put the training data where the checkpoint left it.

        Lightning does so when it sets the data up, but with ``max_epochs`` it does that early, to count the steps for
        the schedule, when the place is not known yet, and would begin the epoch's data anew. Where the epoch ends is up
        to this run, whose ``limit_train_batches`` may be larger.

        Raises:
            ConfigurationError: If ranks begin with different steps.
        """
        agree_on_step(self.trainer.global_step)
        self.trainer.fit_loop._load_combined_loader_states()
        begin_next_epoch(self.trainer.fit_loop, self._epoch_was_over)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network; one of transformers without the cache of generation, which copies all keys and values."""
        assert self.model is not None, "call configure_model() first"
        if takes_cache(type(self.model)):
            kwargs.setdefault("use_cache", False)
        with unread_masks(self.model, kwargs) if self._reads_wait and not args else nullcontext():
            return self.micro_step.network(self.model)(*args, **kwargs)

    @property
    def _reads_wait(self) -> bool:
        """Whether the module trains on a device that the host waits for when it reads a value."""
        return self.training and read_waits(self.device)

    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch; override for another objective.

        The default is next-token cross-entropy in nats: ``batch["input_ids"]`` and ``batch["labels"]``, both
        ``(B, T)``, the label at t being the token that follows the input at t; labels of -100 do not count.
        Everything else in the batch (``attention_mask``, ``position_ids``) goes to the network by its name.
        """
        return self.next_token_loss(batch)

    def next_token_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean next-token cross-entropy of a batch in nats, without whole logits where that is possible."""
        assert self.model is not None, "call configure_model() first"
        if type(self).next_token_outputs is not BaseModule.next_token_outputs:  # a subclass computes it in its own way
            return self.next_token_outputs(batch)[0]
        return self.head_loss(self.model, lambda: self.network_output(batch), batch["labels"], self.needs_logits)

    def next_token_outputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean next-token cross-entropy of a batch in nats, and the logits ``(B, T, V)``."""
        logits = logits_of(self.network_output(batch))
        return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()), logits

    def network_output(self, batch: dict[str, Tensor]) -> Any:
        """Return what the network computes from everything in a batch but its labels."""
        return self(**{name: value for name, value in batch.items() if name != "labels"})

    @property
    def needs_logits(self) -> str | None:
        """Why the loss cannot go without whole logits at the moment, or None."""
        if getattr(self, "compile_mode", "none") != "none":
            return f"compile is {self.compile_mode}"
        compiled = hasattr(self.model, "_orig_mod") or getattr(self.model, "_compiled_call_impl", None)
        return "torch.compile is used" if compiled or torch.compiler.is_compiling() else None

    @property
    def loss_described(self) -> str | None:
        """How the next-token loss was computed, for the summary of a run; None where the module has another loss."""
        return self.head_loss.describe(self.needs_logits) if self.has_next_token_loss else None

    @property
    def has_next_token_loss(self) -> bool:
        """Whether the loss is :meth:`next_token_loss`, and not one of a subclass or of the network."""
        return type(self).loss is BaseModule.loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch."""
        loss = self.micro_step.loss(self, batch)
        # Lightning reads what is in its progress bar at every step: on a device the host would wait
        self.log("train_loss", loss, prog_bar=not read_waits(self.device))
        return loss

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """Clear the gradients; where graphs add to them their memory is kept."""
        self.micro_step.check_ran(self)
        optimizer.zero_grad(set_to_none=not self.micro_step.keeps_gradients)

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
        if logs_at(self.trainer, self.trainer.global_step + 1):
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self.log("grad_norm", whole(torch.nn.utils.get_total_norm(gradients)))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer does, more tightly after a merge if ``optimization.clip_ramp`` is set.

        Raises:
            ConfigurationError: If there is a ramp, and no bound that it could scale or nothing that merges.
        """
        if self.optimization.clip_ramp is None:
            return self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        ramp = self.optimization.clip_ramp
        clip_after_merges(self.trainer, optimizer, ramp, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule over this network's parameter groups."""
        assert self.model is not None
        steps = self.trainer.estimated_stepping_batches
        return self.optimization.configure(self.model, None if math.isinf(steps) else int(steps))

    def split_loss(self, split: str) -> TokenLoss:
        """Return the metric that accumulates the loss of ``val`` or ``test``."""
        return cast(TokenLoss, self.evaluation_loss[split])

    @property
    def logs_perplexity(self) -> bool:
        """Whether the loss is a cross-entropy in nats per token; override where a :meth:`loss` of your own is one."""
        return self.has_next_token_loss

    def _evaluate(self, split: str, batch: Any) -> None:
        self.split_loss(split).update(self.loss(batch), count_targets(batch))

    def _log_evaluation(self, split: str) -> None:
        loss = float(self.split_loss(split).compute())
        self.log_dict({f"{split}_{name}": value for name, value in self.evaluation_metrics(loss, split).items()},
                      prog_bar=True)  # fmt: skip

    def evaluation_metrics(self, loss: float, split: str) -> dict[str, float]:
        """Return what is logged for a split, from its mean loss."""
        if not self.logs_perplexity:
            return {"loss": loss}
        metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
        bytes_per_token = getattr(getattr(self.trainer, "datamodule", None), "bytes_per_token", None)
        if bytes_per_token is not None:
            metrics["bits_per_byte"] = bits_per_byte(loss, bytes_per_token(split))
        return metrics


def constant_buffers(module: nn.Module) -> list[str]:
    """Return the names of the buffers that every rank computes alike, so that none needs to be told another's.

    These are the buffers of mergeable layers (permutations and merge counts, drawn from seeds) and those that are not
    saved (rotary frequencies). Others, such as running statistics, are what DDP's ``broadcast_buffers`` is about.
    """
    inside = tuple(f"{name}." for name, _ in mergeable_layers(module))
    saved = module.state_dict().keys()
    return [name for name, _ in module.named_buffers() if name.startswith(inside) or name not in saved]


def takes_cache(network: type[nn.Module]) -> bool:
    """Tell whether the forward pass of a network can fill a cache for generation."""
    return "use_cache" in inspect.signature(network.forward).parameters
