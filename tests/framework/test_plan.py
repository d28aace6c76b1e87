"""The planner against what a small run really holds, and its speed on a large one."""

import time

import pytest
import torch

from orthotrain.models import CausalLM
from orthotrain.modules import PoetLayers, PoetModule
from orthotrain.plan import plan_run, saved_bytes


@pytest.mark.parametrize("mode", ["fast", "mem"])
def test_equals_a_measured_run(tiny_llama, mode):
    layers = PoetLayers(block_size=8, activation_mode=mode)
    plan = plan_run(PoetModule(CausalLM(tiny_llama), layers), batch_size=4, sequence_length=16)
    module = PoetModule(CausalLM(tiny_llama), layers)
    module.configure_model()
    tokens = torch.zeros(4, 16, dtype=torch.int64)
    batch = {"input_ids": tokens, "labels": tokens}
    optimizer = module.optimization.configure(module.model, 10)["optimizer"]
    module.loss(batch).backward()
    optimizer.step()
    trained = [p for p in module.parameters() if p.requires_grad]
    held = sum(p.nbytes for p in module.model.parameters()) + sum(b.nbytes for b in module.model.buffers())
    assert sum(plan[c].bytes for c in ("frozen", "trainable, rotations", "trainable, other")) == held
    assert plan["gradients"].bytes == sum(p.grad.nbytes for p in trained)
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values() if t.ndim)
    assert plan["optimizer state"].bytes == state
    assert plan["activations (estimate)"].bytes == pytest.approx(
        saved_bytes(module, lambda: module.loss(batch)), rel=0.1
    )


def test_mem_mode_plans_fewer_activations(tiny_llama):
    def activations(mode):
        module = PoetModule(CausalLM(tiny_llama), PoetLayers(block_size=8, activation_mode=mode))
        return plan_run(module, 4, 16)["activations (estimate)"].bytes

    assert activations("mem") < activations("fast")


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
