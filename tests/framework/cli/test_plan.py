"""The planner against what a small run really holds, and its speed on a large one."""

import time
from functools import partial

import pytest
import torch

from orthotrain.cli.main import main
from orthotrain.cli.optimizer_bytes import state_tensors
from orthotrain.cli.plan import CARDS, GIB, Entry, Plan, plan_run
from orthotrain.models import CausalLM
from orthotrain.modules import BaseModule, OftLayers, OftModule, Optimization, PoetLayers, PoetModule, chunked_loss
from orthotrain.optimizers import GaLore


def saved_in_graph(loss, module):
    """Return the bytes of the storages that the nodes of a graph hold, without those of the module."""
    owned = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    held, nodes, seen = {}, [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for tensor in (*values, *getattr(node, "saved_tensors", ())):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in owned:
                held[tensor.untyped_storage()._cdata] = tensor  # the tensor keeps its address from being used again
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def check_against_a_run(build, exact=True):
    """Compare a plan with what a real step of the same module leaves."""
    plan = plan_run(build(), batch_size=4, sequence_length=16)
    module = build()
    module.configure_model()
    tokens = torch.zeros(4, 16, dtype=torch.int64)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    optimizer = module.optimization.configure(module.model, 10)["optimizer"]
    module.loss(batch).backward()
    optimizer.step()
    trained = [p for p in module.parameters() if p.requires_grad]
    storages = {t.data_ptr(): t for t in (*module.model.parameters(), *module.model.buffers())}.values()
    close = pytest.approx if not exact else lambda value, rel: value
    parts = [plan[c] for c in ("frozen", "trainable, rotations", "trainable, other")]
    assert sum(part.bytes for part in parts) == close(sum(t.nbytes for t in storages), rel=0.1)
    assert not exact or sum(part.count for part in parts) == sum(t.numel() for t in storages)
    assert plan["gradients"].bytes == sum(p.grad.nbytes for p in trained)
    state = sum(tensor.nbytes for tensor in state_tensors(optimizer))
    assert state > 0 and plan["optimizer state"].bytes == close(state, rel=0.1)
    saved, classes = saved_in_graph(module.loss(batch), module), module.model.config.vocab_size
    # whole logits: their log-softmax is saved, and is one of the three fp32 copies that the loss holds
    assert plan["loss (estimate)"].bytes == 3 * 4 * tokens.numel() * classes
    by_loss = 4 * tokens.numel() * classes + tokens.nbytes + 4  # log-softmax, labels, and their number
    assert plan["activations (estimate)"].bytes == saved - by_loss


METHODS = {
    "AdamW": BaseModule,
    "POET": partial(PoetModule, layers=PoetLayers(block_size=8)),
    "step-wise": partial(PoetModule, layers=PoetLayers(block_size=8), stepwise=True),
    "OFT": partial(OftModule, layers=OftLayers(block_size=8)),
}


@pytest.mark.parametrize("tied", [False, True], ids=["two matrices", "tied"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_a_measured_run(tiny_llama, method, tied):
    check_against_a_run(lambda: METHODS[method](CausalLM({**tiny_llama, "tie_word_embeddings": tied})))


@pytest.mark.parametrize("options", [{"storage": "int8", "group_size": 16}, {"storage": "nf4"}], ids=["int8", "nf4"])
def test_a_quantised_run_is_planned_within_a_tenth(tiny_llama, options):
    layers = PoetLayers(block_size=8, **options)
    check_against_a_run(lambda: PoetModule(CausalLM(tiny_llama), layers), exact=False)


WIDE = {"hidden_size": 128, "intermediate_size": 192}
HIDDEN = "*layers*proj*"


@pytest.mark.parametrize("kind", ["8-bit Adam", "GaLore", "Muon"])
def test_optimizers_with_a_state_of_their_own_are_planned_within_a_tenth(tiny_llama, kind):
    """Norms and small matrices keep fp32 in 8-bit Adam; GaLore's state has the rank, and a projector."""
    if kind == "8-bit Adam":
        import bitsandbytes

        recipe = Optimization(optimizer=bitsandbytes.optim.AdamW8bit)
        check_against_a_run(lambda: PoetModule(CausalLM({**tiny_llama, **WIDE}), PoetLayers(block_size=64),
                                               optimization=recipe), exact=False)  # fmt: skip
        return
    if kind == "GaLore":
        pytest.importorskip("galore_torch")
    build = partial(GaLore, rank=8) if kind == "GaLore" else torch.optim.Muon
    recipe = Optimization(optimizer_overrides={HIDDEN: build})
    check_against_a_run(lambda: BaseModule(CausalLM({**tiny_llama, **WIDE}), recipe), exact=False)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_mixture_of_experts_is_planned_in_every_precision(tiny_llama, precision):
    sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    module = PoetModule(CausalLM({**tiny_llama, **sizes}, model_type="qwen3_moe"), PoetLayers(block_size=8))
    plan = plan_run(module, 2, 16, precision)
    # each token is read by two experts
    assert plan["activations (estimate)"].bytes > 2 * 2 * 16 * tiny_llama["hidden_size"] * 2


def test_mem_mode_keeps_one_activation_less_of_each_layer(tiny_llama):
    def activations(mode):
        module = PoetModule(CausalLM(tiny_llama), PoetLayers(block_size=8, activation_mode=mode))
        return plan_run(module, 4, 16)["activations (estimate)"].bytes

    outputs = 2 * (5 * 32 + 2 * 48)
    assert activations("fast") - activations("mem") == 4 * 4 * 16 * outputs


def test_an_8b_model_is_planned_in_seconds():
    config = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    start = time.perf_counter()
    plan = plan_run(PoetModule(CausalLM(config), PoetLayers(block_size=256)), 1, 1024, "bf16-true")
    assert time.perf_counter() - start < 60
    frozen = plan["frozen"]
    linears = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert linears <= frozen.count < 1.001 * linears
    assert plan["trainable, other"].count == 2 * 128256 * 4096 + 65 * 4096
    blocks = 32 * (2 * 32 + 2 * (16 + 4) + 3 * (16 + 56))
    assert plan["trainable, rotations"].count == blocks * 256 * 255 // 2
    whole = plan_run(PoetModule(CausalLM(config), PoetLayers(block_size=256), chunked_loss=False), 1, 1024, "bf16-true")
    assert whole.total_bytes - plan.total_bytes >= 2 * 4 * 1024 * 128256  # two fp32 copies of the logits
    assert plan["activations (estimate)"] == whole["activations (estimate)"]


def test_a_loss_of_another_kind_is_part_of_the_activations(tiny_llama):
    class Squares(BaseModule):
        def loss(self, batch):
            return self(batch["input_ids"]).logits.square().mean()

    plan = plan_run(Squares(CausalLM(tiny_llama)), 4, 16)
    assert plan["loss (estimate)"].bytes == 0
    logits, network = 4 * 4 * 16 * 96, plan_run(BaseModule(CausalLM(tiny_llama)), 4, 16)["activations (estimate)"]
    assert plan["activations (estimate)"].bytes == network.bytes + logits


def test_a_network_that_changes_its_logits_is_planned_with_whole_ones(tiny_llama, monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * 96 * 8)
    plans = [plan_run(BaseModule(CausalLM({**tiny_llama, **more}, kind)), 4, 16)["loss (estimate)"].bytes
             for kind, more in (("llama", {}), ("granite", {"logits_scaling": 2.0}))]  # fmt: skip
    assert plans == [8 * 96 * 4, 3 * 4 * 64 * 96]


def test_data_whose_batches_have_no_known_shape(capsys):
    data = "lightning.pytorch.demos.boring_classes.BoringDataModule"
    with pytest.raises(SystemExit) as stop:
        main(["plan", "-c", "pretrain/quickstart.yaml", "--data", data])
    assert stop.value.code == 2
    assert (
        "BoringDataModule has no batch_size and sequence_length (or max_length), from which" in capsys.readouterr().err
    )


def plan_of_1_3b(module_of):
    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 24, "intermediate_size": 5376}
    return plan_run(module_of(CausalLM({**sizes, "vocab_size": 32000})), 1, 8)


def test_a_step_of_the_1_3b_model_sends_a_fifth_of_adamws_gradients():
    hidden, ffn, layers, vocab = 2048, 5376, 24, 32000
    poet = plan_of_1_3b(lambda network: PoetModule(network, PoetLayers(block_size=256)))
    adamw = plan_of_1_3b(BaseModule)
    direct = 2 * vocab * hidden + (2 * layers + 1) * hidden
    matrices = layers * (4 * hidden * hidden + 3 * hidden * ffn)
    blocks = sum(m // 256 + n // 256 for m, n in [(hidden, hidden)] * 4 + [(hidden, ffn)] * 3)
    generators = layers * blocks * 256 * 255 // 2
    assert adamw["gradients"].bytes == 4 * (matrices + direct)
    assert poet["gradients"].bytes == 4 * (generators + direct)
    assert poet["gradients"].bytes / adamw["gradients"].bytes == pytest.approx(0.1881, abs=1e-4)
    assert generators / matrices == pytest.approx(0.0989, abs=1e-4)  # without embedding, head and norms
    assert poet.all_reduce_bytes(8) == 2 * 7 / 8 * poet["gradients"].bytes
    assert f"each device sends a step: {4 * (generators + direct) / 2**30:.3f} GiB of 2, " in poet.table()


def test_the_table_says_which_cards_fit_and_what_adamw_takes():
    poet, adamw = (Plan((Entry("frozen", 0, int(size * GIB)), Entry("gradients", 0, 0)), "") for size in (22.5, 79.5))
    text = poet.table(adamw)
    assert CARDS == (16, 24, 48, 80) and "planned to fit on       24, 48, 80 GB; AdamW: no card of 80 GB\n" in text
    assert "all trained by AdamW" in text and "79.500\n" in text
    assert "AdamW" not in poet.table()
