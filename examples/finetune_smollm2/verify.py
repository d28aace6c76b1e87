"""Load an exported adapter in PEFT and an exported merged model in transformers, and compare both with the run.

    .venv/bin/python -P examples/finetune_smollm2/verify.py CHECKPOINT BASE ADAPTER MERGED

CHECKPOINT is a .ckpt of the run, BASE the pretrained folder, ADAPTER and MERGED what `orthotrain export` wrote with and
without `--format peft`. Prints the largest difference of the logits in fp32, relative to the largest logit.
"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from orthotrain.checkpoint import read_checkpoint
from orthotrain.export import load_network

TEXT = "def mean(values):\n    return sum(values) / len(values)\n"


def main(checkpoint: str, base: str, adapter: str, merged: str) -> None:
    """Compare."""
    ids = AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt").input_ids
    fp32 = {"dtype": torch.float32}
    with torch.no_grad():
        expected = load_network(read_checkpoint(checkpoint)).float()(ids).logits
        networks = {
            "base, not finetuned": AutoModelForCausalLM.from_pretrained(base, **fp32),
            "adapter in PEFT": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **fp32), adapter),
            "merged in transformers": AutoModelForCausalLM.from_pretrained(merged, **fp32),
        }
        for name, network in networks.items():
            difference = (network(ids).logits - expected).abs().max() / expected.abs().max()
            print(f"{name:<24}{difference:.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
