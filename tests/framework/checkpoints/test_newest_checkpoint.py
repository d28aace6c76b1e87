"""Which checkpoint is the newest, and that every one is compared with its checksums, once."""

import os
import shutil
import zlib

import pytest
import torch

from orthotrain.checkpoints.reading import check_checkpoint, describe_checkpoint, read_checkpoint, step_of
from orthotrain.checkpoints.resume import newest_good_checkpoint
from orthotrain.checkpoints.shards import save_shards
from orthotrain.checkpoints.writing import AtomicCheckpointIO
from orthotrain.errors import ConfigurationError


def checkpoint_of(path, step, age, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"global_step": step, "w": torch.ones(100), **more}, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_the_newest_is_decided_by_the_step_and_then_by_the_time(tmp_path):
    newest = checkpoint_of(tmp_path / "step=9.ckpt", 9, age=1000)
    checkpoint_of(tmp_path / "last.ckpt", 8, age=0)
    checkpoint_of(tmp_path / "twin.ckpt", 9, age=1001)
    adapter = checkpoint_of(tmp_path / "step-000007" / "resume.ckpt", 7, age=-100)
    assert newest_good_checkpoint([tmp_path]) == (newest, [])
    save_shards({"state_dict": {"w": torch.ones(2)}}, {"global_step": 11}, tmp_path / "shards.ckpt", bool)
    os.utime(tmp_path / "shards.ckpt", (1, 1))
    assert newest_good_checkpoint([tmp_path]) == (tmp_path / "shards.ckpt", [])
    shutil.rmtree(tmp_path / "shards.ckpt")
    for path in tmp_path.glob("*.ckpt"):
        path.unlink()
    assert newest_good_checkpoint([tmp_path]) == (adapter, [])


@pytest.mark.parametrize("step", ["9", -1, 2**62, 10**30, True, 1.0, [1], None, torch.tensor(3)], ids=str)
def test_a_step_that_is_none_is_skipped_and_named(step, tmp_path):
    checkpoint_of(tmp_path / "hostile.ckpt", step, age=0)
    good = checkpoint_of(tmp_path / "good.ckpt", 2, age=100)
    path, (reason,) = newest_good_checkpoint([tmp_path])
    assert path == good and "hostile.ckpt' cannot be read: its global_step is" in reason and len(reason) < 300


def test_the_step_is_read_without_the_tensors(tmp_path, monkeypatch):
    """And without torch's unpickler."""
    path = checkpoint_of(tmp_path / "a.ckpt", 5, age=0)
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr("orthotrain.files.torch_files.read_tensors", None)
    assert step_of(path) == 5


def test_a_file_is_compared_with_its_checksums_once(tmp_path, monkeypatch):
    """The search for the newest has read every byte; what reads the tensors then does not sum them again."""
    path, summed = checkpoint_of(tmp_path / "a.ckpt", 5, age=0), []
    crc32 = zlib.crc32
    monkeypatch.setattr("zlib.crc32", lambda data, crc=0: summed.append(len(data)) or crc32(data, crc))
    newest_good_checkpoint([tmp_path])
    whole = sum(summed)
    assert whole > 400
    summed.clear()
    assert read_checkpoint(path)["global_step"] == 5
    assert 400 not in summed, "the values were not summed again"
    checkpoint_of(path, 6, age=0)
    summed.clear()
    assert read_checkpoint(path)["global_step"] == 6 and 400 in summed, "another file is"


@pytest.mark.parametrize("read", [read_checkpoint, check_checkpoint, AtomicCheckpointIO().load_checkpoint])
def test_a_flipped_bit_of_a_weight_is_found(read, tmp_path):
    path = checkpoint_of(tmp_path / "a.ckpt", 5, age=0)
    data = bytearray(path.read_bytes())
    at = data.find(torch.ones(100).numpy().tobytes())
    data[at + 200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match="a.ckpt' cannot be read: a/data/0 does not match its checksum"):
        read(path)
    assert describe_checkpoint(path)["global_step"] == 5
