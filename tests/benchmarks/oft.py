"""OFT against PEFT's OFT and LoRA: steps of a Llama, one process, interleaved, medians; peak memory each by itself.

    .venv/bin/python tests/benchmarks/oft.py [--device cpu|cuda] [--rounds 15] [--threads 2] [--out FILE]

Llama of hidden 256 x 8 layers, batch 4 x 256, all seven linears, b = 32, LoRA r = 16. Printed are the milliseconds of a
forward and backward, their overhead over the frozen base as a share of PEFT's OFT overhead, the milliseconds of a whole
step (with AdamW on what is trained), the MiB of activations that autograd saves, and the peak MiB of three whole steps
above the built network. The peak is that of a fresh process for each network: resident memory on the CPU, memory that
torch has allocated on CUDA. The same goes to tests/benchmarks/results/oft.json (oft_cuda.json).
"""

import argparse
import json
import platform
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from orthotrain.cli.plan import saved_bytes
from orthotrain.layers.rotation.displacement_pool import DisplacementPool
from orthotrain.modules import OftLayers

memory = runpy.run_path(str(Path(__file__).parent / "memory.py"))
CONFIG = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 8, "num_attention_heads": 4}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY, BATCH, LENGTH = 4096, 4, 256
WARM_UP, STEPS_OF_PEAK = 2, 3


def with_oft(base: nn.Module) -> nn.Module:
    """Return the network with this package's OFT."""
    OftLayers(block_size=32).apply_(base)
    DisplacementPool(base)
    return base


def with_peft(config: peft.PeftConfig) -> Callable[[nn.Module], nn.Module]:
    """Return what puts an adapter of PEFT into a network."""
    return lambda base: peft.get_peft_model(base, config)


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen base": lambda base: base,
    "orthotrain OFT": with_oft,
    "PEFT OFT": with_peft(
        peft.OFTConfig(oft_block_size=32, target_modules=LINEARS, use_cayley_neumann=True, num_cayley_neumann_terms=6)
    ),
    "PEFT LoRA r=16": with_peft(peft.LoraConfig(r=16, target_modules=LINEARS)),
}


def build(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    """Return one of the networks, all of the same base."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **CONFIG)).to(device, dtype)
    return VARIANTS[name](base.requires_grad_(False))


def random_tokens(device: str) -> torch.Tensor:
    """Return the tokens of a batch, ``(4, 256)`` int64."""
    return torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)


def stepper(network: nn.Module, tokens: torch.Tensor) -> Callable[[], tuple[float, float]]:
    """Return a whole training step that tells the ms up to the end of backward, and of all of it."""
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None
    embedding = network.get_input_embeddings()

    def now() -> float:
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return 1e3 * time.perf_counter()

    def run() -> tuple[float, float]:
        start = now()
        # an input that needs a gradient: the frozen base then does the backward that all others do
        inputs = embedding(tokens).detach().requires_grad_()
        network(inputs_embeds=inputs, labels=tokens, use_cache=False).loss.backward()
        backward = now()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return backward - start, now() - start

    return run


def saved_mib(network: nn.Module, tokens: torch.Tensor) -> float:
    """Return the MiB that autograd keeps in one forward pass, parameters left out."""
    inputs = network.get_input_embeddings()(tokens).detach().requires_grad_()
    return saved_bytes(network, lambda: network(inputs_embeds=inputs, labels=tokens, use_cache=False)) / 2**20


def own_peak_mib(name: str, dtype: torch.dtype, device: str) -> float:
    """Return the MiB that whole steps take at most above the built network; exact only in a fresh process."""

    def level() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return memory["peak_resident_mib"]()

    network, tokens = build(name, dtype, device), random_tokens(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    built = level()
    run = stepper(network, tokens)
    for _ in range(STEPS_OF_PEAK):
        run()
    return level() - built


def peak_mib(name: str, dtype: torch.dtype, device: str, threads: int) -> float:
    """Return :func:`own_peak_mib` of a process of its own."""
    kind = str(dtype).removeprefix("torch.")
    command = [sys.executable, __file__, "--peak-of", name, kind, "--device", device, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def measure(dtype: torch.dtype, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time all networks in turns, so that a slow moment of the machine meets them all."""
    peaks = {name: peak_mib(name, dtype, options.device, options.threads) for name in VARIANTS}
    networks = {name: build(name, dtype, options.device) for name in VARIANTS}
    tokens = random_tokens(options.device)
    steps = {name: stepper(network, tokens) for name, network in networks.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in networks}
    for turn in range(options.rounds + WARM_UP):
        for name, run in steps.items():
            taken = run()
            if turn >= WARM_UP:
                times[name].append(taken)
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    return {
        name: {
            "ms": medians[name][0],
            "overhead_ms": medians[name][0] - medians["frozen base"][0],
            "step_ms": medians[name][1],
            "saved_mib": saved_mib(network, tokens),
            "peak_mib": peaks[name],
        }
        for name, network in networks.items()
    }


def show(table: dict[str, dict[str, float]]) -> None:
    """Print a line for each network."""
    print(f"{'':<16}{'fwd+bwd ms':>11}{'overhead / PEFT OFT':>21}{'step ms':>9}{'saved MiB':>11}{'peak MiB':>10}")
    for name, row in table.items():
        share = row["overhead_ms"] / table["PEFT OFT"]["overhead_ms"]
        numbers = f"{row['ms']:>11.1f}{share:>21.2f}{row['step_ms']:>9.1f}{row['saved_mib']:>11.1f}"
        print(f"{name:<16}{numbers}{row['peak_mib']:>10.1f}")


def main() -> None:
    """Print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="where the results go; by default tests/benchmarks/results")
    parser.add_argument("--peak-of", nargs=2, metavar=("NETWORK", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak_of:
        name, dtype = options.peak_of
        print(own_peak_mib(name, getattr(torch, dtype), options.device))
        return
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        results[str(dtype)] = measure(dtype, options)
        print(f"\n{dtype} on {options.device}")
        show(results[str(dtype)])
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "peft": peft.__version__}
    document = {"versions": versions, "device": device, "threads": options.threads, "results": results}
    file = "oft.json" if options.device == "cpu" else "oft_cuda.json"
    out = options.out or Path(__file__).parent / "results" / file
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
