"""Paths that a checkpoint stores decide nothing outside the folder of the run, in a real Trainer."""

import itertools
import json
import shutil

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from orthotrain.callbacks import AdapterCheckpoint
from orthotrain.checkpoints.stored_paths import is_own_checkpoint
from orthotrain.checkpoints.writing import AtomicCheckpointIO
from orthotrain.layers import OftLinear, replace_linears
from orthotrain.modules import BaseModule


class Small(BaseModule):
    def __init__(self):
        super().__init__(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))

    def wrap(self, model):
        torch.manual_seed(0)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        replace_linears(model, ["*"], factory=lambda linear: OftLinear.from_linear(linear, 4))

    def loss(self, batch):
        loss = (self(batch[0]) ** 2).mean()
        self.log("score", loss.detach())
        return loss


def fit(callback, steps, ckpt_path=None):
    data = torch.utils.data.TensorDataset(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    trainer = L.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback],
    )  # fmt: skip
    trainer.fit(Small(), torch.utils.data.DataLoader(data, batch_size=4), ckpt_path=ckpt_path)
    return trainer


def watching(folder, **options):
    options = {"save_top_k": 2, "monitor": "score", "save_last": True, "filename": "{step}", **options}
    return ModelCheckpoint(folder, every_n_train_steps=1, enable_version_counter=False, **options)


def canaries(folder):
    """Files and folders, some of them called like checkpoints, that no run may touch."""
    (folder / "precious").mkdir(parents=True)
    for name in ("thesis.txt", "other.ckpt", "precious/step=1.ckpt", "precious/data"):
        (folder / name).write_text("mine")
    for file in (".metadata", "meta.pt", "checksums.json", "__0_0.distcp"):
        (folder / "shards.ckpt").mkdir(exist_ok=True)
        (folder / "shards.ckpt" / file).write_text("mine")
    return sorted(str(path) for path in folder.rglob("*"))


PLACES = [
    "{other}/other.ckpt", "{other}/precious", "{other}/thesis.txt", "{other}/shards.ckpt", "{run}/../other/other.ckpt",
    "{run}/../../{name}/other/shards.ckpt", "local://{other}/precious", "local://{other}/other.ckpt",
    "file://{other}/other.ckpt", "simplecache::file://{other}/other.ckpt", "memory://x.ckpt", "{run}/link/other.ckpt",
    "{run}/linked.ckpt", "{run}", "{run}/kept", "{run}/kept.ckpt", "{run}/notes.txt", "relative.ckpt", "~/x.ckpt", "",
    "{run}/a\0.ckpt",
]  # fmt: skip


@pytest.mark.parametrize(("place", "monitor"), zip(PLACES, itertools.cycle(["score", None]), strict=False))
def test_a_stored_path_elsewhere_is_forgotten(place, monitor, tmp_path):
    """Every path that a ModelCheckpoint remembers leads to one place; the run goes on and removes its own alone."""
    run, other = tmp_path / "run", tmp_path / "other"
    options = {"monitor": monitor, "save_top_k": 2 if monitor else 1}
    fit(watching(run, **options), 3)
    before = canaries(other)
    (run / "link").symlink_to(other)
    (run / "linked.ckpt").symlink_to(other / "other.ckpt")
    (run / "notes.txt").write_text("mine")
    for folder in ("kept", "kept.ckpt"):
        (run / folder).mkdir()
        (run / folder / "mine").write_text("mine")
    hostile = place.format(run=run, other=other, name=tmp_path.name)
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    (state,) = (state for key, state in checkpoint["callbacks"].items() if key.startswith("ModelCheckpoint"))
    state |= {"best_model_path": hostile, "last_model_path": hostile, "kth_best_model_path": hostile}
    state |= {"best_k_models": {hostile: torch.tensor(9.0), f"{hostile}/": torch.tensor(8.0)} if monitor else {}}
    torch.save(checkpoint, tmp_path / "hostile.ckpt")
    fit(watching(run, **options), 6, tmp_path / "hostile.ckpt")
    assert sorted(str(path) for path in other.rglob("*")) == before
    assert all(path.read_text() == "mine" for path in other.rglob("*") if path.is_file())
    for kept in ("notes.txt", "kept/mine", "kept.ckpt/mine", "link", "linked.ckpt", "last.ckpt"):
        assert (run / kept).exists()


def test_a_run_goes_on_with_its_own_paths_also_where_it_was_moved(tmp_path):
    fit(watching(tmp_path / "run"), 4)
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    here = watching(tmp_path / "run")
    fit(here, 6, tmp_path / "run" / "last.ckpt")
    assert len(list((tmp_path / "run").glob("step=*.ckpt"))) == 2, "older ones are replaced as ever"
    assert len(here.best_k_models) == 2
    moved = watching(tmp_path / "moved")
    fit(moved, 6, tmp_path / "moved" / "last.ckpt")
    assert moved.best_model_path.startswith(str(tmp_path / "moved"))
    assert (tmp_path / "run" / "last.ckpt").exists()


@pytest.mark.parametrize("saved", [["../../other/precious"], ["precious"], ["step-000001/../../../other"], ["link"],
                                   ["step-000777"], "step-000001", [3, None], ["step-000001\0"], {"a": 1}])  # fmt: skip
def test_an_adapter_checkpoint_removes_its_own_folders_alone(saved, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    fit(AdapterCheckpoint(1, keep=1, dirpath=run), 2)
    before = canaries(other)
    (run / "link").symlink_to(other)
    (run / "step-000777").symlink_to(other)  # a link of the right name
    shutil.copytree(other, run / "precious")
    checkpoint = torch.load(run / "step-000002" / "resume.ckpt", weights_only=True)
    checkpoint["callbacks"]["AdapterCheckpoint"] = {"saved": saved}
    torch.save(checkpoint, tmp_path / "hostile.ckpt")
    try:
        fit(AdapterCheckpoint(1, keep=1, dirpath=run), 4, tmp_path / "hostile.ckpt")
    except ValueError as error:
        assert "callbacks.AdapterCheckpoint.saved is" in str(error)
    assert sorted(str(path) for path in other.rglob("*")) == before
    assert (run / "precious" / "precious" / "data").exists() and (run / "link").is_symlink()
    assert (run / "step-000777").is_symlink()


def test_a_folder_of_the_right_name_with_other_files_is_kept(tmp_path):
    run = tmp_path / "run"
    fit(AdapterCheckpoint(1, keep=1, dirpath=run), 1)
    (run / "step-000001" / "notes.txt").write_text("mine")
    with pytest.warns(UserWarning, match="is no adapter that this callback wrote"):
        fit(AdapterCheckpoint(1, keep=1, dirpath=run), 2, run / "step-000001" / "resume.ckpt")
    assert (run / "step-000001" / "notes.txt").read_text() == "mine"
    assert json.loads((run / "step-000002" / "adapter.json").read_text())["step"] == 2


def test_the_writer_removes_no_checkpoint_of_others(tmp_path):
    """Without the folders of a run, it removes only files that it has saved itself."""
    io = AtomicCheckpointIO()
    io.save_checkpoint({"global_step": 1}, tmp_path / "run" / "a.ckpt")
    canaries(tmp_path / "other")
    for place in (tmp_path / "other" / "other.ckpt", tmp_path / "other" / "shards.ckpt", tmp_path / "run"):
        with pytest.warns(UserWarning, match="is not a checkpoint in the folder of this run"):
            io.remove_checkpoint(place)
        assert place.exists()
    io.remove_checkpoint(tmp_path / "run" / "a.ckpt")
    assert not (tmp_path / "run" / "a.ckpt").exists()


def test_paths_of_a_folder_elsewhere(tmp_path):
    assert is_own_checkpoint("s3://bucket/run/a.ckpt", "s3://bucket/run")
    for path in (
        "s3://bucket/run/../a.ckpt",
        "s3://bucket/running/a.ckpt",
        "s3://other/a.ckpt",
        str(tmp_path / "a.ckpt"),
    ):
        assert not is_own_checkpoint(path, "s3://bucket/run")
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    for path in (tmp_path / "ring" / "a.ckpt", 3, None, b"a.ckpt", "a" * 10**5 + ".ckpt"):
        assert not is_own_checkpoint(path, tmp_path)
