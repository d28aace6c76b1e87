"""The choice between reference and Triton: what every setting takes, and what it refuses with which words."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from orthotrain.kernels import dispatch as backend
from orthotrain.kernels.dispatch import backend_for, describe, forget_ran, use_backend
from orthotrain.kernels.skew import skew


@pytest.fixture(autouse=True)
def _no_choice_yet(monkeypatch):
    monkeypatch.setattr(backend, "_choice", None)
    monkeypatch.setattr(backend, "_ran", set())
    monkeypatch.delenv(backend.VARIABLE, raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """Something with the device and dtype of a GPU tensor, and a GPU that the kernels serve."""
    monkeypatch.setattr(backend, "_device_obstacle", lambda device: None)
    monkeypatch.setattr(backend, "_missing", lambda: None)
    return lambda dtype=torch.float32: SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)


def test_auto_takes_triton_on_gpus_where_it_can(gpu):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert backend_for(gpu(dtype), "skew") == "triton"
    assert backend_for(gpu(torch.float64), "skew") == "reference"
    assert backend_for(gpu(), "cayley", "blocks are too large") == "reference"
    assert backend_for(torch.zeros(1), "skew") == "reference"


def test_auto_without_triton_or_on_an_old_gpu(gpu, monkeypatch):
    monkeypatch.setattr(backend, "_device_obstacle", lambda device: "too old")
    assert backend_for(gpu(), "skew") == "reference"
    monkeypatch.setattr(backend, "_missing", lambda: "triton is not installed")
    assert backend_for(gpu(), "skew") == "reference"


def test_reference_is_taken_everywhere(gpu):
    with use_backend("reference"):
        assert backend_for(gpu(), "skew") == backend_for(torch.zeros(1), "skew") == "reference"


OLD = "Tesla T4 has compute capability (7, 5), below (8, 0)"


def test_what_has_run_is_told_by_what_each_operation_chose(gpu, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    assert describe() == "none were needed: no rotation was computed"
    skew(torch.zeros(2, 3), 3)
    assert describe() == "PyTorch code on the CPU"
    forget_ran()
    for op in ("skew", "fold"):
        backend_for(gpu(), op)
    assert describe() == f"Triton {triton.__version__} on NVIDIA H100"
    backend_for(gpu(), "cayley", "blocks are too large")
    said = f"Triton {triton.__version__} on NVIDIA H100 for fold, skew; PyTorch code on the GPU for cayley"
    assert describe() == f"{said} (blocks are too large)"
    forget_ran()
    monkeypatch.setattr(backend, "_device_obstacle", lambda device: OLD)
    backend_for(gpu(), "skew")
    assert describe() == f"PyTorch code on the GPU ({OLD})"
    with use_backend("reference"):
        backend_for(gpu(), "fold")
    said = f"PyTorch code on the GPU for skew ({OLD})"
    assert describe() == f"{said}; PyTorch code on the GPU for fold (kernels=reference)"


def test_an_old_gpu_is_told_by_name(monkeypatch):
    """What PyTorch says of a T4, with the decision itself."""
    device = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    monkeypatch.setattr(backend, "_missing", lambda: None)
    backend._device_obstacle.cache_clear()
    assert backend_for(SimpleNamespace(device=device, dtype=torch.float16), "skew") == "reference"
    backend._device_obstacle.cache_clear()
    assert describe() == f"PyTorch code on the GPU ({OLD})"


def test_what_ran_is_noted_under_compilation():
    @torch.compile(backend="eager", fullgraph=True)
    def rotate(generators):
        return skew(generators, 3)

    rotate(torch.zeros(2, 3))
    assert describe() == "PyTorch code on the CPU"


@pytest.mark.parametrize(
    ("dtype", "unsupported", "words"),
    [
        (torch.float64, None, "compute in fp16, bf16 and fp32, not in torch.float64"),
        (torch.float32, "blocks are too large", "blocks are too large"),
    ],
)
def test_explicit_triton_never_falls_back(gpu, dtype, unsupported, words):
    with use_backend("triton"), pytest.raises(ValueError, match=f"skew: kernels=triton, but .*{words}.*=auto"):
        backend_for(gpu(dtype), "skew", unsupported)


def test_explicit_triton_on_the_cpu_names_the_interpreter():
    pytest.importorskip("triton")
    with use_backend("triton"), pytest.raises(ValueError, match="on the CPU and TRITON_INTERPRET=1 was not set"):
        skew(torch.zeros(2, 3), 3)


def test_explicit_triton_without_triton(gpu, monkeypatch):
    monkeypatch.setattr(backend, "_missing", lambda: "triton is not installed")
    with use_backend("triton"), pytest.raises(ValueError, match="triton is not installed; kernels=auto"):
        backend_for(gpu(), "skew")


def test_the_environment_sets_the_first_choice_and_a_call_overrides_it(monkeypatch):
    monkeypatch.setenv(backend.VARIABLE, "reference")
    assert backend.chosen() == "reference"
    with use_backend("triton"):
        assert backend.chosen() == "triton"
        use_backend("auto")
        assert backend.chosen() == "auto"
    assert backend.chosen() == "reference"
    monkeypatch.setenv(backend.VARIABLE, "fast")
    with pytest.raises(ValueError, match="ORTHOTRAIN_KERNELS='fast': choose one of auto, reference, triton"):
        skew(torch.zeros(1, 1), 2)


def test_other_words_are_refused_and_change_nothing():
    with pytest.raises(ValueError, match="kernels='Triton': choose one of auto, reference, triton"):
        use_backend("Triton")
    assert backend.chosen() == "auto"


IMPORT = "import sys, torch; from orthotrain.kernels import block_rotate, fold; from orthotrain.plugins import Cayley;"
COMPUTE = "Cayley().displacement(torch.zeros(2, 3, requires_grad=True), 3).sum().backward();"


@pytest.mark.parametrize(
    "program",
    [
        # torch itself may import triton once it computes, so that is only looked at before
        IMPORT + "assert 'triton' not in sys.modules",
        IMPORT
        + "sys.modules['triton'] = None;"
        + COMPUTE
        + "assert 'orthotrain.kernels.skew.triton' not in sys.modules",
    ],
    ids=["not imported", "not needed"],
)
def test_nothing_imports_triton_before_it_is_used(program):
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
