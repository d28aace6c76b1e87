"""OFTv2 and QOFT finetuning (arXiv:2506.19847) as a LightningModule around any network."""

from collections.abc import Callable
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor, nn

from orthotrain.callbacks.limit_generators import GeneratorNorm, LimitGenerators
from orthotrain.callbacks.orthogonality_monitor import OrthogonalityMonitor
from orthotrain.callbacks.project_generators import ProjectGenerators
from orthotrain.checkpoints.run_folder import run_folder
from orthotrain.console.progress import shown
from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.files.atomic_writes import open_to_append
from orthotrain.metrics import GenerationMetrics, TokenAccuracy
from orthotrain.models import ModelBuilder
from orthotrain.models.network_checks import (
    check_attention,
    check_positions,
    generated_tokens,
    is_encoder_decoder,
    shifts_labels,
)
from orthotrain.modules.attached_callbacks import unless_given
from orthotrain.modules.base import BaseModule
from orthotrain.modules.micro_step import CompileMode
from orthotrain.modules.oft_layers import OftLayers
from orthotrain.modules.optimization import Optimization

Objective = Literal["next_token", "model"]


class OftModule(BaseModule):
    """Finetune any network with OFT: rotations of the inputs of its frozen, possibly quantized linear layers.

    Beside the metrics of :class:`BaseModule` it logs the accuracy of the predicted response tokens (or classes), and,
    where the data module offers ``generation_batches``, exact match and ROUGE-L of answers generated without sampling;
    a few answers are logged as text. Subclass it and override :meth:`outputs` for another objective.

    Args:
        model: The pretrained network, or a callable that builds it.
        layers: Which linear layers are rotated, and how.
        optimization: Learning rates, weight decay, optimizer and schedule.
        objective: ``next_token`` for a causal language model with labels already shifted, as the data modules of this
            package lay them out; ``model`` lets the network compute its own loss from the whole batch: classification
            heads of transformers, and encoder-decoders with ``InstructionData(layout="seq2seq")``.
        max_new_tokens: Tokens generated for each validation sample; 0 for no generation.
        logged_samples: Generated samples that are logged as text.
        max_generator_norm: Largest ``||Q||_2`` of a block of generators, kept by scaling the block after each step.
            ``auto`` keeps the singular values of every rotation within 1e-3 of 1: 0.537 for Cayley-Neumann of order 4,
            an angle of 56 degrees, and no limit for exact Cayley. None for no limit. See :class:`LimitGenerators`.
        chunked_loss: Whether the loss is computed without whole logits, see :class:`BaseModule`.
        compile: See :class:`BaseModule`.

    Raises:
        ConfigurationError: For an unknown objective; when the network is built, if a layer cannot be wrapped.
    """

    def __init__(
        self,
        model: ModelBuilder | nn.Module | Callable[[], nn.Module],
        layers: OftLayers = OftLayers(),
        optimization: Optimization = Optimization(),
        objective: Objective = "next_token",
        max_new_tokens: int = 48,
        logged_samples: int = 4,
        max_generator_norm: GeneratorNorm | None = "auto",
        chunked_loss: bool | None = None,
        compile: CompileMode = "none",
    ) -> None:
        super().__init__(model, optimization, chunked_loss=chunked_loss, compile=compile)
        check_choice("objective", objective, Objective)
        self.save_hyperparameters("objective", "max_new_tokens", "logged_samples", "max_generator_norm")
        self.layers = layers
        self.objective = objective
        self.max_new_tokens = max_new_tokens
        self.logged_samples = logged_samples
        # built here, so that a bad value is refused now and not when the trainer starts
        self.limiting = [] if max_generator_norm is None else [LimitGenerators(max_generator_norm)]
        self.wrapped_names: list[str] = []
        self.token_accuracy = nn.ModuleDict({split: TokenAccuracy() for split in ("val", "test")})
        self.generation = GenerationMetrics()

    def wrap(self, model: nn.Module) -> None:
        """Freeze the network and put rotations before the chosen layers.

        Raises:
            ConfigurationError: If the data lays its rows out for another kind of network, or a layer cannot be wrapped.
        """
        self._check_layout(model)
        self.wrapped_names = self.layers.apply_(model)

    def check_targets(self, model: nn.Module) -> None:
        """Refuse layers that cannot be rotated; see :class:`OftLayers`."""
        if type(self).wrap is OftModule.wrap:
            self.layers.choose(model)

    def _check_layout(self, model: nn.Module) -> None:
        data = getattr(self._trainer, "datamodule", None)
        if self.labeled:
            return
        layout = getattr(data, "layout", None)
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
        check_positions(getattr(data, "limits", ()), model)
        if data is not None and getattr(data, "packing", False):
            check_attention(model, data.limits[0])

    def configure_callbacks(self) -> list[L.Callback]:
        """Attach the monitor of orthogonality, the limit of the norms, and COFT's projection if there is a bound."""
        projection = [ProjectGenerators()] if self.layers.coft_eps is not None else []
        own = unless_given(self._trainer, [OrthogonalityMonitor(), *projection, *self.limiting])
        return [*super().configure_callbacks(), *own]

    def outputs(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """Return the mean loss of a batch and its logits, which line up with :meth:`targets`; None without logits."""
        if self.labeled:
            return self.labeled_outputs(batch)
        if self.objective == "model":
            output = self(**batch)
            logits = getattr(output, "logits", None)
            return output.loss, logits[:, :-1] if shifts_labels(self.model) and logits is not None else logits
        if is_encoder_decoder(self.model):
            raise ConfigurationError(
                f"objective='next_token': {type(self.model).__name__} predicts labels that are not its inputs shifted; "
                "set objective to model"
            )
        return self.next_token_outputs(batch)

    def targets(self, batch: Any) -> Tensor | None:
        """Return the labels that the loss of a batch counts, or None; a causal LM's own loss skips the first label."""
        labels = super().targets(batch)
        if labels is None or self.objective != "model" or not shifts_labels(self.model):
            return labels
        return labels[:, 1:]

    def split_accuracy(self, split: str) -> TokenAccuracy:
        """Return the metric that accumulates the token accuracy of ``val`` or ``test``."""
        return cast(TokenAccuracy, self.token_accuracy[split])

    def loss(self, batch: Any) -> Tensor:
        """Return the mean loss of a batch."""
        if self.has_next_token_loss:
            return self.next_token_loss(batch)
        return self.outputs(batch)[0]

    @property
    def has_next_token_loss(self) -> bool:
        """Whether the loss is :meth:`next_token_loss`, and not the loss of a subclass or of the network."""
        causal = self.objective == "next_token" and not is_encoder_decoder(self.model)
        return self._has_own_loss and causal and not self.labeled

    @property
    def logs_perplexity(self) -> bool:
        """Whether the loss is a cross-entropy in nats per token; the loss of a classification head is not."""
        predicts_tokens = self.objective == "next_token" or is_encoder_decoder(self.model)
        return self._has_own_loss and predicts_tokens and not self.labeled

    @property
    def _has_own_loss(self) -> bool:
        return type(self).loss is OftModule.loss and type(self).outputs is OftModule.outputs

    def _evaluate(self, split: str, batch: Any) -> None:
        loss, logits = self.outputs(batch)
        labels = self.targets(batch)
        self._count(split, loss, labels)
        if logits is None or labels is None:
            return
        # classes have an accuracy; numbers to predict (regression, several labels at once) have none
        if not labels.is_floating_point() and labels.shape == logits.shape[:-1]:
            self.split_accuracy(split).update(logits, labels)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics and the metrics of generated samples."""
        super().on_validation_epoch_end()
        self._generate("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics and the metrics of generated samples."""
        super().on_test_epoch_end()
        self._generate("test")

    def evaluation_metrics(self, loss: float, split: str) -> dict[str, float]:
        """Add the token accuracy, where there are classes to count."""
        metrics, accuracy = super().evaluation_metrics(loss, split), self.split_accuracy(split)
        return {**metrics, "token_accuracy": float(accuracy.compute())} if accuracy.update_called else metrics

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
        with shown(data.generation_batches(split), "generating", "batches") as batches:
            samples = [sample for batch in batches for sample in self._answered(batch, data.tokenizer)]
        if samples:
            self.log_dict({f"{split}_{name}": value for name, value in self.generation.compute().items()})
            self._log_samples(samples[: self.logged_samples], split)

    def _answered(self, batch: dict[str, Any], tokenizer: Any) -> list[tuple[str, str, str]]:
        """Generate answers to the prompts of a batch; return prompts, answers and references as text."""
        inputs = {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}
        ids = self.model.generate(  # type: ignore[union-attr, operator]
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = generated_tokens(self.model, ids, inputs["input_ids"].shape[1])
        answers = tokenizer.batch_decode(new, skip_special_tokens=True)
        prompts = tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        self.generation.update(answers, batch["references"])
        return list(zip(prompts, answers, batch["references"], strict=True))

    def _log_samples(self, samples: list[tuple[str, str, str]], split: str) -> None:
        if self.trainer.sanity_checking:
            return
        folder = run_folder(self.trainer)
        if folder is None or not self.trainer.is_global_zero:
            return
        rows = (f"{prompt}\n>>> {answer}\n=== {reference}" for prompt, answer, reference in samples)
        text = "\n---\n".join([f"step {self.global_step}", *rows])
        for logger in self.loggers:
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_text"):
                experiment.add_text(f"{split}_samples", f"```\n{text}\n```", self.global_step)
        with open_to_append(folder / f"{split}_samples.txt") as file:
            file.write(text + "\n")
