"""How a module computes the loss of one batch and its gradients: eagerly, compiled, or as replayed CUDA graphs."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from orthotrain.distributed.strategy import ShardedStrategy
from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.modules.graph_replay import RECORDERS, GraphedStep

CompileMode = Literal["none", "default", "reduce-overhead", "cuda-graph"]

KNOWN_STRATEGIES = (SingleDeviceStrategy, DDPStrategy, ShardedStrategy)
"""Strategies under which tests have shown that a compiled network computes the same as the network itself."""


class MicroStep:
    """Computes the training loss of a module in one mode; validation and generation are always eager.

    ``default`` and ``reduce-overhead`` are modes of ``torch.compile`` and compile the forward pass of the network;
    batches of another shape compile it again. ``cuda-graph`` replays forward and backward (:class:`GraphedStep`). No
    mode changes the network itself: names, checkpoints and export stay as they are.

    Args:
        mode: The value of ``compile``.

    Raises:
        ConfigurationError: If the mode is unknown.

    Attributes:
        ran: Whether a training loss was computed.
    """

    def __init__(self, mode: CompileMode) -> None:
        check_choice("compile", mode, CompileMode)
        self.mode = mode
        self.ran = False
        self._active = False
        self._compiled: Callable[..., Any] | None = None
        self._graphed: GraphedStep | None = None

    def __reduce__(self) -> tuple:
        return MicroStep, (self.mode,)  # compiled code and graphs belong to one network in one process

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients must keep their memory from step to step, because CUDA graphs add to it."""
        return self.mode in ("reduce-overhead", "cuda-graph")

    def check(self, strategy: Any, automatic: bool = True) -> None:
        """Refuse a mode that does not work with the strategy or the device of a run.

        Args:
            strategy: The trainer's strategy.
            automatic: Whether Lightning calls backward and the optimizer.

        Raises:
            ConfigurationError: Naming the mode, the strategy or device, and a mode that works.
        """
        if self.mode == "none":
            return
        if not automatic:
            raise ConfigurationError(
                f"compile={self.mode} with automatic_optimization=False: the mode works only for a training step whose "
                "backward pass Lightning runs; take compile=none"
            )
        name = type(strategy).__name__
        if self.mode == "cuda-graph":
            if not isinstance(strategy, SingleDeviceStrategy):
                raise ConfigurationError(
                    f"compile=cuda-graph with {name}: a captured backward pass does not exchange gradients between "
                    "ranks; take compile=default, or one device (devices=1, strategy=auto)"
                )
            if strategy.root_device.type not in RECORDERS:
                raise ConfigurationError(
                    f"compile=cuda-graph needs a CUDA device and the run is on {strategy.root_device.type}; "
                    "take compile=default or compile=none"
                )
        elif self.mode == "reduce-overhead" and isinstance(strategy, ModelParallelStrategy):
            raise ConfigurationError(
                f"compile=reduce-overhead with {name}: every gather puts the weights into other memory, so that every "
                "step would capture a new graph; take compile=default or compile=none"
            )
        # DeepSpeedStrategy is a subclass of DDPStrategy
        elif not isinstance(strategy, KNOWN_STRATEGIES) or isinstance(strategy, DeepSpeedStrategy):
            raise ConfigurationError(
                f"compile={self.mode} with {name} is not known to compute the same; take compile=none, or one device, "
                "-c trainer/ddp.yaml or -c trainer/fsdp2.yaml"
            )

    def prepare(self, network: nn.Module) -> None:
        """Prepare a wrapped network for the mode.

        Raises:
            ConfigurationError: If layers that are recomputed in backward draw random numbers, which a captured graph
                cannot repeat.
        """
        recomputes = any(getattr(module, "gradient_checkpointing", False) for module in network.modules())
        if self.mode != "cuda-graph" or not recomputes:
            return
        if dropout := sorted(_dropout_of(network)):
            raise ConfigurationError(
                f"compile=cuda-graph with gradient_checkpointing and {dropout[0]}: a captured backward pass cannot "
                f"draw the same random numbers again; set {dropout[0].split('=')[0]} to 0, or take compile=default"
            )
        # these layers draw no random numbers, and a capture must not read the generator's state
        kwargs = {"use_reentrant": False, "preserve_rng_state": False}
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)  # type: ignore[operator]

    def loss(self, module: Any, batch: Any) -> Tensor:
        """Return the loss of a training batch, computed in the mode.

        Args:
            module: The module whose ``loss(batch)`` is computed.
            batch: A batch of its data loader.

        Raises:
            ConfigurationError: If the loss cannot be compiled or captured.
        """
        first, self.ran = not self.ran, True
        if self.mode == "cuda-graph":
            self._graphed = self._graphed or GraphedStep(module.loss, module)
            return self._graphed(batch)
        if self.mode == "none" or (first and self.mode == "reduce-overhead"):
            # the first backward pass allocates the gradients, which must not lie in the memory of a graph
            return module.loss(batch)
        if self.mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with self._compiling(module):
            loss = module.loss(batch)
        if self._compiled is None:
            name = type(module).__name__
            raise ConfigurationError(
                f"compile={self.mode}: the loss of {name} calls its network as self.model(...), which is not compiled; "
                "call self(...), or take compile=none"
            )
        return loss

    def network(self, network: nn.Module) -> Callable[..., Any]:
        """Return the function that a forward pass calls: the network, or, in a training step, its compiled form."""
        if not self._active:
            return network
        if self._compiled is None:
            # compile a function, not the module: a compiled module has other names in a checkpoint
            self._compiled = torch.compile(lambda *args, **kwargs: network(*args, **kwargs), mode=self.mode)
        return self._compiled

    def check_ran(self, module: Any) -> None:
        """Refuse a module whose own training step does not use the mode.

        Raises:
            ConfigurationError: Naming the module and the remedies.
        """
        if self.mode != "none" and not self.ran:
            name = type(module).__name__
            raise ConfigurationError(
                f"compile={self.mode}: {name}.training_step computes its loss itself; call super().training_step, or "
                f"override {name}.loss instead, or take compile=none"
            )

    @contextmanager
    def _compiling(self, module: Any) -> Any:
        self._active = True
        try:
            yield
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = str(error).strip().splitlines()[0]
            raise ConfigurationError(
                f"compile={self.mode}: the network of {type(module).__name__} cannot be compiled "
                f"({type(error).__name__}: {reason}); take compile=none"
            ) from error
        finally:
            self._active = False


def _dropout_of(network: nn.Module) -> set[str]:
    """Return the settings with which a network drops values in training, as ``name=value``."""
    config: Any = getattr(network, "config", None)
    found = dict(config.to_dict()) if hasattr(config, "to_dict") else {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Dropout):
            found[f"{name}.dropout"] = module.p
        elif isinstance(getattr(module, "block_dropout", None), float):
            found["block_dropout"] = module.block_dropout
    return {f"{n}={v}" for n, v in found.items() if "drop" in n and isinstance(v, (int, float)) and v > 0}
