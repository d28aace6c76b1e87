"""The module that all methods share: it builds the network late, shards it if the strategy does, and trains it."""

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from orthotrain.callbacks.batch_seeds import BatchSeeds
from orthotrain.callbacks.causality_check import CausalityCheck
from orthotrain.callbacks.even_predictions import EvenPredictions
from orthotrain.callbacks.final_checkpoint import FinalCheckpoint
from orthotrain.callbacks.finite_guard import FiniteGuard
from orthotrain.callbacks.keep_log_rows import KeepLogRows
from orthotrain.callbacks.merge_rotations import check_merging
from orthotrain.callbacks.packing_check import PackingCheck
from orthotrain.callbacks.throughput import Throughput
from orthotrain.checkpoints.run_folder import checkpoint_folders, leave_nothing
from orthotrain.checkpoints.writing import AtomicCheckpointIO
from orthotrain.console.termination import check
from orthotrain.devices.accelerators import check_device
from orthotrain.devices.host_reads import read_waits
from orthotrain.distributed.agreement import agree_on_checkpoint
from orthotrain.distributed.strategy import ShardedStrategy
from orthotrain.errors import ConfigurationError
from orthotrain.layers.protocols import mergeable_layers
from orthotrain.layers.rotation.displacement_pool import DisplacementPool
from orthotrain.layers.sharding import shard_network
from orthotrain.models import ModelBuilder, check_described
from orthotrain.models.network_checks import check_sequence_length, input_embedding, with_usable_mask
from orthotrain.models.vocabulary import RESIZE, SAME_NUMBER, check_vocabulary, enlarge_embeddings_
from orthotrain.modules.attached_callbacks import unless_given
from orthotrain.modules.chunked_loss import cross_entropy
from orthotrain.modules.head_loss import HeadLoss, logits_of
from orthotrain.modules.labeled import LabeledModule
from orthotrain.modules.micro_step import CompileMode, MicroStep
from orthotrain.modules.optimization import Optimization
from orthotrain.modules.resuming import ResumableModule
from orthotrain.modules.trainer_checks import check_callbacks, check_half_precision, check_rate_finder
from orthotrain.modules.training import TrainedModule
from orthotrain.modules.transformers_masks import masks_without_reads


class BaseModule(ResumableModule, LabeledModule, TrainedModule):
    """A LightningModule around any network; a language model unless :meth:`loss` is overridden.

    It logs ``train_loss``, ``grad_norm`` (before clipping), ``lr``, ``rotation_lr`` where the generators have another
    rate, and ``peak_memory_gib`` of the device. For each evaluation split it logs the loss; if
    :attr:`logs_perplexity`, also the perplexity, and bits per byte if the data module has ``text_bytes(labels,
    split)``: the UTF-8 bytes of the text that the labels of a batch stand for.

    Args:
        model: The network, or a callable without arguments that builds it when the strategy is set up.
        optimization: Learning rates, weight decay, optimizer and schedule.
        chunked_loss: Whether the next-token loss is computed by chunks of rows, so that the whole logits never exist.
            None: if the fp32 logits of a batch are large (128 MiB) and the network allows chunks. True: refuse a
            network that does not allow chunks. False: never. Under ``torch.compile`` the logits are always whole.
        compile: How a training batch is computed: ``none`` eagerly, ``default`` and ``reduce-overhead`` with the
            network compiled by ``torch.compile``, ``cuda-graph`` with forward and backward replayed as CUDA graphs.

    Attributes:
        planned_bytes: Memory that the command line has planned; the summary of the run compares it with the real peak.
    """

    planned_bytes: int | None = None

    def __init__(
        self,
        model: ModelBuilder | nn.Module | Callable[[], nn.Module],
        optimization: Optimization = Optimization(),
        chunked_loss: bool | None = None,
        compile: CompileMode = "none",
    ) -> None:
        super().__init__()
        self.micro_step = MicroStep(compile)
        self.model: nn.Module | None = model if isinstance(model, nn.Module) else None
        self._builder = None if isinstance(model, nn.Module) else model
        self.optimization = optimization
        self.head_loss = HeadLoss(chunked_loss)
        self._wrapped = self._sharded = False

    def build(self, builder: Callable[[], nn.Module]) -> nn.Module:
        """Return the network that ``builder`` builds; a method that draws weights anew leaves them out here."""
        return builder()

    def wrap(self, model: nn.Module) -> None:
        """Put the layers of the method into the freshly built network, in place."""

    def check_targets(self, model: nn.Module) -> None:
        """Refuse a network in which :meth:`wrap` would fail; ``model`` has no storage and must not be changed."""

    def configure_model(self) -> None:
        """Build, wrap and, if the strategy shards, shard the network, once.

        The trainer calls this; call it yourself to look at the wrapped network.
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
                # Lightning's clean-up could not move a half-built network, in which some weights have no memory
                self.model = None
            raise
        self._wrapped = True
        if isinstance(strategy, ModelParallelStrategy):
            self._shard(strategy)
        # DistributedDataParallel reads this name: it neither compares nor broadcasts these buffers
        self._ddp_params_and_buffers_to_ignore = constant_buffers(self)

    def _build_and_wrap(self) -> None:
        if self.model is None:
            assert self._builder is not None
            self.expect_labels(self._builder)
            self.model = self.build(self._builder)
        check()
        self.check_labels(self.model)
        data = getattr(self._trainer, "datamodule", None)
        self._fit_vocabulary(getattr(data, "vocab_size", None))
        check_sequence_length(data, self.model)
        self.wrap(self.model)
        self.head_loss.check(self.model)
        DisplacementPool(self.model)
        self.micro_step.prepare(self.model)

    def _fit_vocabulary(self, tokens: int | None) -> None:
        """Enlarge the embedding of a pretrained model if the user wants it; refuse more tokens than rows."""
        resizes = getattr(self._builder, "resize_vocabulary", None)
        if resizes and tokens is not None:
            enlarge_embeddings_(self.model, tokens)
            described = self.hparams.get("init_args", {}).get("model")
            # a checkpoint is rebuilt without the data: it needs the number
            if isinstance(described, dict) and "init_args" in described:
                described["init_args"]["resize_vocabulary"] = max(tokens, int(resizes))
        embedding = input_embedding(self.model)
        advice = SAME_NUMBER if resizes is None else RESIZE
        check_vocabulary(tokens, getattr(embedding, "num_embeddings", None), advice)

    def _shard(self, strategy: ModelParallelStrategy) -> None:
        assert self.model is not None
        if not isinstance(strategy, ShardedStrategy):
            raise ConfigurationError(
                "ModelParallelStrategy would restore the optimizer's state to other parameters than it was saved from: "
                "take orthotrain.distributed.strategy.ShardedStrategy, or -c trainer/fsdp2.yaml"
            )
        shard_network(self.model, strategy.device_mesh["data_parallel"])
        self._sharded = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # a sharded network is on its device already, and a cast would take its generators out of fp32
        network = self._modules.pop("model") if self._sharded else None
        try:
            return super()._apply(fn, recurse)
        finally:
            if network is not None:
                self._modules["model"] = network

    def configure_callbacks(self) -> list[L.Callback]:
        """Attach the callbacks that every run needs, unless the trainer has them; a subclass adds its own.

        Raises:
            ConfigurationError: If the strategy cannot run the ``compile`` mode, if a callback of the trainer would give
                wrong weights, or if layers cannot be replaced; raised before data are prepared.
        """
        check_callbacks(self._trainer, type(self).wrap is not BaseModule.wrap)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.micro_step.check(self.trainer.strategy, self.automatic_optimization)
            self._check_early()
        wanted = [Throughput(), BatchSeeds(), EvenPredictions(), FinalCheckpoint(), FiniteGuard()]
        own = [*wanted, CausalityCheck(), PackingCheck(), KeepLogRows(self._trainer)]
        return [*leave_nothing(self._trainer), *unless_given(self._trainer, own)]

    def _check_early(self) -> None:
        """Check the targets before data are prepared, on a network without storage where there is none yet."""
        if self._builder is not None and self.model is None:
            check_described(self._builder, self.check_targets)
        elif self.model is not None and not self._wrapped:
            self.check_targets(self.model)

    def on_fit_start(self) -> None:
        """Compare the optimizers of a checkpoint with those of the run; refuse steps that would underflow in fp16.

        Raises:
            ConfigurationError: Naming the difference, or the parameter and a precision that works.
        """
        super().on_fit_start()
        check_half_precision(self, self.trainer.optimizers)

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its schedule over the network's parameter groups.

        Raises:
            ConfigurationError: If a callback searches for a learning rate that this run could not use.
        """
        assert self.model is not None
        steps = self.trainer.estimated_stepping_batches
        configured = self.optimization.configure(self.model, None if math.isinf(steps) else int(steps))
        check_rate_finder(self.trainer, configured)
        return configured

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network; a transformers network without its cache for generation, which copies keys and values."""
        assert self.model is not None, "call configure_model() first"
        if "use_cache" in inspect.signature(type(self.model).forward).parameters:
            kwargs.setdefault("use_cache", False)
        masks_are_read = self.training and read_waits(self.device) and not args
        with masks_without_reads(self.model, kwargs) if masks_are_read else nullcontext():
            return self.micro_step.network(self.model)(*args, **kwargs)

    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch; override for another objective.

        The default is next-token cross-entropy in nats: ``batch["input_ids"]`` and ``batch["labels"]``, both
        ``(B, T)``; the label at t is the token that follows the input at t; labels of -100 do not count. Everything
        else in the batch (``attention_mask``, ``position_ids``) is passed to the network by name. With labeled data it
        is the network's own loss (:class:`LabeledModule`).
        """
        return self.labeled_outputs(batch)[0] if self.labeled else self.next_token_loss(batch)

    def next_token_loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean next-token cross-entropy of a batch in nats, without whole logits where that is possible."""
        assert self.model is not None, "call configure_model() first"
        if type(self).next_token_outputs is not BaseModule.next_token_outputs:  # overridden: the override decides
            return self.next_token_outputs(batch)[0]
        return self.head_loss(self.model, lambda: self.network_output(batch), batch["labels"], self.needs_logits)

    def next_token_outputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean next-token cross-entropy of a batch in nats, and the logits ``(B, T, V)``."""
        logits = logits_of(self.network_output(batch))
        return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()), logits

    def network_output(self, batch: dict[str, Tensor]) -> Any:
        """Return the network's output for a batch; everything but the labels is passed to the network."""
        inputs = with_usable_mask(batch, self.model)
        return self(**{name: value for name, value in inputs.items() if name != "labels"})

    @property
    def needs_logits(self) -> str | None:
        """Why the loss currently needs whole logits; None if it does not."""
        if self.micro_step.mode != "none":
            return f"compile is {self.micro_step.mode}"
        compiled = hasattr(self.model, "_orig_mod") or getattr(self.model, "_compiled_call_impl", None)
        return "torch.compile is used" if compiled or torch.compiler.is_compiling() else None

    @property
    def loss_described(self) -> str | None:
        """How the next-token loss was computed, for the summary of a run; None if the module has another loss."""
        return self.head_loss.describe(self.needs_logits) if self.has_next_token_loss else None

    @property
    def has_next_token_loss(self) -> bool:
        """Whether the loss is :meth:`next_token_loss`, and not one of a subclass or of the network."""
        return type(self).loss is BaseModule.loss and not self.labeled

    @property
    def logs_perplexity(self) -> bool:
        """Whether the loss is a cross-entropy in nats per token; override if a :meth:`loss` of your own is."""
        return self.has_next_token_loss

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Continue the prompts ``batch["input_ids"]`` ``(B, T)`` by up to 64 sampled tokens: ``(B, T + new)``."""
        assert self.model is not None
        return self.model.generate(  # type: ignore[operator]
            batch["input_ids"], max_new_tokens=64, do_sample=True, temperature=0.8, top_p=0.95
        )


def constant_buffers(module: nn.Module) -> list[str]:
    """Return the names of the buffers that have the same values on every rank without being sent.

    These are the buffers of mergeable layers (permutations and merge counts, drawn from seeds) and the buffers that are
    not saved (rotary frequencies). DDP's ``broadcast_buffers`` sends the others, such as running statistics.
    """
    inside = tuple(f"{name}." for name, _ in mergeable_layers(module))
    saved = module.state_dict().keys()
    return [name for name, _ in module.named_buffers() if name.startswith(inside) or name not in saved]
