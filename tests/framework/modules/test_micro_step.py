"""The micro-step in every mode has the losses of the eager mode, across merges, accumulation and changing shapes."""

import copy
import functools
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import nn
from torch._dynamo import lookup_backend
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from orthotrain.distributed.strategy import ShardedStrategy
from orthotrain.errors import ConfigurationError
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


class Small(nn.Module):
    """A network that is compiled in seconds."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.lm_head = nn.Embedding(96, 16), nn.Linear(16, 32), nn.Linear(32, 96)

    def forward(self, input_ids):
        return self.lm_head(self.hidden(self.embed(input_ids)).tanh())


def small(compile):
    torch.manual_seed(0)
    return PoetModule(Small(), PoetLayers(block_size=8), merge_every=2, optimization=OPTIMIZATION, compile=compile)


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


def batches(count=14):
    """Batches of two rows; the last batch of an epoch has one row."""
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


@pytest.fixture
def graphs(monkeypatch):
    """Compile without a code generator; gives the operations of every compiled graph."""
    torch._dynamo.reset()
    counters.clear()
    compiled = []

    def noted(graph, inputs):
        compiled.append([str(node.target) for node in graph.graph.nodes])
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=noted))
    return compiled


@pytest.mark.parametrize("name", ["poet", "poet mem", "poet recomputed", "stepwise", "oft"])
def test_a_compiled_run_has_one_graph_and_the_losses_of_the_eager_one(name, graphs):
    build, settings = GRAPHED[name]
    rows = batches(12).dataset[:22]
    expected, expected_state = fit(build("none", **settings), data=DataLoader(rows, batch_size=2))
    losses, state = fit(build("default", **settings), data=DataLoader(rows, batch_size=2))
    # merges, folds, new permutations and another learning rate at each step compile nothing again
    assert len(graphs) == 1 and not counters["graph_break"]
    displacements = [target for target in graphs[0] if "cayley_neumann" in target]
    assert len(displacements) == {"poet": 1, "oft": 1}.get(name, len(displacements))
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    assert state.keys() == expected_state.keys()


def test_batches_of_another_length_are_compiled_for_every_length_once(graphs):
    expected, _ = fit(small("none"), steps=12)
    losses, _ = fit(small("default"), steps=12)
    assert len(graphs) == 2  # the graph of the first batch, and one for any number of rows
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_generated_code_computes_the_losses_of_the_eager_run(mode):
    torch._dynamo.reset()
    expected, _ = fit(small("none"), steps=3, val_check_interval=2)
    losses, _ = fit(small(mode), steps=3, val_check_interval=2)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


class OwnStep(PoetModule):
    def training_step(self, batch, batch_idx):
        return self.loss(batch)


class OwnCall(PoetModule):
    def loss(self, batch):
        return self.model(input_ids=batch["input_ids"]).logits.float().square().mean()


REFUSED = {
    "cuda-graph on a CPU": ("cuda-graph", {}, "compile=cuda-graph needs a CUDA device and the run is on cpu"),
    "cuda-graph with ddp": ("cuda-graph", {"strategy": "ddp", "devices": 1}, "compile=cuda-graph with DDPStrategy"),
    "own training step": ("default", {"kind": OwnStep}, "OwnStep.training_step computes its loss itself"),
    "own call": ("default", {"kind": OwnCall}, r"the loss of OwnCall calls its network as self.model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_mode_cannot_have_is_refused_by_name(name, graphs):
    mode, options, message = REFUSED[name]
    model = CausalLM({**SHAPE, "max_position_embeddings": 64})
    module = options.pop("kind", PoetModule)(model, PoetLayers(block_size=8), compile=mode)
    with pytest.raises(ConfigurationError, match=message):
        fit(module, **options)


@pytest.mark.parametrize(
    ("mode", "strategy", "message"),
    [
        ("reduce-overhead", ShardedStrategy(), "compile=reduce-overhead with ShardedStrategy: every gather"),
        ("cuda-graph", ShardedStrategy(), "compile=cuda-graph with ShardedStrategy: a captured backward"),
        (
            "default",
            DeepSpeedStrategy.__new__(DeepSpeedStrategy),
            "compile=default with DeepSpeedStrategy is not known",
        ),
        ("default", FSDPStrategy.__new__(FSDPStrategy), "compile=default with FSDPStrategy is not known"),
        ("none", FSDPStrategy.__new__(FSDPStrategy), None),
        ("default", ShardedStrategy(), None),
    ],
)
def test_strategies_that_a_mode_cannot_have(mode, strategy, message):
    step = MicroStep(mode)
    if message is None:
        step.check(strategy)
    else:
        with pytest.raises(ConfigurationError, match=message):
            step.check(strategy)


def test_dropout_in_layers_that_are_computed_again_cannot_be_captured():
    config = {**SHAPE, "max_position_embeddings": 64, "attention_dropout": 0.1}
    network = CausalLM(config, gradient_checkpointing=True)()
    with pytest.raises(
        ConfigurationError, match=r"gradient_checkpointing and attention_dropout=0.1.*attention_dropout to 0"
    ):
        MicroStep("cuda-graph").prepare(network)
    MicroStep("default").prepare(network)


def test_another_word_is_refused_and_a_copy_has_the_mode_alone():
    with pytest.raises(ConfigurationError, match="compile='graph': choose one of none, default, reduce-overhead"):
        poet("graph")
    module = poet("default")
    module.micro_step.ran = True
    for other in (pickle.loads(pickle.dumps(module.micro_step)), copy.deepcopy(module).micro_step):
        assert other.mode == "default" and not other.ran


def test_a_compiler_that_is_missing_is_one_line():
    torch._dynamo.reset()
    message = "compile=default: the network of PoetModule cannot be compiled .*/nonex"
    # not by monkeypatch: it would delete the option afterwards, and nothing compiles in this process any more
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent/g++")}),
        pytest.raises(ConfigurationError, match=message),
    ):
        fit(small("default"), steps=1)
