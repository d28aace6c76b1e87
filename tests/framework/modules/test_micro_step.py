"""The micro-step in every mode: the losses of the eager one, across merges, accumulation and changing shapes."""

import copy
import pickle

import lightning as L
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from orthotrain.errors import ConfigurationError
from orthotrain.layers import mergeable_layers
from orthotrain.models import CausalLM
from orthotrain.modules import LoraLayers, LoraModule, OftLayers, OftModule, Optimization, PoetLayers, PoetModule
from orthotrain.modules.micro_step import MicroStep
from orthotrain.schedules import CosineWithWarmup

OPTIMIZATION = Optimization(lr=1e-2, rotation_lr=1e-2, scheduler=lambda o: CosineWithWarmup(o, warmup_steps=2))
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 96}


def poet(compile, stepwise=False, checkpointing=False, **layers):
    settings = PoetLayers(block_size=8, stepwise=stepwise, **layers)
    merging = {"merge_every": 1, "resample_every": 3} if stepwise else {"merge_every": 2}
    model = CausalLM({**SHAPE, "max_position_embeddings": 64}, gradient_checkpointing=checkpointing)
    return PoetModule(model, settings, **merging, optimization=OPTIMIZATION, compile=compile)


def oft(compile, **layers):
    model = CausalLM({**SHAPE, "max_position_embeddings": 64})
    return OftModule(model, OftLayers(block_size=8, **layers), OPTIMIZATION, max_new_tokens=0, compile=compile)


def lora(compile):
    model = CausalLM({**SHAPE, "max_position_embeddings": 64})
    return LoraModule(model, LoraLayers(rank=4), merge_every=2, optimization=OPTIMIZATION, compile=compile)


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def batches(count=14):
    """Batches of two rows, the last of an epoch of one."""
    generator = torch.Generator().manual_seed(3)
    tokens = (torch.randint(0, 96, (2 * count - 1, 1), generator=generator) + 7 * torch.arange(17)) % 96
    return DataLoader([{"input_ids": row[:-1], "labels": row[1:]} for row in tokens], batch_size=2)


def fit(module, steps=6, data=None, **options):
    torch.manual_seed(1)
    losses = Losses()
    given = {"accelerator": "cpu", "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, **options}
    trainer = L.Trainer(max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
                        enable_checkpointing=False, callbacks=[losses], **given)  # fmt: skip
    trainer.fit(module, data or batches(), batches(3))
    return losses.values, {name: value.clone() for name, value in module.state_dict().items()}


GRAPHED = {
    "poet": (poet, {}),
    "poet mem": (poet, {"activation_mode": "mem"}),
    "poet int8": (poet, {"storage": "int8", "group_size": 32, "trained_scale": True}),
    "poet recomputed": (poet, {"checkpointing": True}),
    "stepwise": (poet, {"stepwise": True}),
    "oft": (oft, {"block_dropout": 0.2}),
    "lora": (lora, {}),
}


@pytest.mark.parametrize("name", GRAPHED)
def test_a_replayed_run_has_the_bits_of_the_eager_one(name, played_graphs):
    build, settings = GRAPHED[name]
    expected_losses, expected = fit(build("none", **settings))
    losses, state = fit(build("cuda-graph", **settings))
    (recorder,) = played_graphs
    assert len(recorder.recordings) == 2 and recorder.replays >= 16
    assert losses == expected_losses
    assert state.keys() == expected.keys()
    for tensor in expected:
        assert torch.equal(state[tensor], expected[tensor]), tensor
