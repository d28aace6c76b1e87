"""Kernels on the CPU, interpreted: files here are run by ../test_interpreted.py in processes of their own.

Triton reads TRITON_INTERPRET when it is imported, so a process that has imported it before cannot run them.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def triton_on_poisoned_memory():
    """Every operation takes its Triton kernels, and fresh memory holds NaN: an element not written shows."""
    from orthotrain.kernels.dispatch import use_backend

    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all() and torch.empty(2, 2).new_empty(1, dtype=torch.float16).isnan().all()
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)
