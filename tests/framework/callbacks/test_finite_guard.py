"""A run that diverges in one gradient: it stops, says where, and leaves a last checkpoint that is good."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from orthotrain.callbacks import FiniteGuard, MergeRotations
from orthotrain.callbacks.finite_guard import Note, first_non_finite, norms, stacked
from orthotrain.checkpoints.reading import read_checkpoint
from orthotrain.errors import ConfigurationError, TrainingDiverged
from orthotrain.modules import Optimization, PoetLayers, PoetModule
from orthotrain.optimizers import LieOptimizer


class Poisoned(PoetModule):
    """One gradient of the fourth step is not finite."""

    side, value = "rotation_in", float("inf")

    def loss(self, batch):
        return (self(batch) - batch.flip(-1)).square().mean()

    def on_train_start(self):
        super().on_train_start()
        getattr(self.model[2], self.side).generators.register_hook(self.poison)

    def poison(self, gradient):
        if self.global_step == 3:
            gradient = gradient.clone()
            gradient[0, 0] = self.value
        return gradient


def module(stepwise, **options):
    net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    layers = PoetLayers(block_size=4, exclude=[], stepwise=stepwise, parameterization="cayley")
    lie = (lambda groups: LieOptimizer(groups, **options)) if stepwise else None
    recipe = Optimization(lr=1e-2, rotation_lr=0.01, rotation_optimizer=lie)
    return Poisoned(net, layers, merge_every=1 if stepwise else 4, optimization=recipe)


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


# if sides take turns, one side rests in the step: its generators stay finite, its momentum would not
@pytest.mark.parametrize("side", ["rotation_in", "rotation_out"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("stepwise", "options"), [(False, {}), (True, {}), (True, {"direction": "sign"}), (True, {"direction": "adam"})]
)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_poisoned_generator_reaches_no_checkpoint(stepwise, options, side, value, clip, tmp_path):
    run = module(stepwise, **options)
    run.side, run.value = side, value
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = L.Trainer(
        max_steps=8, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[saver], gradient_clip_val=clip,
    )  # fmt: skip
    message = rf"at optimizer step 4 \(batch 3\): the gradient of model.2.{side}.generators holds NaN or infinite"
    with pytest.raises(TrainingDiverged, match=message):
        trainer.fit(run, DataLoader(torch.randn(64, 16), batch_size=4))
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
    last = read_checkpoint(tmp_path / "step=3.ckpt")
    found = [t for t in tensors([last["state_dict"], last["optimizer_states"]]) if t.is_floating_point()]
    assert len(found) > 8 and all(bool(torch.isfinite(t).all()) for t in found)
    # nor does it reach the frozen weights of the network in memory
    assert all(bool(torch.isfinite(p).all()) for p in run.parameters() if not p.requires_grad)


def test_after_the_merging_it_would_come_too_late():
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[MergeRotations(1), guard := FiniteGuard()],
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="FiniteGuard comes after MergeRotations"):
        guard.on_fit_start(trainer, None)


def test_a_gradient_scaler_leaves_such_steps_out_itself():
    network = nn.Linear(2, 1)
    network.weight.grad = torch.full((1, 2), float("inf"))
    for scaler, noted in ((object(), []), (None, ["weight"])):
        guard, trainer = FiniteGuard(), SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
        guard.on_before_optimizer_step(trainer, network, None)
        assert list(guard._gradients) == noted


def test_large_values_in_16_bits_are_finite():
    large = {"a": torch.full((100,), 6e4, dtype=torch.float16), "empty": torch.empty(0), "b": torch.tensor([1e15])}
    assert first_non_finite(notes(large, {})) is None and first_non_finite(notes({})) is None
    found = notes(large, {}, {**large, "c": torch.tensor([1.0, float("nan")])})
    note, place, value = first_non_finite(found)
    assert note is found[2] and note.names[place] == "c" and value != value


def notes(*batches):
    """The notes that batches with these tensors leave."""
    values = [norms(batch) for batch in batches]
    return [Note(step + 1, step, list(own), stacked(own)) for step, own in enumerate(values)]


def test_whoever_saves_after_the_error_is_refused_too(tmp_path):
    rows = DataLoader(torch.randn(32, 16), batch_size=4)
    trainer = L.Trainer(
        max_steps=8, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)],
    )  # fmt: skip
    with pytest.raises(TrainingDiverged):
        trainer.fit(module(False), rows)
    saved = (tmp_path / "last.ckpt").read_bytes()
    with pytest.raises(TrainingDiverged):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").read_bytes() == saved


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_norms_of_wide_narrow_and_sparse_gradients(dtype):
    values = torch.tensor([[3.0, 4.0]], dtype=dtype)
    sparse = torch.sparse_coo_tensor(torch.tensor([[2]]), values, (5, 2))
    assert {name: float(norm) for name, norm in norms({"dense": values, "sparse": sparse}).items()} == {
        "dense": 5.0,
        "sparse": 5.0,
    }
