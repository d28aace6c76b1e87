"""The micro-step in every mode on a GPU has the losses of the eager mode, and no more waits or memory."""

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from orthotrain.models import CausalLM
from orthotrain.modules import OftLayers, OftModule, Optimization, PoetLayers, PoetModule
from orthotrain.modules.graph_replay import GraphedStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
OPTIMIZATION = Optimization(lr=1e-3, rotation_lr=1e-3)


def poet(compile, stepwise=False, checkpointing=False, **layers):
    settings = PoetLayers(block_size=32, stepwise=stepwise, **layers)
    merging = {"merge_every": 1, "resample_every": 3} if stepwise else {"merge_every": 3}
    model = CausalLM({**SHAPE, "vocab_size": 96, "max_position_embeddings": 64}, gradient_checkpointing=checkpointing)
    return PoetModule(model, settings, **merging, optimization=OPTIMIZATION, compile=compile)


def oft(compile, **layers):
    model = CausalLM({**SHAPE, "vocab_size": 96, "max_position_embeddings": 64})
    return OftModule(model, OftLayers(block_size=32, **layers), OPTIMIZATION, max_new_tokens=0, compile=compile)


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def fit(module, precision):
    torch.manual_seed(1)
    tokens = (torch.randint(0, 96, (39, 1), generator=torch.Generator().manual_seed(3)) + 7 * torch.arange(65)) % 96
    data = DataLoader([{"input_ids": row[:-1], "labels": row[1:]} for row in tokens], batch_size=2)
    losses = Losses()
    trainer = L.Trainer(max_steps=10, logger=False, enable_progress_bar=False, enable_model_summary=False, devices=1,
                        enable_checkpointing=False, callbacks=[losses], accelerator="cuda", precision=precision,
                        accumulate_grad_batches=2, gradient_clip_val=1.0, limit_val_batches=0)  # fmt: skip
    trainer.fit(module, data)
    return losses.values, module


CASES = {
    "poet": (poet, {}),
    "poet mem": (poet, {"activation_mode": "mem"}),
    "poet recomputed": (poet, {"checkpointing": True}),
    "poet int8": (poet, {"storage": "int8", "group_size": 32}),
    "stepwise": (poet, {"stepwise": True}),
    "oft": (oft, {"block_dropout": 0.2}),
}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", CASES)
def test_a_replayed_run_has_the_losses_of_the_eager_one(name, precision):
    build, settings = CASES[name]
    expected, _ = fit(build("none", **settings), precision)
    losses, module = fit(build("cuda-graph", **settings), precision)
    torch.testing.assert_close(losses, expected, rtol=1e-5 if precision == "32-true" else 1e-2, atol=0)
    assert isinstance(module.micro_step._graphed, GraphedStep) and module.micro_step._graphed.captures == 1


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("name", ["poet", "stepwise"])
def test_a_compiled_run_has_the_losses_of_the_eager_one(name, mode):
    build, settings = CASES[name]
    torch._dynamo.reset()
    expected, _ = fit(build("none", **settings), "32-true")
    losses, _ = fit(build(mode, **settings), "32-true")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
