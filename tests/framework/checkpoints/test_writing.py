"""What is written is what is read; what could not be read is refused before it is written."""

import enum
import functools
from collections import Counter, OrderedDict, namedtuple
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.parsing import AttributeDict
from torch import nn
from torch.utils.data import DataLoader

from orthotrain.checkpoints.reading import read_checkpoint
from orthotrain.checkpoints.writing import AtomicCheckpointIO
from orthotrain.errors import ConfigurationError
from orthotrain.modules import BaseModule


class Mode(enum.IntEnum):
    FAST = 3


class Name(str, enum.Enum):  # noqa: UP042
    A = "a"


Pair = namedtuple("Pair", ["a", "b"])


class Remembers(L.Callback):
    def state_dict(self):
        return {"path": Path("a"), "best": self}


class Own(torch.Tensor):
    """A tensor of a class of one's own."""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 2.5, "x", None, True, b"\xff"], [1, 2.5, "x", None, True, b"\xff"]),
        ((1, (2, [3])), (1, (2, [3]))),
        ({"a": {1: "b"}}, {"a": {1: "b"}}),
        (OrderedDict(b=1, a=2), OrderedDict(b=1, a=2)),
        (Counter("aab"), Counter("aab")),
        ({"x", 1}, {"x", 1}),
        (torch.Size([2, 3]), torch.Size([2, 3])),
        (torch.bfloat16, torch.bfloat16),
        (AttributeDict(rate=0.5), {"rate": 0.5}),
        (np.float64(0.25), 0.25),
        (Mode.FAST, 3),
        (Name.A, "a"),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (Path("a") / "b", "a/b"),
        (10**30, 10**30),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_written_is_what_is_read(tmp_path, value, expected):
    AtomicCheckpointIO().save_checkpoint({"value": value}, tmp_path / "a.ckpt")
    read = read_checkpoint(tmp_path / "a.ckpt")["value"]
    assert read == expected and type(read) is type(expected)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6.0).view(2, 3).t(),
        torch.ones(3, 1).expand(3, 4),
        torch.ones(4, dtype=torch.bfloat16)[1:3],
        nn.Parameter(torch.ones(2), requires_grad=False),
        torch.zeros(0, 5),
        torch.tensor(3, dtype=torch.int8),
        torch.tensor([1 + 2j]),
        torch.arange(5).flip(0),
        torch.tensor([1 + 2j, 3 - 1j]).conj(),
        torch.tensor([1 + 2j, 3 - 1j]).conj().imag,
    ],
)
def test_tensors_come_back(tmp_path, tensor):
    AtomicCheckpointIO().save_checkpoint({"t": [tensor, tensor]}, tmp_path / "a.ckpt")
    first, second = read_checkpoint(tmp_path / "a.ckpt")["t"]
    assert torch.equal(first, tensor) and first.dtype == tensor.dtype and type(first) is type(tensor)
    assert torch.equal(second, tensor)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (object(), "callbacks.Own.x is a object"),
        (Pair(1, 2), "callbacks.Own.x is a Pair"),
        ({("a", 1): 2}, "callbacks.Own.x is a dictionary with the key .*neither a string nor an integer"),
        ({0.5: 1}, "callbacks.Own.x is a dictionary with the key 0.5"),
        ([lambda: 0], "callbacks.Own.x.0 is a function"),
        (nn.Linear(2, 2), "callbacks.Own.x is a Linear"),
        (torch.eye(3).to_sparse(), "callbacks.Own.x is a tensor that is sparse"),
        (torch.empty(2, device="meta"), "callbacks.Own.x is a tensor that is .*without values"),
        (torch.ones(2).as_subclass(Own), "callbacks.Own.x is a tensor of the class Own"),
        (1j, "callbacks.Own.x is a complex"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_read_is_not_written(tmp_path, value, message):
    io = AtomicCheckpointIO()
    io.save_checkpoint({"callbacks": {"Own": {"x": 1}}}, tmp_path / "a.ckpt")
    before = (tmp_path / "a.ckpt").read_bytes()
    with pytest.raises(ConfigurationError, match=message):
        io.save_checkpoint({"callbacks": {"Own": {"x": value}}}, tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    assert (tmp_path / "a.ckpt").read_bytes() == before


def holds_itself():
    values = [1]
    values.append(values)
    return values


def with_attribute():
    tensor = torch.ones(2)
    tensor.tag = "x"
    return tensor


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(10.0).unfold(0, 3, 1),
        with_attribute(),
        Counter(a=-1),
        Counter(a=1.5),
        1 << 3000,
        {1 << 60: 2},
        ["y" * 10**6] * 100,
        holds_itself(),
        functools.reduce(lambda inner, _: [inner], range(105), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_only_a_reader_would_refuse_takes_no_older_files_place(tmp_path, value):
    io = AtomicCheckpointIO()
    io.save_checkpoint({"x": 1}, tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError, match="could not be read again|nested too deeply, or contains itself"):
        io.save_checkpoint({"x": value}, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt") == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_what_stands_in_many_places_is_written_once(tmp_path):
    shared = list(range(1000))
    AtomicCheckpointIO().save_checkpoint({"x": [shared] * 500}, tmp_path / "a.ckpt")
    assert (tmp_path / "a.ckpt").stat().st_size < 20_000
    assert read_checkpoint(tmp_path / "a.ckpt")["x"][499] == shared


def test_a_callback_whose_state_is_an_object_is_named_at_the_first_save(tmp_path):
    module = BaseModule(nn.Linear(4, 4))
    module.loss = lambda batch: module.model(batch).sum()
    callbacks = [Remembers(), L.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=1)]
    trainer = L.Trainer(max_steps=2, callbacks=callbacks, logger=False, enable_progress_bar=False, accelerator="cpu")
    with pytest.raises(ConfigurationError, match="callbacks.Remembers.best is a Remembers, which cannot be read again"):
        trainer.fit(module, DataLoader(torch.ones(4, 4), batch_size=2))
    assert trainer.global_step == 1
