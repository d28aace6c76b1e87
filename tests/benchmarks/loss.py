"""The next-token loss by chunks of rows against that of whole logits: peak memory and time of forward and backward.

Each case runs in a process of its own, since a peak counts from the start of a process. The operands, Python and its
libraries are not part of the peak. An fp32 copy of the logits is 500 MiB, that of 8B at 1 x 1024 tokens:

    .venv/bin/python tests/benchmarks/loss.py --threads 1
"""

import argparse
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from orthotrain.devices.accelerators import peak_bytes
from orthotrain.modules.chunked_loss import chunk_rows, chunked_cross_entropy, cross_entropy

RESULTS = Path(__file__).parent / "results" / "loss.json"
LOSSES = ("whole logits", "chunks", "linear_cross_entropy of torch")


def loss_of(which: str, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Return the loss that a case names."""
    if which == "whole logits":
        return cross_entropy(F.linear(hidden, weight), labels)
    if which == "chunks":
        return chunked_cross_entropy(hidden, weight, None, labels, chunk_rows(len(weight)))
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk_rows(len(weight)))
    return F.linear_cross_entropy(hidden, weight, labels, options=options)


def measure(case: tuple[str, str, bool], sizes: list[int], threads: int) -> dict[str, Any]:
    """Return the peak in MiB beside the operands, the seconds of a second pass, and the loss."""
    which, dtype, trained = case
    torch.set_num_threads(threads)
    tokens, width, classes = sizes
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width).to(getattr(torch, dtype)).requires_grad_()
    weight = torch.randn(classes, width).div_(width**0.5).to(hidden.dtype).requires_grad_(trained)
    labels = torch.randint(classes, (tokens,))
    loss_of(which, hidden[:32], weight, labels[:32]).backward()  # loads what multiplies
    hidden.grad = weight.grad = None
    before = resident_mib()
    loss_of(which, hidden, weight, labels).backward()
    peak = peak_bytes(torch.device("cpu")) / 2**20 - before  # type: ignore[operator]
    start = time.perf_counter()
    loss = loss_of(which, hidden, weight, labels)
    loss.backward()
    return {"peak_mib": round(peak), "seconds": round(time.perf_counter() - start, 2), "loss": loss.item()}


def resident_mib() -> float:
    """Return the resident memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(sizes: list[int], threads: int) -> list[dict[str, Any]]:
    """Measure every case and return the rows."""
    rows = []
    for trained in (False, True):
        for dtype in ("bfloat16", "float32"):
            for which in LOSSES:
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    found = pool.apply(measure, ((which, dtype, trained), sizes, threads))
                rows.append({"loss_by": which, "dtype": dtype, "head": "trained" if trained else "frozen", **found})
                print(f"{rows[-1]}", flush=True)
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--sizes", type=int, nargs=3, default=[4096, 512, 32000], metavar=("TOKENS", "WIDTH", "CLASSES")
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = run(options.sizes, options.threads)
    head = {"sizes": options.sizes, "threads": options.threads, "torch": torch.__version__}
    head["fp32_logits_mib"] = options.sizes[0] * options.sizes[2] * 4 // 2**20
    options.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
