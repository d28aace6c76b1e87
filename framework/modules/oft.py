"""OFTv2 and QOFT finetuning (arXiv:2506.19847) as a LightningModule around any network."""

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor, nn

from orthotrain.callbacks.pictures import run_folder
from orthotrain.callbacks.project_generators import ProjectGenerators
from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.generation import generated_tokens, is_encoder_decoder
from orthotrain.generation_metrics import GenerationMetrics, TokenAccuracy
from orthotrain.layers import OftLinear, replace_linears, select_linears
from orthotrain.layers.block_rotation import check_parameterization
from orthotrain.layers.oft_linear import Quantization
from orthotrain.layers.oft_rotation import RotationDtype
from orthotrain.metrics import count_targets
from orthotrain.models import ModelBuilder
from orthotrain.modules.base import BaseModule
from orthotrain.modules.optimization import Optimization
from orthotrain.plugins import Parameterization

Objective = Literal["next_token", "model"]


@dataclass(frozen=True)
class OftLayers:
    """Which linear layers get a rotation of their input, and how. Everything else is frozen.

    Args:
        block_size: Size of the rotated blocks; must divide the input width of every layer.
        block_sizes: Glob pattern on module names -> block size instead of ``block_size``, the first that matches wins.
        parameterization: How generators become rotations: a registered name (`orthotrain plugins` lists them) or a
            class with its arguments, in YAML ``{class_path: CayleyNeumann, init_args: {order: 4}}``.
        include: Glob patterns on module names; each must match a linear layer.
        exclude: Glob patterns taken out again.
        train: Glob patterns on names of parameters that are trained beside the rotations (a fresh head, biases).
        quantization: Storage of the frozen weights: ``nf4``, ``int8``, or null for the one they have.
        block_share: Whether all blocks of a layer share one block's generators.
        coft_eps: COFT: bound of the generators' norm in a layer, kept by projection after each step; null for none.
        block_dropout: Probability with which a block is the identity for one training forward.
        rotation_dtype: ``input`` rotates in the dtype of the activations, ``float32`` in fp32.
    """

    block_size: int = 32
    block_sizes: dict[str, int] | None = None
    parameterization: Parameterization | str = "cayley_neumann"
    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=lambda: ["*lm_head*", "*score*", "*classifier*"])
    train: list[str] = field(default_factory=list)
    quantization: Quantization | None = None
    block_share: bool = False
    coft_eps: float | None = None
    block_dropout: float = 0.0
    rotation_dtype: RotationDtype = "input"

    def __post_init__(self) -> None:
        check_parameterization(self.parameterization)

    def apply_(self, model: nn.Module) -> list[str]:
        """Freeze ``model`` and wrap the chosen layers in place; its outputs stay what they are.

        Returns:
            The names of the wrapped layers.

        Raises:
            ConfigurationError: See :func:`orthotrain.layers.replace_linears`; or if a pattern matches nothing.
        """
        names = {linear: name for name, linear in select_linears(model, self.include, self.exclude).items()}
        for pattern in self.block_sizes or {}:
            if not any(fnmatchcase(name, pattern) for name in names.values()):
                raise ConfigurationError(f"block_sizes pattern {pattern!r} matches none of the chosen layers")
        model.requires_grad_(False)
        wrapped = replace_linears(model, self.include, self.exclude, lambda linear: self._wrap(linear, names[linear]))
        for pattern in self.train:
            matches = [p for name, p in model.named_parameters() if fnmatchcase(name, pattern)]
            if not matches:
                raise ConfigurationError(f"train pattern {pattern!r} matches no parameter of the model")
            for parameter in matches:
                parameter.requires_grad_(True)
        return wrapped

    def _wrap(self, linear: nn.Linear, name: str) -> OftLinear:
        sizes = [size for pattern, size in (self.block_sizes or {}).items() if fnmatchcase(name, pattern)]
        return OftLinear.from_linear(
            linear,
            sizes[0] if sizes else self.block_size,
            self.parameterization,
            block_share=self.block_share,
            coft_eps=self.coft_eps,
            block_dropout=self.block_dropout,
            rotation_dtype=self.rotation_dtype,
            quantization=self.quantization,
        )


class OftModule(BaseModule):
    """Finetune any network with OFT: rotations of the inputs of its frozen, possibly quantised linear layers.

    Beside the metrics of :class:`BaseModule` it logs the accuracy of the predicted response tokens, and, where the data
    module offers ``generation_batches``, exact match and ROUGE-L of answers generated without sampling; a few of these
    are logged as text. Subclass it and override :meth:`outputs` for another objective.

    Args:
        model: The pretrained network, or what builds it.
        layers: Which linear layers are rotated, and how.
        optimization: Learning rates, weight decay, optimizer and schedule.
        objective: ``next_token`` for a causal language model with labels already shifted, as the data modules of this
            package lay them out; ``model`` lets the network compute its own loss from the whole batch: classification
            heads of transformers, and encoder-decoders with ``InstructionData(layout="seq2seq")``.
        max_new_tokens: Tokens generated for each validation sample; 0 for no generation.
        logged_samples: Generated samples that are logged as text.

    Raises:
        ConfigurationError: An unknown objective; when the network is built, if a layer cannot be wrapped.
    """

    def __init__(
        self,
        model: ModelBuilder | nn.Module | Callable[[], nn.Module],
        layers: OftLayers = OftLayers(),
        optimization: Optimization = Optimization(),
        objective: Objective = "next_token",
        max_new_tokens: int = 48,
        logged_samples: int = 4,
    ) -> None:
        super().__init__(model, optimization)
        check_choice("objective", objective, Objective)
        self.save_hyperparameters("objective", "max_new_tokens", "logged_samples")
        self.layers = layers
        self.objective = objective
        self.max_new_tokens = max_new_tokens
        self.logged_samples = logged_samples
        self.wrapped_names: list[str] = []
        self.token_accuracy = nn.ModuleDict({split: TokenAccuracy() for split in ("val", "test")})
        self.generation = GenerationMetrics()

    def wrap(self, model: nn.Module) -> None:
        """Freeze the network and put rotations before the chosen layers.

        Raises:
            ConfigurationError: The data lays its rows out for another kind of network, or a layer cannot be wrapped.
        """
        self._check_layout(model)
        self.wrapped_names = self.layers.apply_(model)

    def _check_layout(self, model: nn.Module) -> None:
        layout = getattr(getattr(self._trainer, "datamodule", None), "layout", None)
        wanted = "seq2seq" if is_encoder_decoder(model) else "causal"
        if layout not in (None, wanted):
            raise ConfigurationError(
                f"the data's layout {layout!r} does not fit {type(model).__name__}: set layout to {wanted}"
            )
        if layout == "causal" and self.objective == "model":
            raise ConfigurationError(
                "objective='model' shifts the labels, and those of the layout 'causal' are shifted already: "
                "leave objective at next_token"
            )

    def configure_callbacks(self) -> list[L.Callback]:
        """Attach COFT's projection if the layers have a bound."""
        projection = [ProjectGenerators()] if self.layers.coft_eps is not None else []
        return [*super().configure_callbacks(), *projection]

    def outputs(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch and its logits, which line up with ``batch["labels"]``."""
        if self.objective == "model":
            output = self(**batch)
            return output.loss, output.logits
        if is_encoder_decoder(self.model):
            raise ConfigurationError(
                f"objective='next_token': {type(self.model).__name__} predicts labels that are not its inputs shifted; "
                "set objective to model"
            )
        return self.next_token_outputs(batch)

    def split_accuracy(self, split: str) -> TokenAccuracy:
        """Return the metric that accumulates the token accuracy of ``val`` or ``test``."""
        return cast(TokenAccuracy, self.token_accuracy[split])

    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch."""
        return self.outputs(batch)[0]

    @property
    def logs_perplexity(self) -> bool:
        """Whether the loss is a cross-entropy in nats per token: not that of a classification head."""
        overridden = type(self).loss is not OftModule.loss or type(self).outputs is not OftModule.outputs
        return not overridden and (self.objective == "next_token" or is_encoder_decoder(self.model))

    def _evaluate(self, split: str, batch: Any) -> None:
        loss, logits = self.outputs(batch)
        self.split_loss(split).update(loss, count_targets(batch))
        self.split_accuracy(split).update(logits, batch["labels"])

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics, those of generated samples included."""
        super().on_validation_epoch_end()
        self._generate("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics, those of generated samples included."""
        super().on_test_epoch_end()
        self._generate("test")

    def evaluation_metrics(self, loss: float, split: str) -> dict[str, float]:
        """Add the token accuracy."""
        return {
            **super().evaluation_metrics(loss, split),
            "token_accuracy": float(self.split_accuracy(split).compute()),
        }

    def reset_metrics(self, split: str) -> None:
        """Clear what a split has accumulated."""
        super().reset_metrics(split)
        self.split_accuracy(split).reset()
        self.generation.reset()

    @torch.no_grad()
    def _generate(self, split: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if not self.max_new_tokens or not hasattr(data, "generation_batches") or not hasattr(self.model, "generate"):
            return
        samples: list[tuple[str, str, str]] = []
        for batch in data.generation_batches(split):
            inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
            ids = self.model.generate(  # type: ignore[union-attr, operator]
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                eos_token_id=data.tokenizer.eos_token_id,
                pad_token_id=data.tokenizer.pad_token_id,
            )
            new = generated_tokens(self.model, ids, inputs["input_ids"].shape[1])
            answers = data.tokenizer.batch_decode(new, skip_special_tokens=True)
            prompts = data.tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
            self.generation.update(answers, batch["references"])
            samples += zip(prompts, answers, batch["references"], strict=True)
        if samples:
            self.log_dict({f"{split}_{name}": value for name, value in self.generation.compute().items()})
            self._log_samples(samples[: self.logged_samples], split)

    def _log_samples(self, samples: list[tuple[str, str, str]], split: str) -> None:
        if self.trainer.sanity_checking:
            return
        folder = run_folder(self.trainer)
        if not self.trainer.is_global_zero:
            return
        rows = (f"{prompt}\n>>> {answer}\n=== {reference}" for prompt, answer, reference in samples)
        text = "\n---\n".join([f"step {self.global_step}", *rows])
        for logger in self.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_text"):
                experiment.add_text(f"{split}_samples", f"```\n{text}\n```", self.global_step)
        with (folder / f"{split}_samples.txt").open("a", encoding="utf-8") as file:
            file.write(text + "\n")
