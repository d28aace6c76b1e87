"""OFT against PEFT's OFT and LoRA: forward and backward of a Llama, one process, interleaved, medians.

    .venv/bin/python -P tests/benchmarks/oft.py [--rounds 15] [--threads 2]

Llama of hidden 256 x 8 layers, batch 4 x 256, all seven linears, b = 32, LoRA r = 16. Printed are milliseconds, the
overhead over the frozen base as a share of PEFT's OFT overhead, and peak memory of the saved activations; the same goes
to tests/benchmarks/results/oft.json.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from orthotrain.layers.displacement_pool import DisplacementPool
from orthotrain.modules import OftLayers
from orthotrain.plan import saved_bytes

CONFIG = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 8, "num_attention_heads": 4}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def variants(dtype: torch.dtype) -> dict[str, nn.Module]:
    """Build the same network five times."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **CONFIG)).to(dtype)
    base.requires_grad_(False)
    networks = {"frozen base": copy.deepcopy(base)}
    networks["orthotrain OFT"] = copy.deepcopy(base)
    OftLayers(block_size=32).apply_(networks["orthotrain OFT"])
    DisplacementPool(networks["orthotrain OFT"])
    oft = peft.OFTConfig(oft_block_size=32, target_modules=LINEARS, use_cayley_neumann=True, num_cayley_neumann_terms=6)
    networks["PEFT OFT"] = peft.get_peft_model(copy.deepcopy(base), oft)
    lora = peft.LoraConfig(r=16, target_modules=LINEARS)
    networks["PEFT LoRA r=16"] = peft.get_peft_model(copy.deepcopy(base), lora)
    return networks


def step(network: nn.Module, tokens: torch.Tensor) -> Callable[[], None]:
    """Return one training step without the optimizer; every variant passes gradients down to the embedding."""
    trained = [p for p in network.parameters() if p.requires_grad]
    embedding = network.get_input_embeddings()

    def run() -> None:
        # an input that needs a gradient: the frozen base then does the backward that all others do
        inputs = embedding(tokens).detach().requires_grad_()
        loss = network(inputs_embeds=inputs, labels=tokens, use_cache=False).loss
        loss.backward()
        for parameter in trained:
            parameter.grad = None

    return run


def saved_mib(network: nn.Module, tokens: torch.Tensor) -> float:
    """Return the MiB that autograd keeps in one forward pass, parameters left out."""
    inputs = network.get_input_embeddings()(tokens).detach().requires_grad_()
    return saved_bytes(network, lambda: network(inputs_embeds=inputs, labels=tokens, use_cache=False)) / 2**20


def measure(dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Time all variants in turns, so that a slow moment of the machine meets them all."""
    networks = variants(dtype)
    tokens = torch.randint(0, 4096, (4, 256))
    steps = {name: step(network, tokens) for name, network in networks.items()}
    times: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(rounds + 2):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            if turn >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
    result = {}
    base = statistics.median(times["frozen base"])
    for name, network in networks.items():
        median = statistics.median(times[name])
        result[name] = {"ms": median, "overhead_ms": median - base, "saved_mib": saved_mib(network, tokens)}
    return result


def main() -> None:
    """Print the table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        results[str(dtype)] = table = measure(dtype, options.rounds)
        print(f"\n{dtype}\n{'':<20}{'ms':>8}{'overhead / PEFT OFT':>22}{'saved MiB':>12}")
        for name, row in table.items():
            share = row["overhead_ms"] / table["PEFT OFT"]["overhead_ms"]
            print(f"{name:<20}{row['ms']:>8.1f}{share:>22.2f}{row['saved_mib']:>12.1f}")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "peft": peft.__version__}
    document = {"versions": versions, "threads": options.threads, "results": results}
    Path("tests/benchmarks/results/oft.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
