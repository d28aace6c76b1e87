"""Callbacks that would change weights behind a module are refused before data are prepared."""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, LearningRateFinder
from torch import nn
from torch.utils.data import DataLoader

from orthotrain.errors import ConfigurationError
from orthotrain.modules import BaseModule, LoraLayers, LoraModule, Optimization
from orthotrain.modules.trainer_checks import check_half_precision
from orthotrain.schedules import CosineWithWarmup


class Regression(BaseModule):
    def loss(self, batch):
        return self(batch).square().mean()


def test_weights_of_a_plain_module_are_averaged_and_saved(tmp_path):
    """Each average is half of the weights before and half of those after the step."""
    torch.manual_seed(0)
    module, seen = Regression(nn.Linear(4, 1, bias=False), Optimization(lr=0.1)), []

    class Seen(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(pl_module.model.weight.detach().clone())

    averaging = EMAWeightAveraging(decay=0.5)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, callbacks=[averaging, Seen()],
                        default_root_dir=tmp_path)  # fmt: skip
    trainer.fit(module, DataLoader(torch.randn(12, 4), batch_size=4))
    average = seen[0]
    for weight in seen[1:]:
        average = 0.5 * average + 0.5 * weight
    torch.testing.assert_close(module.model.weight.detach(), average)


MERGING = partial(LoraModule, layers=LoraLayers(rank=2), merge_every=8)


def search(folder, optimization, module=BaseModule):
    module = module(nn.Sequential(nn.Linear(4, 4)), optimization=optimization)
    module.loss = lambda batch: module(batch).square().mean()
    finder = LearningRateFinder(max_lr=0.1, num_training_steps=16)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[finder],
                        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder)  # fmt: skip
    trainer.fit(module, DataLoader(torch.randn(64, 4), batch_size=4))
    return module, trainer


def test_a_found_rate_is_that_of_the_run(tmp_path):
    module, trainer = search(tmp_path, Optimization(lr=1.0))
    (group, *_), rate = trainer.optimizers[0].param_groups, module.learning_rate
    assert rate == module.optimization.lr == group["lr"] < 1.0


@pytest.mark.parametrize(
    ("optimization", "module", "message"),
    [
        (
            Optimization(lr_overrides={"*bias": 0.1}),
            BaseModule,
            "this run has .0.001, 0.1.: search with optimization.lr alone",
        ),
        (Optimization(scheduler=CosineWithWarmup), BaseModule, "search without optimization.scheduler"),
        (Optimization(), MERGING, "its 16 steps are taken without the merges every 8 steps"),
    ],
)
def test_a_rate_that_the_run_would_not_use_is_not_searched(tmp_path, optimization, module, message):
    with pytest.raises(ConfigurationError, match=f"LearningRateFinder: .*{message}"):
        search(tmp_path, optimization, module)


def test_fp16_is_refused_only_where_the_optimizer_divides_by_zero():
    module = nn.Linear(2, 2).half()
    with pytest.raises(ConfigurationError, match="weight is trained in fp16, where the eps=1e-08 of AdamW is 0"):
        check_half_precision(module, [torch.optim.AdamW(module.parameters())])
    for fine in (torch.optim.AdamW(module.parameters(), eps=1e-6), torch.optim.SGD(module.parameters())):
        check_half_precision(module, [fine])
