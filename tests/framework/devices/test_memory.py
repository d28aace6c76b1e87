"""The peak of memory that a summary tells."""

import re
from types import SimpleNamespace

import torch

from orthotrain.devices.memory import describe_peak, forget_peak, peak_bytes, total_bytes

GPU, CPU = torch.device("cuda", 1), torch.device("cpu")


def test_of_a_gpu_beside_the_plan(monkeypatch):
    properties, forgotten = SimpleNamespace(total_memory=80 << 30), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 22 << 30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    forget_peak(GPU)
    assert forgotten == [GPU] and total_bytes(GPU) == 80 << 30
    assert describe_peak(GPU) == "22.00 GiB of 80.00"
    assert describe_peak(GPU, 23 << 30) == "22.00 GiB of 80.00, planned 23.00 GiB"


def test_of_a_process_on_the_cpu():
    before = peak_bytes(CPU)
    block = torch.ones(64 << 18)  # 64 MiB
    forget_peak(CPU)
    assert peak_bytes(CPU) >= max(before, block.nbytes)
    assert re.fullmatch(r"\d+\.\d\d GiB resident, Python and its libraries included", describe_peak(CPU, 1 << 30))
    assert total_bytes(CPU) > peak_bytes(CPU)


def test_of_other_devices_nothing_is_known():
    assert peak_bytes(torch.device("meta")) is total_bytes(torch.device("meta")) is describe_peak(torch.device("mps"))
