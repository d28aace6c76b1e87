"""How long a large network takes to build, and how much more memory than its weights: an 8B LLaMA as POET trains it.

    .venv/bin/python tests/benchmarks/starting.py [--layers 32] [--storage dense nf4] [--init normalized uniform]

Each network is built in bf16 in a process of its own, on the GPU if there is one. The table goes to
tests/benchmarks/results/starting.json, or that of a GPU to standard output alone: gpu.sh keeps those.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

GIB = 2**30


def resident(key: str) -> float:
    """Return an entry of this process's status in GiB: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / GIB


def build(layers: int, storage: str, init: str) -> dict[str, float]:
    """Build the network and return seconds, GiB of its tensors, and of the most memory beyond what was held before."""
    import transformers.models.llama.modeling_llama  # noqa: F401 - what is imported shall not count

    from orthotrain.models import CausalLM
    from orthotrain.modules import PoetLayers, PoetModule

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 1024,
    }
    module = PoetModule(CausalLM(config), PoetLayers(block_size=256, storage=storage, init=init))
    torch.set_default_dtype(torch.bfloat16)
    before, start = resident("VmRSS"), time.perf_counter()
    with device:
        module.configure_model()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    weights = sum(t.nbytes for t in (*module.parameters(), *module.buffers())) / GIB
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() / GIB if on_gpu else resident("VmHWM") - before
    return {"seconds": seconds, "weights_gib": weights, "peak_gib": peak}


def main() -> None:
    """Build every combination in a process of its own, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--storage", nargs="*", default=["dense"])
    parser.add_argument("--init", nargs="*", default=["normalized"])
    parser.add_argument("--one", action="store_true", help="build one here, and print it as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(build(options.layers, options.storage[0], options.init[0])))
        return
    results = {}
    # memory that is freed goes back at once, so that the peak is that of what is held
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "0"}
    for storage in options.storage:
        for init in options.init:
            command = [sys.executable, "-W", "ignore", __file__, "--one"]
            command += ["--layers", str(options.layers), "--storage", storage, "--init", init]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            name = f"{storage} {init}"
            found = results[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:<22}" + "".join(f"{key:>14} {value:8.2f}" for key, value in found.items()), flush=True)
    if torch.cuda.is_available():
        return
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    document = {"versions": versions, "cpu_threads": torch.get_num_threads(), "layers": options.layers}
    out = Path(__file__).parent / "results" / "starting.json"
    out.write_text(json.dumps({**document, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
