"""Distributed checkpoints that describe more than they hold, or something else than an optimizer and a network."""

import io
import json
import pickle

import pytest
import torch

from orthotrain.checkpoints.reading import check_checkpoint, read_checkpoint
from orthotrain.checkpoints.shard_description import read_shard_description
from orthotrain.checkpoints.shards import load_shards, save_shards
from orthotrain.distributed.consolidate import consolidate
from orthotrain.errors import ConfigurationError
from orthotrain.files.torch_files import crc32_of


@pytest.fixture
def folder(tmp_path):
    state = {"state_dict": {"w": torch.arange(16.0), "v": torch.ones(4), "note": "x"}}
    save_shards(state, {"global_step": 3}, tmp_path / "shards.ckpt", bool)
    return tmp_path / "shards.ckpt"


def sum_again(folder):
    files = [file for file in folder.iterdir() if file.name != "checksums.json"]
    index = {file.name: [file.stat().st_size, crc32_of(file)] for file in files}
    (folder / "checksums.json").write_text(json.dumps(index))


def redescribed(folder, change):
    """Change torch's own description and write it with the right checksums."""
    described = pickle.loads((folder / ".metadata").read_bytes())
    change(described)
    (folder / ".metadata").write_bytes(pickle.dumps(described))
    sum_again(folder)


def entry(described, name):
    return next(info for index, info in described.storage_data.items() if index.fqn == name)


def grown(described):
    tensor = described.state_dict_metadata["state_dict.w"]
    tensor.size = torch.Size([2**40])
    tensor.chunks[0].sizes = tensor.size


def same_bytes(described):
    one, other = entry(described, "state_dict.w"), entry(described, "state_dict.v")
    other.offset, other.length = one.offset, one.length


WRONG = {
    "more than its parts": (grown, "state_dict.w of shape (1099511627776,) is larger than its parts"),
    "other parts": (
        lambda d: setattr(d.state_dict_metadata["state_dict.w"], "size", torch.Size([8])),
        "the parts of state_dict.w do not add up to its shape (8,)"),
    "shared bytes": (same_bytes, "parts of __0_0.distcp overlap or end beyond its end"),
    "beyond the end": (
        lambda d: setattr(entry(d, "state_dict.w"), "length", 2**50), "overlap or end beyond its end"),
    "a negative place": (lambda d: setattr(entry(d, "state_dict.w"), "offset", -5), "instead of a count"),
    "packed": (lambda d: setattr(entry(d, "state_dict.w"), "transform_descriptors", ["zstd"]), "truncated or damaged"),
    "a long list": (lambda d: d.planner_data.update({"state_dict.w": ("state_dict", 2**40)}), "it names an entry"),
    "a deep place": (lambda d: d.planner_data.update({"state_dict.w": ("a",) * 10**5}), "it names an entry"),
    "no chunks": (lambda d: setattr(d.state_dict_metadata["state_dict.w"], "chunks", None), "truncated or damaged"),
    "no table": (lambda d: setattr(d, "storage_data", [1]), "truncated or damaged"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_a_description_of_more_than_there_is_is_refused(folder, wrong, tmp_path):
    change, message = WRONG[wrong]
    redescribed(folder, change)
    for read in (check_checkpoint, lambda path: consolidate(path, tmp_path / "one.ckpt")):
        with pytest.raises(ConfigurationError) as caught:
            read(folder)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "one.ckpt").exists()


def test_the_description_of_torch_is_read_alike(folder):
    expected, found = pickle.loads((folder / ".metadata").read_bytes()), read_shard_description(folder)
    assert found.storage_data == expected.storage_data and found.planner_data == expected.planner_data
    assert found.state_dict_metadata.keys() == expected.state_dict_metadata.keys()
    for name, described in found.state_dict_metadata.items():
        other = expected.state_dict_metadata[name]
        assert type(described) is type(other)
        if hasattr(other, "size"):
            assert (described.size, described.chunks) == (other.size, other.chunks)
            assert described.properties.dtype == other.properties.dtype


def test_a_part_that_is_packed_is_refused(folder):
    """A part of a file is an archive of its own: a packed one would expand."""
    import zipfile

    described = pickle.loads((folder / ".metadata").read_bytes())
    info = entry(described, "state_dict.w")
    packed, original = (
        io.BytesIO(),
        io.BytesIO((folder / info.relative_path).read_bytes()[info.offset :][: info.length]),
    )
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    (folder / "__9_9.distcp").write_bytes(packed.getvalue())

    def elsewhere(described):
        info = entry(described, "state_dict.w")
        info.relative_path, info.offset, info.length = "__9_9.distcp", 0, len(packed.getvalue())

    redescribed(folder, elsewhere)
    check_checkpoint(folder)
    with pytest.raises(ConfigurationError, match="is compressed or encrypted"):
        load_shards({}, folder)


def test_without_a_list_of_optimizers_it_is_refused(folder, tmp_path):
    with pytest.raises(ConfigurationError, match="has no optimizer_states beside its shards"):
        consolidate(folder, tmp_path / "one.ckpt")
    torch.save({"global_step": 3, "optimizer_states": []}, folder / "meta.pt")
    sum_again(folder)
    found = read_checkpoint(consolidate(folder, tmp_path / "one.ckpt"))
    assert found["optimizer_states"] == [] and found["state_dict"]["w"].tolist() == list(range(16))


@pytest.mark.parametrize("states", ["x", [1], [{}], [{"state": 3}], {"a": 1}])
def test_states_of_optimizers_that_are_none_are_refused(folder, tmp_path, states):
    torch.save({"global_step": 3, "optimizer_states": states}, folder / "meta.pt")
    sum_again(folder)
    with pytest.raises(ConfigurationError, match="optimizer"):
        consolidate(folder, tmp_path / "one.ckpt")
    assert not (tmp_path / "one.ckpt").exists()


def test_a_folder_without_a_network_is_refused(tmp_path):
    save_shards({"other": {"w": torch.ones(2)}}, {"optimizer_states": []}, tmp_path / "x.ckpt", bool)
    with pytest.raises(ConfigurationError, match="holds no network"):
        consolidate(tmp_path / "x.ckpt", tmp_path / "one.ckpt")


@pytest.mark.parametrize("target", ["a\0b", "link", "dangling"])
def test_the_name_of_the_file_is_not_followed(folder, tmp_path, target):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="exists; give another name|NUL"):
        consolidate(folder, tmp_path / target)
    assert (tmp_path / "victim").read_text() == "mine" and not (tmp_path / "nowhere").exists()
