"""What every operation holds to: the device it launches on, shapes on meta, strides as declared, no idle gradients."""

import contextlib

import pytest
import torch
from torch.library import opcheck

from orthotrain.kernels.block_rotate import block_rotate, cpu
from orthotrain.kernels.cayley import cayley
from orthotrain.kernels.cayley_neumann import cayley_neumann
from orthotrain.kernels.dequant import dequant_int8, dequant_nf4
from orthotrain.kernels.exponential import exponential
from orthotrain.kernels.fold import cpu as fold_cpu
from orthotrain.kernels.fold import fold
from orthotrain.kernels.oft_linear import oft_linear
from orthotrain.kernels.skew import skew

OPS = torch.ops.orthotrain_v2


def leaf(*shape, device="cpu"):
    return torch.randn(*shape, device=device).requires_grad_()


DIFFERENTIABLE = {
    "skew": (lambda g: skew(g, 4), [(2, 6)]),
    "cayley": (cayley, [(2, 4, 4)]),
    "exponential": (exponential, [(2, 4, 4)]),
    "cayley_neumann": (lambda g: cayley_neumann(g, 4, 4), [(2, 6)]),
    "block_rotate": (block_rotate, [(5, 9), (2, 4, 4)]),
    "fold": (lambda d_out, d_in: fold(torch.randn(7, 9, device=d_in.device), d_out, d_in), [(2, 3, 3), (2, 4, 4)]),
    "oft_linear": (lambda x, d: oft_linear(x, torch.randn(3, 9, device=x.device), d), [(5, 9), (2, 4, 4)]),
}
every = pytest.mark.parametrize(("op", "shapes"), DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)


@pytest.fixture
def guards(monkeypatch):
    """The shapes of the tensors whose device was made current."""
    seen = []

    @contextlib.contextmanager
    def device_of(tensor):
        seen.append(tuple(tensor.shape))
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    return seen


@every
@pytest.mark.parametrize("compiled", [False, True])
def test_launches_on_the_device_of_its_tensors(op, shapes, compiled, guards):
    """Triton launches on the current device, whatever the tensors are on: forward and backward must set it."""
    leaves = [leaf(*shape) for shape in shapes]
    y = (torch.compile(op, fullgraph=True, backend="aot_eager") if compiled else op)(*leaves)
    forward = len(guards)
    torch.autograd.grad(y.sum(), leaves)
    assert forward == 1 and len(guards) == 2


def test_unpacking_launches_on_the_device_of_its_tensors(guards):
    dequant_int8(torch.zeros(2, 6, dtype=torch.int8), torch.zeros(2, 3), torch.float32)
    dequant_nf4(torch.zeros(2, 32, dtype=torch.uint8), torch.zeros(2), (), 64, torch.float32)
    assert guards == [(2, 6), (2, 32)]


@every
def test_meta_tensors_give_shapes(op, shapes):
    leaves, like = ([leaf(*shape, device=device) for shape in shapes] for device in ("meta", "cpu"))
    y = op(*leaves)
    assert y.is_meta and y.shape == op(*like).shape
    for found, x in zip(torch.autograd.grad(y.sum(), leaves), leaves, strict=True):
        assert found.is_meta and found.shape == x.shape


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("permuted", [False, True])
def test_gradients_of_transposed_blocks_are_laid_out_as_declared(rows, permuted):
    order = torch.randperm(9) if permuted else None
    d_out, d_in = torch.randn(2, 3, 3).mT, torch.randn(2, 4, 4).mT
    x, grad = torch.randn(rows, 9), torch.randn(rows, 9)
    for needs in ((True, True), (True, False), (False, True)):
        opcheck(OPS.block_rotate_backward, (grad, x, d_in, order, order, *needs))
        arguments = (torch.randn(7, 9), torch.randn(7, 9), d_out, d_in, None, order, *needs)
        opcheck(OPS.fold_backward, arguments)


def test_a_transposed_skew_matrix_is_laid_out_as_declared():
    q, grad = torch.randn(2, 4, 4).mT, torch.randn(2, 4, 4).mT
    for name in ("cayley", "exponential"):
        opcheck(getattr(OPS, name), (q,))
        opcheck(getattr(OPS, f"{name}_backward"), (grad, q))


@pytest.fixture
def products(monkeypatch):
    """Names of the products that the references form."""
    seen = []
    for module in (cpu, fold_cpu):
        for name in ("add_block_products", "block_products", "rotate_rows"):
            if hasattr(module, name):
                original = getattr(module, name)
                spy = lambda *a, original=original, name=name: (seen.append(name), original(*a))[1]  # noqa: E731
                monkeypatch.setattr(module, name, spy)
    return seen


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
def test_only_needed_gradients_are_formed(permuted, compiled, products):
    order = torch.randperm(9) if permuted else None

    def gradients(op, *operands):
        call = torch.compile(op, fullgraph=True, backend="aot_eager") if compiled else op
        leaves = [t for t in operands if t.requires_grad]
        y = call(*operands, order, order)
        products.clear()
        return torch.autograd.grad(y.square().sum(), leaves), list(products)

    x, d = leaf(3, 9), leaf(2, 4, 4)
    both, _ = gradients(block_rotate, x, d)
    (only,), formed = gradients(block_rotate, x, d.detach())
    assert torch.equal(only, both[0]) and "block_products" not in formed
    (only,), formed = gradients(block_rotate, x.detach(), d)
    assert torch.equal(only, both[1]) and "add_block_products" not in formed
    weight, d_out = torch.randn(9, 9), leaf(3, 3, 3)
    both, _ = gradients(fold, weight, d_out, d)
    (only,), formed = gradients(fold, weight, d_out, d.detach())
    assert torch.equal(only, both[0]) and not {"block_products", "rotate_rows"} & set(formed)
    (only,), formed = gradients(fold, weight, d_out.detach(), d)
    assert torch.equal(only, both[1]) and "add_block_products" not in formed
