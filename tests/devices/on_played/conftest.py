"""The played device; the files of this folder are run by ../test_played_device.py, each in its own process."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch import nn

ON_PLAYED = os.environ.get("ORTHOTRAIN_PLAYED_DEVICE") == "1"
collect_ignore_glob = [] if ON_PLAYED else ["test_*.py"]


class Network(nn.Module):
    """A language model of operations that have one kernel each: attention has several, chosen by device."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.norm, self.lm_head = nn.Embedding(96, 32), nn.LayerNorm(32), nn.Linear(32, 96)
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32, bias=False)

    def forward(self, input_ids):
        hidden = self.embed_tokens(input_ids)
        return self.lm_head(self.norm(hidden + self.down(torch.tanh(self.up(hidden)))))


@pytest.fixture(scope="session")
def network():
    return Network


@pytest.fixture(scope="session")
def played():
    """The module ``played.py``, which registers the device; a device cannot be registered twice."""
    spec = importlib.util.spec_from_file_location("played_device", Path(__file__).with_name("played.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
