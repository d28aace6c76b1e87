"""Reading checkpoints: nothing is executed, and what differs is named."""

import os
import pickle
import shutil
import signal

import pytest
import torch

from orthotrain.checkpoints.reading import check_checkpoint, check_finite, compare_state, read_checkpoint
from orthotrain.checkpoints.shards import save_shards
from orthotrain.checkpoints.writing import AtomicCheckpointIO
from orthotrain.distributed.consolidate import consolidate
from orthotrain.errors import ConfigurationError
from orthotrain.files.atomic_writes import remove_leftovers
from orthotrain.files.journal import JOURNAL


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_reads_plain_values_and_tensors(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "step": 3, "name": "x"}, tmp_path / "good.ckpt")
    assert read_checkpoint(tmp_path / "good.ckpt")["step"] == 3


@pytest.mark.parametrize("save", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb))])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, save):
    path = tmp_path / "bad.ckpt"
    save(Bomb(tmp_path / "executed"), path)
    with pytest.raises(ConfigurationError, match="bad.ckpt' cannot be read"):
        read_checkpoint(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("kept", [0, 1, 100, -50])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "short.ckpt"
    torch.save({"w": torch.randn(100)}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ConfigurationError, match="short.ckpt' cannot be read"):
        read_checkpoint(path)


@pytest.mark.parametrize("before", ["folder", "file"])
def test_a_checkpoint_takes_the_place_of_one_of_the_other_kind(tmp_path, before):
    """A file in the place of a distributed checkpoint's folder, and the other way round; nothing else is left."""
    path, state = tmp_path / "last.ckpt", {"state_dict": {"w": torch.ones(2)}}
    writers = [
        lambda: save_shards({"state_dict": dict(state["state_dict"])}, {"global_step": 1}, path, lambda failed: failed),
        lambda: AtomicCheckpointIO().save_checkpoint(state, path),
    ]
    for write in writers if before == "folder" else reversed(writers):
        write()
    assert path.is_file() == (before == "folder")
    check_checkpoint(path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_folder_that_is_replaced_stays_whole_until_the_file_is(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save_shards({"state_dict": {"w": torch.ones(2)}}, {"global_step": 1}, path, lambda failed: failed)

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(ConfigurationError, match="No space left on device"):
        AtomicCheckpointIO().save_checkpoint({"state_dict": {}}, path)
    check_checkpoint(path)
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_missing_file_is_named():
    with pytest.raises(ConfigurationError, match="'no/such.ckpt' is not a file"):
        read_checkpoint("no/such.ckpt")


def test_differences_are_counted_and_the_first_named():
    here = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    assert compare_state(here, dict(here)) is None
    there = {"a": torch.zeros(4), "c": torch.zeros(1), "d": torch.zeros(1)}
    message = compare_state(there, here)
    assert "a is (4,) there and (2,) here" in message
    assert "1 tensors are not in it (b)" in message and "1 of its tensors are not in the model (d)" in message


def test_consolidating_into_a_folder_that_is_not_there_is_refused(tmp_path):
    save_shards({"state_dict": {"w": torch.ones(2)}}, {"optimizer_states": []}, tmp_path / "shards.ckpt", bool)
    with pytest.raises(ConfigurationError, match=r"missing/one.ckpt' cannot be written: there is no folder"):
        consolidate(tmp_path / "shards.ckpt", tmp_path / "missing" / "one.ckpt")
    consolidate(tmp_path / "shards.ckpt", tmp_path / "one.ckpt")
    with pytest.raises(ConfigurationError, match="exists; give another name"):
        consolidate(tmp_path / "shards.ckpt", tmp_path / "one.ckpt")


def test_the_folder_of_a_run_is_refused_with_the_newest_checkpoint_in_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for age, name in enumerate(("last", "step=4", "step=2")):
        torch.save({}, path := tmp_path / "checkpoints" / f"{name}.ckpt")
        os.utime(path, (1e9 - age, 1e9 - age))
    with pytest.raises(ConfigurationError, match=r"is a folder; the newest in it is .*checkpoints/last.ckpt'"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("read", [read_checkpoint, AtomicCheckpointIO().load_checkpoint])
def test_a_folder_where_a_file_is_needed_says_how_to_make_one(tmp_path, read):
    (tmp_path / "x.ckpt").mkdir()
    with pytest.raises(ConfigurationError, match=r"is a folder, .* orthotrain consolidate .*x.ckpt FILE.ckpt"):
        read(tmp_path / "x.ckpt")


def test_a_folder_that_is_removed_loses_its_name_first(tmp_path, killed):
    """Also where a run is killed between its files, and whether or not the name is a link."""
    folder, link, io = tmp_path / "step=2.ckpt", tmp_path / "last.ckpt", AtomicCheckpointIO()
    save_shards({"state_dict": {"w": torch.ones(2)}}, {"optimizer_states": []}, folder, bool)
    link.symlink_to(folder)
    io.folders = lambda: [tmp_path]
    io.remove_checkpoint(link)
    assert [path.name for path in tmp_path.iterdir()] == ["step=2.ckpt"]

    def removes_half():
        def dies(path, ignore_errors=False):
            next(path.iterdir()).unlink()
            os.kill(os.getpid(), signal.SIGKILL)

        shutil.rmtree = dies
        io.remove_checkpoint(folder)

    killed(removes_half)
    unfinished = [path.name for path in tmp_path.iterdir() if not path.name.startswith(JOURNAL)]
    assert [name.startswith(".step=2.ckpt.") and name.endswith(".partial") for name in unfinished] == [True]
    remove_leftovers(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_buffer_that_repeats_its_values_is_saved_once_written_out(tmp_path):
    """A network may have one (``expand``); a file that claims more values than it holds is not read."""
    network = torch.nn.Linear(2, 2)
    network.register_buffer("mask", torch.ones(1, 3).expand(5, 3))
    AtomicCheckpointIO().save_checkpoint({"state_dict": network.state_dict()}, tmp_path / "a.ckpt")
    found = read_checkpoint(tmp_path / "a.ckpt")["state_dict"]
    assert found["mask"].tolist() == [[1.0] * 3] * 5 and found._metadata == network.state_dict()._metadata


def test_parameters_that_are_not_finite_are_refused_and_buffers_are_not():
    state = {
        "weight": torch.ones(3),
        "mask": torch.full((2,), float("-inf")),
        "count": torch.tensor(1),
        "none": torch.ones(0),
    }
    check_finite(state, ["weight", "count", "none", "other"])
    for value, what in ((float("nan"), "NaN or infinite values"), (float("-inf"), "NaN or infinite values")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2):
            spoilt = torch.tensor([1.0, value, 2.0]).to(dtype)
            with pytest.raises(ConfigurationError, match=f"the file holds {what} in weight"):
                check_finite({**state, "weight": spoilt}, ["weight"], "the file")
    with pytest.raises(ConfigurationError, match="holds nothing but NaN in weight"):
        check_finite({"weight": torch.full((3,), float("nan"))}, ["weight"])
