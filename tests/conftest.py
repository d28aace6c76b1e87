"""Fixtures for all tests: one thread, a small real corpus, small networks, tests in a process of their own."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment():
    """Restore the environment: Lightning leaves LOCAL_RANK of a run with DDP behind, and a later run would wait."""
    before = dict(os.environ)
    yield
    for name in {*before, *os.environ} - {"PYTEST_CURRENT_TEST"}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


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


@pytest.fixture
def run_in_own_process():
    """Run the tests of a file in a process of its own, with these environment variables; fail if one of them fails."""

    def run(file, **variables):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        command = [sys.executable, "-P", "-m", "pytest", "-p", "no:xdist", "-W", "ignore", file]
        done = subprocess.run(
            command, env={**inherited, "OMP_NUM_THREADS": "1", **variables}, capture_output=True, text=True,
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    return run
