"""The gradient of an optimizer step is that of one batch with all its rows, however the rows are split."""

from collections import UserDict
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from orthotrain.callbacks import RunReport
from orthotrain.errors import ConfigurationError
from orthotrain.modules import BaseModule, OftLayers, OftModule, Optimization, PoetLayers, PoetModule

SGD = Optimization(lr=0.05, weight_decay=0.0, optimizer=torch.optim.SGD)
COUNTS = (9, 1, 0, 2, 12, 3, 5)
"""Targets of each row; the first window of three rows has ten, and one row has none."""


class Network(nn.Module):
    """A language model of one token of context, which names its head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(16, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)

    def forward(self, input_ids):
        return self.head(self.hidden(self.embedding(input_ids)).tanh())

    def get_output_embeddings(self):
        return self.head


class Gradients(L.Callback):
    """Gradients and losses of each optimizer step, before clipping."""

    def __init__(self):
        self.steps, self.losses = [], []
        self.report = RunReport(spectrum_layers=0)

    def on_train_batch_start(self, *args):
        self.report.on_train_batch_start(*args)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.report.on_train_batch_end(trainer, pl_module, *args)
        if len(self.steps) > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["train_loss"]))


class PlainMean(BaseModule):
    """Computes its loss in ``training_step`` by itself."""

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss


def rows(counts):
    ids = torch.randint(0, 16, (len(counts), 12), generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 16, ids.shape, generator=torch.Generator().manual_seed(1))
    for row, count in zip(labels, counts, strict=True):
        row[count:] = -100
    return [{"input_ids": row[None], "labels": to[None]} for row, to in zip(ids, labels, strict=True)]


def joined(batches):
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def gradients(module, batches, **options):
    torch.manual_seed(0)
    module, record = module(Network(), optimization=SGD), Gradients()
    options = {"max_epochs": 1, "precision": "32-true", "callbacks": [], **options}
    callbacks = [record, *options.pop("callbacks")]
    if options.get("plugins") == "scaler":  # 16-mixed, which Lightning has on a GPU only
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))]
    L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=callbacks,
        enable_model_summary=False, log_every_n_steps=1, **options,
    ).fit(module, DataLoader(batches, batch_size=None))  # fmt: skip
    return record


def assert_same(found, expected, tolerance=1e-5):
    assert len(found.steps) == len(expected.steps)
    for step, other in zip(found.steps, expected.steps, strict=True):
        assert step.keys() == other.keys()
        mine, theirs = (torch.cat([g.flatten() for g in gradient.values()]) for gradient in (step, other))
        assert (mine - theirs).norm() <= tolerance * theirs.norm()
    assert [loss for _, loss in found.report.curves["train_loss"]] == found.losses
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)


@pytest.mark.parametrize(
    ("module", "options", "tolerance"),
    [
        (partial(BaseModule, chunked_loss=True), {}, 1e-5),
        (partial(PoetModule, layers=PoetLayers(block_size=4, include=["hidden"], init="keep")), {}, 1e-5),
        (
            partial(PoetModule, layers=PoetLayers(block_size=4, include=["hidden"], init="keep"), stepwise=True),
            {"gradient_clip_val": 0.1},
            1e-5,
        ),
        (partial(OftModule, layers=OftLayers(block_size=4)), {"limit_train_batches": 7}, 1e-5),
        (BaseModule, {"precision": None, "plugins": "scaler", "gradient_clip_val": 0.1}, 2e-2),
    ],
)
def test_a_step_of_unequal_micro_batches_is_that_of_one_batch(module, options, tolerance):
    """Windows of three, three and one rows."""
    batches = rows(COUNTS)
    whole = [joined(batches[:3]), joined(batches[3:6]), batches[6]]
    found = gradients(module, batches, accumulate_grad_batches=3, **options)
    assert_same(found, gradients(module, whole, **{**options, "limit_train_batches": 1.0}), tolerance)


def test_windows_of_a_schedule_are_means_too():
    batches = rows(COUNTS[3:6])
    found = gradients(BaseModule, batches, max_epochs=2, callbacks=[GradientAccumulationScheduler({0: 1, 1: 2})])
    assert_same(found, gradients(BaseModule, [*batches, joined(batches[:2]), batches[2]]))


def test_equal_micro_batches_keep_the_bits_of_lightnings_mean():
    batches = rows((7,) * 6)
    plain, weighed = (gradients(module, batches, accumulate_grad_batches=3) for module in (PlainMean, BaseModule))
    for step, other in zip(weighed.steps, plain.steps, strict=True):
        assert all(torch.equal(step[name], other[name]) for name in other)


def test_a_training_step_of_ones_own_keeps_lightnings_mean():
    batches = rows((12, 1))
    found = gradients(PlainMean, batches, accumulate_grad_batches=2).steps
    each = [gradients(PlainMean, [batch]).steps[0] for batch in batches]
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, (each[0][name] + each[1][name]) / 2)


def test_a_loss_over_something_else_counts_every_batch_once():
    class Rows(BaseModule):
        def targets(self, batch):
            return None

    batches = rows((12, 1, 5))
    found = gradients(Rows, batches, accumulate_grad_batches=2).steps
    each = [gradients(Rows, [batch]).steps[0] for batch in batches]
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, (each[0][name] + each[1][name]) / 2)


class Skipping(BaseModule):
    """Has no loss for one of the micro-batches."""

    def training_step(self, batch, batch_idx):
        return None if batch_idx == self.skipped else super().training_step(batch, batch_idx)


@pytest.mark.parametrize("skipped", [1, 3])
def test_a_micro_batch_without_a_loss_does_not_count_wherever_it_stands(skipped):
    batches = rows((3, 8, 1, 5))
    module = type("SkippingOne", (Skipping,), {"skipped": skipped})
    found = gradients(module, batches, accumulate_grad_batches=4).steps
    expected = gradients(BaseModule, [joined([b for i, b in enumerate(batches) if i != skipped])]).steps
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, expected[0][name])


def test_a_window_without_targets_changes_nothing():
    first, second = gradients(BaseModule, rows((0, 0, 3, 4)), accumulate_grad_batches=2).steps
    assert not any(gradient.any() for gradient in first.values())
    assert all(gradient.isfinite().all() and gradient.any() for gradient in second.values())


def test_labels_in_any_mapping_count_and_so_do_overridden_targets_in_validation():
    class Answers(BaseModule):
        def loss(self, batch):
            renamed = {"input_ids": batch["input_ids"], "labels": batch["answers"]}
            return super().loss(renamed)

        def targets(self, batch):
            return batch["answers"]

    batches = rows(COUNTS)
    expected = gradients(BaseModule, batches, accumulate_grad_batches=3)
    assert_same(gradients(BaseModule, [UserDict(b) for b in batches], accumulate_grad_batches=3), expected)
    renamed = [
        {"input_ids": batch["input_ids"], "answers": batch["labels"]} for batch in batches if batch is not batches[2]
    ]
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    torch.manual_seed(0)
    module = Answers(Network(), optimization=SGD)
    losses = [
        trainer.validate(module, DataLoader(data, batch_size=None), verbose=False)[0]["val_loss"]
        for data in (renamed, [joined(renamed)])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("targets", [3, torch.ones(4, dtype=torch.bool)])
def test_a_mask_or_a_number_is_no_targets(targets):
    module = type("Masked", (BaseModule,), {"targets": lambda self, batch: targets})
    with pytest.raises(ConfigurationError, match="return the labels"):
        gradients(module, rows((3, 4)), accumulate_grad_batches=2)
