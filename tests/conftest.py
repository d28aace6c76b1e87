"""What all tests share: one thread, a small real corpus, small networks."""

import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with some sources of the standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.glob("[a-d]*.py")):
        (folder / f"{path.stem}.txt").write_text(path.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    return folder


@pytest.fixture
def tiny_llama():
    """Configuration of a Llama that trains in seconds."""
    return {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }


@pytest.fixture
def randomize():
    """Give every rotation of a module generators of a given size."""

    def apply(module: nn.Module, scale: float = 0.05) -> nn.Module:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith("generators"):
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        return module

    return apply
