"""Load an exported adapter in PEFT and an exported merged model in transformers, and compare both with the run.

    .venv/bin/python examples/finetune_smollm2/verify.py CHECKPOINT BASE ADAPTER MERGED [nf4]

CHECKPOINT is a .ckpt of the run, BASE the pretrained folder, ADAPTER and MERGED what `orthotrain export` wrote with and
without `--format peft`; `nf4` for a run with `--model.layers.storage nf4`, whose adapter belongs on a base that
transformers has quantized in the same way. Prints the largest difference of the logits in fp32, relative to the
largest logit.
"""

import sys

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from orthotrain.checkpoints.reading import read_checkpoint
from orthotrain.export import load_network

TEXT = "def mean(values):\n    return sum(values) / len(values)\n"


def load(folder: str, quantization: str | None = None) -> nn.Module:
    """Load a model in fp32, its linear layers in NF4 with double quantization for ``nf4``."""
    if quantization is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if quantization != "nf4":
        sys.exit(f"quantization {quantization!r}: only nf4, or nothing")
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=nf4)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # else its first forward repacks the weight for a product in bf16
            module.support_avx512bf16_for_cpu = False
    return model


def main(checkpoint: str, base: str, adapter: str, merged: str, quantization: str | None = None) -> dict[str, float]:
    """Compare both exports with the run; print and return the differences."""
    found = {}
    ids = AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = load_network(read_checkpoint(checkpoint)).float()(ids).logits
        networks = {
            "base, not finetuned": load(base, quantization),
            "adapter in PEFT": PeftModel.from_pretrained(load(base, quantization), adapter),
            "merged in transformers": load(merged),
        }
        for name, network in networks.items():
            found[name] = ((network(ids).logits - expected).abs().max() / expected.abs().max()).item()
            print(f"{name:<24}{found[name]:.1e}")
    return found


def command(arguments: list[str]) -> None:
    """Run with the arguments of a command line."""
    if len(arguments) not in (4, 5):
        sys.exit("usage: verify.py CHECKPOINT BASE ADAPTER MERGED [nf4]")
    main(*arguments)


if __name__ == "__main__":
    command(sys.argv[1:])
