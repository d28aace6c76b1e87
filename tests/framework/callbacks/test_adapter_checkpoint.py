"""AdapterCheckpoint in a real Trainer on a real Llama: what it writes, keeps and refuses, and bit-exact resume."""

import copy
import json

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from orthotrain.adapters import adapter_state, load_adapter, load_adapter_state
from orthotrain.callbacks import AdapterCheckpoint, FiniteGuard, MergeRotations
from orthotrain.data import TextData
from orthotrain.errors import ConfigurationError
from orthotrain.layers import OftLinear, replace_linears
from orthotrain.modules import BaseModule, Optimization
from orthotrain.schedules import CosineWithWarmup


class Finetune(BaseModule):
    """Rotations of all projections and the final norm are trained; everything else is frozen."""

    def __init__(self, config, seed=5, **options):
        def build():
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                return LlamaForCausalLM(LlamaConfig(**config))

        schedule = Optimization(lr=1e-2, rotation_lr=1e-2, scheduler=lambda o: CosineWithWarmup(o, warmup_steps=2))
        super().__init__(build, schedule)
        self.options = options
        self.save_hyperparameters({"seed": seed})

    def wrap(self, model):
        model.requires_grad_(False)
        replace_linears(model, ["*_proj"], factory=lambda lin: OftLinear.from_linear(lin, 8, **self.options))
        model.model.norm.requires_grad_(True)


@pytest.fixture
def data(corpus):
    """Data that can resume in the middle of an epoch."""
    return lambda: TextData(
        str(corpus),
        vocab_size=300,
        sequence_length=16,
        batch_size=4,
        cache_dir=str(corpus.parent / "cache"),
        val_fraction=0.0,
        test_fraction=0.0,
    )


@pytest.fixture
def config(tiny_llama):
    return {**tiny_llama, "vocab_size": 300}


def fit(module, data, folder, steps, callbacks, ckpt_path=None, **kwargs):
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        callbacks=callbacks,
        **kwargs,
    )
    trainer.fit(module, datamodule=data(), ckpt_path=ckpt_path)
    return copy.deepcopy(module.state_dict())


def test_folders_appear_complete_and_the_last_ones_are_kept(config, data, tmp_path):
    module = Finetune(config)
    callback = AdapterCheckpoint(every_n_steps=2, keep=2, dirpath=tmp_path / "a")
    fit(module, data, tmp_path, 7, [callback, ModelCheckpoint(tmp_path / "full", every_n_train_steps=7)])
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["step-000006", "step-000007"]
    last = tmp_path / "a" / "step-000007"
    assert callback.last_model_path == str(last / "resume.ckpt")
    assert sorted(path.name for path in last.iterdir()) == ["adapter.json", "adapter.safetensors", "resume.ckpt"]
    weights = load_file(last / "adapter.safetensors")
    trained = adapter_state(module.model)
    assert set(weights) == set(trained)
    assert all(torch.equal(weights[name], trained[name]) for name in trained)
    description = json.loads((last / "adapter.json").read_text())
    count = sum(tensor.numel() for tensor in trained.values())
    assert (description["step"], description["parameters"], description["config"]) == (7, count, {"seed": 5})
    small, (full,) = torch.load(last / "resume.ckpt", weights_only=True), (tmp_path / "full").iterdir()
    assert set(small["state_dict"]) == {f"model.{name}" for name in trained}
    assert len(torch.load(full, weights_only=True)["state_dict"]) > len(small["state_dict"])
    other = Finetune(config)
    other.configure_model()
    load_adapter_state(other.model, weights)
    x = torch.arange(8)[None]
    assert torch.equal(other.model.eval()(x).logits, module.model.eval()(x).logits)


@pytest.mark.parametrize("stop", [3, 5, 6, "full"])
def test_resume_continues_to_the_same_bits(config, data, tmp_path, stop):
    """In the middle of an epoch with accumulation, and at its end; from a full checkpoint too."""

    def run(name, ckpt_path=None):
        adapters = AdapterCheckpoint(every_n_steps=1, keep=9, dirpath=tmp_path / name)
        full = ModelCheckpoint(tmp_path / f"full-{name}", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        return fit(Finetune(config), data, tmp_path, 9, [adapters, full], ckpt_path, accumulate_grad_batches=2)

    whole = run("a")
    path = (
        tmp_path / "full-a" / "step=4.ckpt" if stop == "full" else tmp_path / "a" / f"step-{stop:06d}" / "resume.ckpt"
    )
    resumed = run("b", path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    first = 5 if stop == "full" else stop + 1
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [f"step-00000{n}" for n in range(first, 10)]
    for name in (f"step-00000{n}" for n in range(first, 10)):
        a, b = (load_file(tmp_path / run / name / "adapter.safetensors") for run in "ab")
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_last_checkpoint_of_a_run_continues_with_more_steps(config, data, tmp_path):
    constant = Optimization(lr=1e-2)

    def run(name, steps, ckpt_path=None):
        module = Finetune(config, storage="int8", group_size=8)
        module.optimization = constant
        return fit(module, data, tmp_path, steps, [AdapterCheckpoint(100, dirpath=tmp_path / name)], ckpt_path)

    whole = run("whole", 8)
    run("first", 5)
    resumed = run("second", 8, tmp_path / "first" / "step-000005" / "resume.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_another_base_or_another_model_is_refused(config, data, tmp_path):
    fit(Finetune(config), data, tmp_path, 1, [AdapterCheckpoint(1, dirpath=tmp_path / "a")])
    path = tmp_path / "a" / "step-000001" / "resume.ckpt"
    with pytest.raises(ConfigurationError, match=r"the frozen model\.\S+ is not the one"):
        fit(Finetune(config, seed=6), data, tmp_path, 2, [], path, enable_checkpointing=False)
    with pytest.raises(ConfigurationError, match=r"the frozen model\.\S+ is not the one"):
        fit(Finetune({**config, "intermediate_size": 64}), data, tmp_path, 2, [], path, enable_checkpointing=False)
    with pytest.raises(ConfigurationError, match=r"this model has no \S*layers\.1\.\S+"):
        fit(Finetune({**config, "num_hidden_layers": 1}), data, tmp_path, 2, [], path, enable_checkpointing=False)


def test_an_interrupted_write_leaves_the_older_checkpoint(config, data, tmp_path, monkeypatch):
    folder = tmp_path / "a"
    fit(Finetune(config), data, tmp_path, 1, [AdapterCheckpoint(1, dirpath=folder)])
    before = (folder / "step-000001" / "adapter.safetensors").read_bytes()

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("orthotrain.callbacks.adapter_checkpoint.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        fit(Finetune(config), data, tmp_path, 1, [AdapterCheckpoint(1, dirpath=folder)])
    assert (folder / "step-000001" / "adapter.safetensors").read_bytes() == before
    monkeypatch.undo()
    fit(Finetune(config), data, tmp_path, 1, [AdapterCheckpoint(1, dirpath=folder)])
    assert [path.name for path in folder.iterdir()] == ["step-000001"]


def test_refusals(config, data, tmp_path):
    for arguments in ({"every_n_steps": 0}, {"keep": 0}, {"every_n_steps": True}):
        with pytest.raises(ConfigurationError, match=next(iter(arguments))):
            AdapterCheckpoint(**arguments)
    with pytest.raises(ConfigurationError, match="MergeRotations changes them"):
        fit(Finetune(config), data, tmp_path, 1, [AdapterCheckpoint(1), FiniteGuard(), MergeRotations(1)])
    with pytest.raises(ConfigurationError, match="AsyncCheckpointIO"):
        fit(Finetune(config), data, tmp_path, 1, [AdapterCheckpoint(1)], plugins=[AsyncCheckpointIO()])


def test_an_adapter_is_compared_with_its_checksum(config, data, tmp_path):
    """The checksum that is written beside the file; a file without a description is read without a check."""
    fit(Finetune(config), data, tmp_path, 1, [AdapterCheckpoint(1, dirpath=tmp_path / "a")])
    folder, network = tmp_path / "a" / "step-000001", Finetune(config)
    network.configure_model()
    load_adapter(network.model, folder)
    path = folder / "adapter.safetensors"
    original = path.read_bytes()
    path.write_bytes(original[:-3] + bytes([original[-3] ^ 1]) + original[-2:])
    for name in (folder, path):
        with pytest.raises(ConfigurationError, match="adapter.safetensors' does not match its checksum"):
            load_adapter(network.model, name)
    (folder / "adapter.json").rename(folder / "notes.json")
    load_adapter(network.model, folder)
    for text in ("[1]", '{"crc32": 3}', "{", "\xff", "[" * 10**5):
        (folder / "adapter.json").write_text(text, encoding="latin1")
        with pytest.raises(ConfigurationError, match="adapter.json' is not (a description|valid JSON)"):
            load_adapter(network.model, folder)
    with pytest.raises(ConfigurationError, match="NUL"):
        load_adapter(network.model, "a\0b")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(config, value):
    network = Finetune(config)
    network.configure_model()
    state = adapter_state(network.model)
    name = next(iter(state))
    state[name].view(-1)[3] = value
    before = adapter_state(network.model)
    with pytest.raises(ConfigurationError, match=f"the adapter holds NaN or infinite values in {name}"):
        load_adapter_state(network.model, state)
    assert all(torch.equal(before[key], tensor) for key, tensor in adapter_state(network.model).items())


@pytest.mark.parametrize("failing", ["save_file", "publish"])
def test_a_failure_leaves_nothing_half_written(config, data, tmp_path, monkeypatch, failing):
    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"orthotrain.callbacks.adapter_checkpoint.{failing}", fail)
    with pytest.raises(OSError, match="No space"):
        fit(Finetune(config), data, tmp_path, 1, [AdapterCheckpoint(1, dirpath=tmp_path / "a")])
    assert list((tmp_path / "a").iterdir()) == []
