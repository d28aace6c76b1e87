"""The cross-entropy by chunks of rows against the cross-entropy of whole logits."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from orthotrain.modules import chunked_loss
from orthotrain.modules.chunked_loss import chunk_rows, chunked_cross_entropy, cross_entropy, loss_bytes

TOKENS, WIDTH, CLASSES = 37, 16, 301


def operands(dtype=torch.float32, masked=0.3, bias=True):
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(CLASSES, WIDTH, generator=draw).to(dtype).requires_grad_()
    offset = torch.randn(CLASSES, generator=draw).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(CLASSES, (TOKENS,), generator=draw)
    labels[torch.rand(TOKENS, generator=draw) < masked] = -100
    return hidden, weight, offset, labels


def result(loss, scale, *tensors):
    (loss * scale).backward()
    return [loss.detach(), *(t.grad for t in tensors if t is not None and t.requires_grad)]


def whole(hidden, weight, bias, labels, rows=None):
    return cross_entropy(F.linear(hidden, weight, bias), labels)


# relative difference of the gradients: bf16 and fp16 round the sum over rows once for each chunk
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows", [1, 8, 64])
@pytest.mark.parametrize("frozen", [(), (1,), (0, 2)], ids=["all", "frozen weight", "weight alone"])
def test_loss_and_gradients_are_those_of_whole_logits(dtype, rows, frozen):
    for scale in (1.0, 65536.0 if dtype == torch.float16 else 0.25):  # loss scaling; accumulation
        found, expected = [], []
        for compute, into in ((chunked_cross_entropy, found), (whole, expected)):
            *tensors, labels = operands(dtype)
            for place in frozen:
                tensors[place].requires_grad_(False)
            into += result(compute(*tensors, labels, rows), scale, *tensors)
        assert found[0].dtype == torch.float32
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
        for got, wanted in zip(found[1:], expected[1:], strict=True):
            assert got.dtype == dtype
            assert (got - wanted).float().norm() <= TOLERANCE[dtype] * wanted.float().norm()


def test_labels_that_do_not_count():
    """If no label counts, the mean is NaN and the gradients are zero."""
    *tensors, labels = operands(masked=2.0)
    loss, *gradients = result(chunked_cross_entropy(*tensors, labels, 8), 1.0, *tensors)
    assert loss.isnan() and all(not gradient.any() for gradient in gradients)
    with torch.no_grad():
        assert cross_entropy(F.linear(*tensors), labels).isnan()
    with pytest.raises((RuntimeError, IndexError), match="out of bounds|out of range"):
        chunked_cross_entropy(*tensors, torch.full_like(labels, CLASSES), 8)


def test_an_infinite_logit_makes_the_loss_nan():
    hidden, weight, bias, labels = operands()
    with torch.no_grad():
        hidden[3, 0] = torch.inf
    labels[3] = 5
    assert chunked_cross_entropy(hidden, weight, bias, labels, 8).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_second_backward_is_right_or_refused(dtype):
    hidden, weight, bias, labels = operands(dtype)
    loss = chunked_cross_entropy(hidden, weight, bias, labels, 8)
    loss.backward(retain_graph=True)
    first = weight.grad.clone()
    if dtype == torch.float16:  # computed again in each backward
        loss.backward()
        torch.testing.assert_close(weight.grad, 2 * first)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="from torch 2.13 on")
def test_the_operation_of_torch_computes_the_same_in_fp32():
    hidden, weight, bias, labels = operands()
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=8)
    expected = result(
        F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, options=options), 1.0, hidden, weight, bias
    )
    tensors = operands()
    for got, wanted in zip(result(chunked_cross_entropy(*tensors, 8), 1.0, *tensors[:3]), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return out


def test_nothing_as_large_as_the_logits_is_computed():
    *tensors, labels = operands(bias=False)
    with Largest() as seen:
        result(chunked_cross_entropy(*tensors, labels, 8), 1.0, *tensors)
    assert seen.numbers == max(8 * CLASSES, CLASSES * WIDTH) < TOKENS * CLASSES
    with Largest() as seen:
        result(whole(*tensors, labels), 1.0, *tensors)
    assert seen.numbers == TOKENS * CLASSES


def test_without_gradients_whole_logits_are_copied_in_parts(monkeypatch):
    monkeypatch.setattr(chunked_loss, "CHUNK_BYTES", 4 * CLASSES * 8)
    hidden, weight, bias, labels = operands(torch.bfloat16)
    logits = F.linear(hidden, weight, bias).detach()
    with Largest() as seen, torch.no_grad():
        found = cross_entropy(logits, labels)
    assert seen.numbers == 8 * CLASSES
    torch.testing.assert_close(found, F.cross_entropy(logits.float(), labels))


def test_what_a_loss_holds():
    """8B, 1 x 1024 tokens: whole logits hold two fp32 copies of them more than chunks."""
    tokens, classes = 1024, 128256
    rows = chunk_rows(classes)
    copy = 4 * tokens * classes
    assert rows == 256 and chunk_rows(10**9) == 1
    held = [loss_bytes(tokens, classes, torch.bfloat16, chunk) for chunk in (None, rows)]
    assert held[0] == 3 * copy and held[0] - held[1] >= 2 * copy
    assert loss_bytes(100, classes, torch.float32, rows) == 100 * classes * 4  # fewer rows than a chunk
