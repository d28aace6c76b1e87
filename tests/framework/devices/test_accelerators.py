"""GPUs that cannot run a network, with replaced answers of PyTorch, and the memory of a device."""

import re
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from orthotrain.devices.accelerators import (
    check_device,
    describe_peak,
    forget_peak,
    oldest_capability,
    peak_bytes,
    total_bytes,
)
from orthotrain.errors import ConfigurationError
from orthotrain.modules import BaseModule

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    def play(name, capability, architectures=("sm_75", "sm_80", "sm_90a", "compute_120")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(architectures))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: capability >= (8, 0))

    return play


def test_a_gpu_without_kernels_of_this_build(gpu):
    gpu("Tesla P100", (6, 0))
    with pytest.raises(ConfigurationError) as caught:
        check_device(GPU, "32-true")
    assert str(caught.value) == (
        f"Tesla P100 has compute capability 6.0, and this build of PyTorch ({torch.__version__}) has kernels from 7.5 "
        "on: take --trainer.accelerator cpu, or a build of PyTorch for this GPU"
    )


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_gpu_without_bf16(gpu, precision):
    gpu("Tesla T4", (7, 5))
    with pytest.raises(ConfigurationError, match=f"precision='{precision}': Tesla T4 has compute capability 7.5, and"):
        check_device(GPU, precision)
    for other in ("16-mixed", "32-true"):
        check_device(GPU, other)
    gpu("NVIDIA A100", (8, 0))
    check_device(GPU, precision)


def test_what_passes(gpu):
    gpu("NVIDIA RTX PRO 6000", (12, 0))
    check_device(GPU, "bf16-true")
    check_device(torch.device("cpu"), "bf16-true")
    gpu("NVIDIA H100", (9, 0), ())  # a build that does not say what it has
    check_device(GPU, "bf16-true")
    assert oldest_capability(["compute_120", "sm_100f", "sm_90a"]) == (9, 0) and oldest_capability([]) is None


def test_a_program_of_ones_own_is_refused_before_its_network_is_built(gpu, monkeypatch):
    gpu("Tesla T4", (7, 5))
    module = BaseModule(lambda: pytest.fail("the network was built"))
    module.trainer = L.Trainer(accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False)
    monkeypatch.setattr(type(module.trainer.strategy), "root_device", property(lambda self: GPU))
    with pytest.raises(ConfigurationError, match="precision='bf16-mixed': Tesla T4"):
        module.configure_model()


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
