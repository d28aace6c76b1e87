"""The part of a module that trains and evaluates a network with labels: its own loss, and the metrics of the task."""

import inspect
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torchmetrics import MeanSquaredError, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from orthotrain.errors import ConfigurationError
from orthotrain.metrics import count_targets
from orthotrain.models import ModelBuilder, PretrainedModel
from orthotrain.models.network_checks import check_positions
from orthotrain.modules.evaluation import EvaluatedModule

HEADS = {
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token_classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}
"""Task of a head -> transformers' table of the networks that have it."""


class LabeledModule(EvaluatedModule):
    """A LightningModule whose network computes the loss itself if the data module has labels (``LabeledData``).

    Beside the loss it then logs ``accuracy`` and ``f1_macro`` (the mean of the F1 scores of all classes), or, for a
    regression, ``mse``, ``pearson`` and ``spearman``: over all rows of a split and all ranks. For classes of words they
    count words. Override :meth:`labeled_outputs` for another loss.
    """

    def __init__(self) -> None:
        super().__init__()
        self.task_metrics = nn.ModuleDict()
        """Split -> the metrics of the task; empty without labels."""

    @property
    def labeled(self) -> bool:
        """Whether the data module of the run has labels."""
        return bool(getattr(self._data, "is_labeled", False))

    @property
    def _data(self) -> Any:
        return getattr(self._trainer, "datamodule", None)

    def labeled_outputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean loss of a batch with labels, and the logits ``(B, classes)`` or ``(B, T, classes)``."""
        network: Any = getattr(self, "model")  # noqa: B009 # a module of a subclass
        if "token_type_ids" in batch and "token_type_ids" not in inspect.signature(network.forward).parameters:
            batch = {name: value for name, value in batch.items() if name != "token_type_ids"}
        output = self(**batch)
        return output.loss, output.logits

    def expect_labels(self, builder: ModelBuilder | Callable[[], nn.Module]) -> None:
        """Let the builder make a head for the classes of the data, and note its options for the checkpoint.

        Raises:
            ConfigurationError: The builder has the head of another task, or options for other labels.
        """
        if not self.labeled or not isinstance(builder, PretrainedModel):
            return
        wanted = _head_of(self._data.task)
        if builder.task != wanted:
            raise ConfigurationError(
                f"task {builder.task!r} of PretrainedModel with task {self._data.task!r} of the data: set the model's "
                f"task to {wanted}"
            )
        options = self._data.label_options
        for name, value in options.items():
            if builder.options.get(name, value) != value:
                raise ConfigurationError(
                    f"options: {name}={builder.options[name]!r:.200}, and the data's labels need {value!r:.200}: leave "
                    f"{name} out"
                )
        builder.options |= options
        stored = (self.hparams.get("init_args") or {}).get("model")  # a run of the command line
        if isinstance(stored, dict) and str(stored.get("class_path")).endswith("PretrainedModel"):
            arguments = stored["init_args"]
            arguments["options"] = {**(arguments.get("options") or {}), **options}

    def check_labels(self, network: nn.Module) -> None:
        """Give the network's config the names of the classes, and prepare the metrics.

        Raises:
            ConfigurationError: The network has another head, another number of outputs, another padding token or too
                few positions.
        """
        if not self.labeled:
            return
        data, options, config = self._data, self._data.label_options, getattr(network, "config", None)
        if config is not None:
            _check_head(network, data.task, options["num_labels"])
            _check_padding(config, data.tokenizer.pad_token_id)
            for name, value in options.items():
                if name != "num_labels":  # the number of names
                    setattr(config, name, value)
        check_positions(data.limits, network)
        splits = {split: metrics_of(data.task, options["num_labels"]) for split in ("val", "test")}
        self.task_metrics = nn.ModuleDict(splits)

    def split_metrics(self, split: str) -> MetricCollection:
        """Return the metrics of the task for ``val`` or ``test``."""
        return cast(MetricCollection, self.task_metrics[split])

    def reset_metrics(self, split: str) -> None:
        """Clear what a split has accumulated."""
        super().reset_metrics(split)
        if self.task_metrics:
            self.split_metrics(split).reset()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch to the validation metrics."""
        if self.labeled:
            return self._evaluate_labels("val", batch)
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Add one batch to the test metrics."""
        if self.labeled:
            return self._evaluate_labels("test", batch)
        super().test_step(batch, batch_idx)

    def _evaluate_labels(self, split: str, batch: Any) -> None:
        loss, logits = self.labeled_outputs(batch)
        labels = batch["labels"]
        self.split_loss(split).update(loss, count_targets(batch))
        if labels.is_floating_point():
            self.split_metrics(split).update(logits.float().view(-1), labels.float())
        else:
            self.split_metrics(split).update(logits.float().flatten(0, -2), labels.flatten())

    def evaluation_metrics(self, loss: float, split: str) -> dict[str, float]:
        """Return the metrics to log for a split, from its mean loss."""
        if not self.labeled:
            return super().evaluation_metrics(loss, split)
        return {"loss": loss, **{name: float(value) for name, value in self.split_metrics(split).compute().items()}}


def metrics_of(task: str, classes: int) -> MetricCollection:
    """Return the metrics of a task, synchronized over ranks.

    Args:
        task: Task of the data module.
        classes: Number of classes.
    """
    if task == "regression":
        return MetricCollection({
            "mse": MeanSquaredError(), "pearson": PearsonCorrCoef(), "spearman": SpearmanCorrCoef(),
        })  # fmt: skip
    options: dict[str, Any] = {"num_classes": classes, "ignore_index": -100}
    return MetricCollection(
        {
            "accuracy": MulticlassAccuracy(average="micro", **options),
            "f1_macro": MulticlassF1Score(average="macro", **options),
        }
    )


def _head_of(task: str) -> str:
    return "token_classification" if task == "token_classification" else "sequence_classification"


def _check_head(network: nn.Module, task: str, classes: int) -> None:
    from transformers.models.auto import modeling_auto

    known = set(getattr(modeling_auto, HEADS[_head_of(task)]).values())
    others = {name for head in HEADS.values() for name in getattr(modeling_auto, head).values()}
    names = {cls.__name__ for cls in type(network).__mro__}
    is_other = not names & known and (names & others or hasattr(network, "get_output_embeddings"))
    if is_other:
        raise ConfigurationError(
            f"{type(network).__name__} has no head for task {task!r} of the data: take PretrainedModel with task: "
            f"{_head_of(task)}"
        )
    if network.config.num_labels != classes:  # type: ignore[union-attr]
        raise ConfigurationError(
            f"{type(network).__name__} has {network.config.num_labels} outputs, and the data has "  # type: ignore[union-attr]
            f"{classes} classes: set num_labels of the network to {classes}"
        )


def _check_padding(config: Any, pad_token: int) -> None:
    """Give the network the padding token of the data: it finds the end of a row, or its positions, by this token."""
    own = getattr(config, "pad_token_id", None)
    if own is None:
        config.pad_token_id = pad_token
    elif own != pad_token:
        raise ConfigurationError(
            f"the tokenizer pads with token {pad_token}, and the network takes token {own} for padding "
            "(pad_token_id): take the tokenizer of the network, or set pad_token_id in options of PretrainedModel"
        )
