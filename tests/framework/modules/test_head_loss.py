"""The loss that a head computes instead of logits: for which networks, its values, and the line in the summary."""

import random

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from orthotrain.errors import ConfigurationError
from orthotrain.layers import LoraLinear, OftLinear, PoetLinear
from orthotrain.models import CausalLM
from orthotrain.modules import BaseModule, OftLayers, OftModule, PoetLayers, PoetModule, chunked_loss

VOCABULARY, ROWS = 96, 8
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
PHI = {"num_key_value_heads": 2, "num_hidden_layers": 1}
GEMMA = {"head_dim": 16, "num_key_value_heads": 2, "num_hidden_layers": 1}
CHUNKS = f"by chunks of {ROWS} rows of logits"


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * VOCABULARY * ROWS)


def batch(rows=3, length=16, **more):
    draw = torch.Generator().manual_seed(3)
    tokens, labels = (torch.randint(VOCABULARY, (rows, length), generator=draw) for _ in range(2))
    labels[0, : min(6, length - 1)] = -100
    return {"input_ids": tokens, "labels": labels, **more}


def step(module, given, precision=None):
    """Return the loss of a batch and the gradients, by name."""
    module.configure_model()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        loss = module.loss(given)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def compare(build, given, said, precision=None, tolerance=1e-5):
    """Compare a module's loss and gradients with those from whole logits."""
    results = []
    for chunked in (None, False):
        torch.manual_seed(0)
        module = build(chunked)
        results.append(step(module, given, precision))
        assert chunked is False or module.loss_described == said
    (loss, gradients), (expected, wanted) = results
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).norm() <= tolerance * gradient.norm(), name
    return results


def build_of(config, kind="llama", make=BaseModule, **options):
    return lambda chunked: make(CausalLM(config, kind), **options, chunked_loss=chunked)


UNTOUCHED = {
    "llama": ({}, "llama"),
    "tied": ({"tie_word_embeddings": True}, "llama"),
    "gpt2, tied": (GPT2, "gpt2"),
    "phi, a bias": (PHI, "phi"),
    "recomputed": ({"num_hidden_layers": 1}, "llama"),
}


@pytest.mark.parametrize("precision", [None, "bf16-mixed"])
@pytest.mark.parametrize("name", UNTOUCHED)
def test_networks_that_return_what_their_head_computes(tiny_llama, name, precision):
    config, kind = UNTOUCHED[name]
    config = config if kind == "gpt2" else {**tiny_llama, **config}

    def build(chunked):
        return BaseModule(CausalLM(config, kind, name == "recomputed"), chunked_loss=chunked)

    compare(build, batch(), CHUNKS, precision, 1e-5 if precision is None else 1e-2)


@pytest.mark.parametrize(
    ("kind", "more"), [("gemma2", GEMMA), ("granite", {"logits_scaling": 3.0}), ("cohere", {"num_hidden_layers": 1})]
)
def test_networks_that_change_their_logits_keep_whole_ones(tiny_llama, kind, more):
    config = {**tiny_llama, **more}
    name = type(CausalLM(config, kind)()).__name__
    said = f"{name} does not return the output of its head unchanged"
    results = compare(build_of(config, kind), batch(), f"with whole logits ({said})", tolerance=0.0)
    assert torch.equal(results[0][0], results[1][0])
    module = BaseModule(CausalLM(config, kind), chunked_loss=True)
    module.configure_model()
    with pytest.raises(ConfigurationError, match=f"chunked_loss=True: {said}; leave chunked_loss out, or set it"):
        module.loss(batch())


class Network(nn.Module):
    """A custom language model that changes the output of its head."""

    def __init__(self, change):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(16, VOCABULARY)
        self.change = change

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        return self.change(self, self.dropout(self.embedding(input_ids)))


CHANGES = {
    "in place": lambda net, x: net.head(x).mul_(2.0),
    "a part": lambda net, x: net.head(x)[..., : VOCABULARY - 1],
    "twice": lambda net, x: (net.head(x), net.head(2 * x))[1],
    "the weight alone": lambda net, x: nn.functional.linear(x, net.head.weight),
    "another": lambda net, x: net.head(x) * 1.0,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_a_change_of_any_kind_is_noticed(name, inference):
    given = batch()
    given["labels"] = given["labels"].clamp(max=VOCABULARY - 2)
    expected = BaseModule(Network(CHANGES[name]), chunked_loss=False)
    module = BaseModule(expected.model)
    with torch.inference_mode(inference):
        losses = []
        for each in (module, expected):
            each.configure_model()
            torch.manual_seed(1)
            losses.append(each.loss(given))
    assert torch.equal(*losses) and "does not return the output" in module.loss_described


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: net.head(x) if net.training else net.head(x) * 2.0,
        lambda net, x: net.head(x).mul_(0.5) if net.training else net.head(x),
    ],
    ids=["evaluation", "training, in place"],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_network_that_differs_in_training_has_whole_logits_there(forward, first):
    losses = []
    for chunked in (None, False):
        torch.manual_seed(0)
        module = BaseModule(Network(forward), chunked_loss=chunked)
        module.configure_model()
        losses.append([module.train(training).loss(batch()).detach() for training in (first, not first)])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)


def test_a_look_leaves_buffers_and_all_generators_as_they_were():
    class Counting(Network):
        def __init__(self):
            super().__init__(lambda net, x: net.head(x))
            self.norm = nn.BatchNorm1d(16)

        def forward(self, input_ids):
            random.random()
            np.random.rand()  # noqa: NPY002
            return self.head(self.norm(self.embedding(input_ids).flatten(0, 1)).view(*input_ids.shape, -1))

    found = []
    for chunked in (None, False):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - the global one is what others draw from
        module = BaseModule(Counting(), chunked_loss=chunked)
        module.configure_model()
        module.loss(batch())
        drawn = random.random(), np.random.rand()  # noqa: NPY002
        found.append([*map(torch.as_tensor, (*module.model.norm.state_dict().values(), *drawn))])
        assert (module.loss_described == CHUNKS) == (chunked is None)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_batch_that_fits_into_one_chunk_is_run_once():
    calls = []
    module = BaseModule(Network(lambda net, x: calls.append(1) or net.head(x)))
    module.configure_model()
    module.loss(batch(rows=1, length=ROWS))
    assert calls == [1]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_network_that_changes_a_later_batch_is_refused(in_place):
    seen = []

    def forward(net, x):
        seen.append(1)
        logits = net.head(x)
        if len(seen) <= 2:  # the check and the first batch
            return logits
        return logits.mul_(2.0) if in_place else logits * 2.0

    module = BaseModule(Network(forward))
    module.configure_model()
    module.loss(batch())
    with pytest.raises(
        ConfigurationError, match="Network returned .* changes the output for a later batch: set chunked_loss"
    ):
        module.loss(batch())


@pytest.mark.parametrize("inference", [False, True])
def test_looking_at_the_first_batch_draws_nothing(inference):
    """Dropout and the generator's state are the same as without the check."""
    network = Network(lambda net, x: net.head(x))
    found = []
    for chunked in (None, False):
        module = BaseModule(network, chunked_loss=chunked)
        module.configure_model()
        torch.manual_seed(1)
        with torch.inference_mode(inference):
            found.append((module.loss(batch()), torch.rand(1)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=0)


HEADS = {
    "PoetLinear": lambda head: PoetLinear.from_linear(head, 8),
    "OftLinear": lambda head: OftLinear.from_linear(head, 8, storage="nf4"),
    "LoraLinear": lambda head: LoraLinear.from_linear(head, 2),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_that_is_no_plain_linear_layer_keeps_whole_logits(kind, randomize):
    network = Network(lambda net, x: net.head(x))
    network.head = HEADS[kind](network.head)
    randomize(network)
    said = f"the output head of Network is a {kind}, and not a plain nn.Linear"
    compare(lambda chunked: BaseModule(network.zero_grad() or network, chunked_loss=chunked), batch(),
            f"with whole logits ({said})")  # fmt: skip
    with pytest.raises(ConfigurationError, match=f"chunked_loss=True: {said}"):
        BaseModule(network, chunked_loss=True).configure_model()


def test_a_network_without_a_named_head():
    network = nn.Sequential(nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY))
    with pytest.raises(ConfigurationError, match="Sequential does not name its output head"):
        BaseModule(network, chunked_loss=True).configure_model()


def test_a_batch_that_fits_into_one_chunk_has_the_bits_of_whole_logits(tiny_llama):
    said = "with whole logits (a batch fits into one chunk)"
    small = batch(1, ROWS)
    results = compare(build_of(tiny_llama), small, said, tolerance=0.0)
    assert torch.equal(results[0][0], results[1][0])
    module = BaseModule(CausalLM(tiny_llama), chunked_loss=True)
    step(module, small)
    assert module.loss_described == CHUNKS


@pytest.mark.parametrize("how", ["of the module", "in place", "of the network"])
def test_a_compiled_network_has_whole_logits(tiny_llama, how):
    module = BaseModule(CausalLM({**tiny_llama, "num_hidden_layers": 1}), chunked_loss=True)
    module.configure_model()
    if how == "of the module":
        module.micro_step.mode = "reduce-overhead"
    elif how == "in place":
        module.model.compile(backend="eager")
    else:
        module.model = torch.compile(module.model, backend="eager")
    assert module.loss(batch()).isfinite() and module.head_loss.rows is None
    why = "compile is reduce-overhead" if how == "of the module" else "torch.compile is used"
    assert module.loss_described == f"with whole logits ({why})"


def test_poet_and_oft_with_masked_labels_and_packed_rows(tiny_llama):
    positions = torch.cat([torch.arange(10), torch.arange(6)]).expand(3, 16)
    together = torch.block_diag(torch.ones(10, 10), torch.ones(6, 6)).tril().bool()
    packed = batch(position_ids=positions, attention_mask=together.expand(3, 1, 16, 16))
    compare(build_of(tiny_llama, make=OftModule, layers=OftLayers(8)), packed, CHUNKS)
    compare(build_of(tiny_llama, make=PoetModule, layers=PoetLayers(block_size=8)), packed, CHUNKS)


def test_a_loss_of_ones_own_stays(tiny_llama):
    class Outputs(OftModule):
        def outputs(self, batch):
            loss, logits = self.next_token_outputs(batch)
            return 2 * loss, logits

    class Logits(BaseModule):
        def next_token_outputs(self, batch):
            loss, logits = super().next_token_outputs(batch)
            return loss + logits.square().mean(), logits

    for module in (Outputs(CausalLM(tiny_llama), OftLayers(8)), Logits(CausalLM(tiny_llama))):
        step(module, batch())
        assert module.head_loss.rows is None


def test_a_run_with_its_check_of_the_validation(tiny_llama, tmp_path):
    """The check runs first, in inference mode; then training with accumulated gradients."""
    losses = {}
    for chunked in (None, False):
        L.seed_everything(0, verbose=False)
        module = OftModule(CausalLM(tiny_llama), OftLayers(8), chunked_loss=chunked)
        trainer = L.Trainer(
            accelerator="cpu", max_steps=3, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=1,
        )  # fmt: skip
        rows = [{name: tensor[0] for name, tensor in batch(1).items()}] * 12
        trainer.fit(module, DataLoader(rows, batch_size=2), DataLoader(rows, batch_size=2))
        losses[chunked] = [float(trainer.callback_metrics[name]) for name in ("train_loss", "val_loss")]
    assert losses[None] == pytest.approx(losses[False], rel=1e-5)
    assert module.has_next_token_loss
