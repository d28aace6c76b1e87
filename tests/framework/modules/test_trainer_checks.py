"""Callbacks that would change weights behind a module are refused before data are prepared."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from orthotrain.errors import ConfigurationError
from orthotrain.modules import BaseModule, Optimization
from orthotrain.modules.trainer_checks import check_half_precision


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


def test_fp16_is_refused_only_where_the_optimizer_divides_by_zero():
    module = nn.Linear(2, 2).half()
    with pytest.raises(ConfigurationError, match="weight is trained in fp16, where the eps=1e-08 of AdamW is 0"):
        check_half_precision(module, [torch.optim.AdamW(module.parameters())])
    for fine in (torch.optim.AdamW(module.parameters(), eps=1e-6), torch.optim.SGD(module.parameters())):
        check_half_precision(module, [fine])
