"""Lightning's Trainer on a played device: fit, validate, checkpoint and resume, as on the CPU up to rounding.

The results are not equal to the last bit: PyTorch sums norms in another order where a device has fused operations.
"""

from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

from orthotrain.callbacks import RunReport, SpectrumMonitor
from orthotrain.modules import Optimization, PoetLayers, PoetModule

OPTIMIZATION = Optimization(lr=0.01, optimizer=partial(torch.optim.AdamW, foreach=False))

MODULES = {
    "POET": partial(PoetModule, layers=PoetLayers(block_size=8), merge_every=4, max_generator_norm=0.01),
    "stepwise": partial(PoetModule, layers=PoetLayers(block_size=8, stepwise=True), merge_every=1, resample_every=2),
}


class Network(nn.Module):
    """A language model of operations that have one kernel each."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(96, 32), nn.Linear(32, 96)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32, bias=False)

    def forward(self, input_ids):
        hidden = self.embed_tokens(input_ids)
        return self.lm_head(hidden + self.down(torch.tanh(self.up(hidden))))


def fit(module, folder, steps, ckpt_path=None, **where):
    torch.manual_seed(0)
    module = module(Network, optimization=OPTIMIZATION)
    ids = torch.randint(0, 96, (16, 13), generator=torch.Generator().manual_seed(1))
    rows = DataLoader([{"input_ids": row[:-1], "labels": row[1:]} for row in ids], batch_size=4)
    callbacks = [
        ModelCheckpoint(folder, every_n_train_steps=2, save_last=True),
        RunReport(prompt=""),
        SpectrumMonitor(),
    ]
    trainer = L.Trainer(
        max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        log_every_n_steps=3, val_check_interval=3, callbacks=callbacks, accumulate_grad_batches=2, **where,
    )  # fmt: skip
    trainer.fit(module, rows, rows, ckpt_path=ckpt_path)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name != "tokens_per_second"}


@pytest.mark.parametrize("name", MODULES)
def test_a_run_there_is_the_run_on_the_cpu(played, tmp_path, name):
    here, there = tmp_path / "here", tmp_path / "there"
    logged = [fit(MODULES[name], here, 4, accelerator="cpu")]
    logged += [fit(MODULES[name], here, 6, here / "last.ckpt", accelerator="cpu")]

    def strategy():
        return SingleDeviceStrategy(played.DEVICE, played.PlayedAccelerator())

    with played.Mode():
        assert fit(MODULES[name], there, 4, strategy=strategy()) == pytest.approx(logged[0], rel=1e-5)
        assert fit(MODULES[name], there, 6, there / "last.ckpt", strategy=strategy()) == pytest.approx(
            logged[1], rel=1e-5
        )
    expected, found = (torch.load(folder / "last.ckpt", weights_only=True) for folder in (here, there))
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=1e-4, atol=2e-6)
    assert found["global_step"] == expected["global_step"] == 6
