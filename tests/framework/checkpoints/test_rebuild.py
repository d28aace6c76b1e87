"""A module from its checkpoint: one of the command line alone, one of another program with what was not stored."""

import json

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from orthotrain.checkpoints.reading import read_checkpoint
from orthotrain.errors import ConfigurationError
from orthotrain.export import CheckpointModel, load_network
from orthotrain.models import CausalLM
from orthotrain.modules import OftModule, Optimization, PoetLayers, PoetModule

NAMES = {"class_path": "orthotrain.modules.PoetModule"}


class Regression(PoetModule):
    """A module of somebody's own, around a network of somebody's own."""

    def __init__(self, *arguments, margin: float = 0.5, **more):
        super().__init__(*arguments, **more)
        self.save_hyperparameters("margin")
        self.margin = margin

    def loss(self, batch):
        return (self(batch) - self.margin).pow(2).mean()


def described(tiny_llama, **more):
    """A checkpoint as ``orthotrain fit`` writes it, in memory."""
    module = PoetModule(CausalLM(tiny_llama), PoetLayers(block_size=8), 2)
    module.configure_model()
    arguments = {
        "model": {"class_path": "orthotrain.models.CausalLM", "init_args": {"config": tiny_llama}},
        "layers": {"block_size": 8},
        "merge_every": 2,
        **more,
    }
    contents = {"state_dict": module.state_dict(), "hyper_parameters": {**NAMES, "init_args": arguments}}
    module.on_save_checkpoint(contents)
    return contents


def saved(contents, path):
    torch.save(contents, path)
    return str(path)


def test_a_module_comes_back_from_its_checkpoint_alone(tiny_llama, tmp_path):
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 0.95]}}
    contents = described(tiny_llama, optimization={"lr": 0.25, "optimizer": optimizer})
    file = saved(contents, tmp_path / "last.ckpt")
    for cls in (PoetModule, PoetModule.__mro__[1]):
        module = cls.load_from_checkpoint(file)
        assert type(module) is PoetModule and module.training and module.merging.every_n_steps == 2
        assert module.optimization.lr == 0.25 and module.optimization.optimizer.keywords == {"betas": (0.9, 0.95)}
        for name, value in module.state_dict().items():
            assert torch.equal(value, contents["state_dict"][name])
    assert PoetModule.load_from_checkpoint(file, optimization=Optimization(lr=1.0)).optimization.lr == 1.0
    assert PoetModule.load_from_checkpoint(file, map_location="meta").device.type == "meta"


def test_a_checkpoint_of_another_module_or_with_other_options_is_refused(tiny_llama, tmp_path):
    file = saved(described(tiny_llama), tmp_path / "last.ckpt")
    with pytest.raises(
        ConfigurationError, match="last.ckpt: the checkpoint is of a PoetModule, which is not a .*OftModule"
    ):
        OftModule.load_from_checkpoint(file)
    with pytest.raises(ConfigurationError, match=r"load_from_checkpoint\(hparams_file=...\)"):
        PoetModule.load_from_checkpoint(file, hparams_file="x.yaml")
    with pytest.raises(ConfigurationError, match="trained with seed=0, this run has 1"):
        PoetModule.load_from_checkpoint(file, seed=1)


@pytest.mark.parametrize("key", ["_instantiator", "_class_path", "__class__"])
def test_what_lightning_would_run_is_not_looked_at(tiny_llama, tmp_path, key, monkeypatch):
    contents = described(tiny_llama)
    contents["hyper_parameters"] |= {key: "lightning.pytorch.cli.instantiate_module", "config": {"model": "os.abort"}}
    monkeypatch.setattr("lightning.pytorch.core.saving._load_state", lambda *a, **k: pytest.fail("Lightning's loader"))
    assert type(PoetModule.load_from_checkpoint(saved(contents, tmp_path / "last.ckpt"))) is PoetModule


def test_a_module_of_another_program_needs_what_is_not_stored(tmp_path):
    torch.manual_seed(1)
    layers = PoetLayers(block_size=4, exclude=[])
    module = Regression(nn.Sequential(nn.Linear(8, 8)), layers, 2, margin=0.25)
    rows = DataLoader(torch.randn(8, 8), batch_size=4)
    trainer = L.Trainer(max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        default_root_dir=tmp_path, accelerator="cpu")  # fmt: skip
    trainer.fit(module, rows)
    trainer.save_checkpoint(file := tmp_path / "own.ckpt")
    with pytest.raises(
        ConfigurationError, match=r"Regression needs model; .* Regression.load_from_checkpoint\(file, mo"
    ):
        Regression.load_from_checkpoint(file)
    loaded = Regression.load_from_checkpoint(file, model=nn.Sequential(nn.Linear(8, 8)), layers=layers)
    assert loaded.margin == 0.25 and loaded.merging.every_n_steps == 2
    assert torch.equal(loaded(torch.ones(1, 8)), module(torch.ones(1, 8)))
    with pytest.raises(ConfigurationError, match="own.ckpt: .*block_size"):
        Regression.load_from_checkpoint(file, model=nn.Sequential(nn.Linear(8, 8)), layers=PoetLayers(block_size=2))
    with pytest.raises(ConfigurationError, match="BaseModule needs model"):
        load_network(read_checkpoint(file), str(file))


HOSTILE = [
    {"optimization": {"optimizer": json.dumps({"class_path": "os.system", "init_args": {"command": "mkdir sprung"}})}},
    {"optimization": {"optimizer": "{class_path: os.mkdir, init_args: {path: sprung}}"}},
    {"optimization": {"scheduler": "file:///evil.yaml"}},
    {"optimization": {"rotation_optimizer": "evil.yaml"}},
    {"optimization": {"optimizer_overrides": {"*": {"class_path": "subprocess.Popen", "init_args": {"args": "x"}}}}},
    {"optimization": json.dumps({"optimizer": {"class_path": "os.mkdir"}})},
    {"optimization": {"class_path": "evil.Settings"}},
    {"optimization.optimizer": {"class_path": "os.mkdir"}},
    {"model": json.dumps({"class_path": "orthotrain.models.PretrainedModel", "init_args": {"name": "x"}})},
    {"model": {"class_path": "orthotrain.models.PretrainedModel", "init_args.trust_remote_code": True}},
    {"model": {"class_path": "orthotrain.models.CausalLM", "init_args": {"config": "evil.yaml"}}},
    {"layers": "evil.yaml"},
    {"layers": {"parameterization": "evil.Cayley"}},
    {"layers": {"parameterization": {"class_path": "evil.Cayley"}}},
    {"layers": {"overrides": {"*": {"parameterization": "evil.Cayley"}}}},
    {"layers": {"overrides": {"*": {"parameterization": {"class_path": "evil.Cayley"}}}}},
    {"optimization": {"clip_ramp": {"class_path": "evil.Ramp"}}},
    {"layers": {"freeze": [{"class_path": "evil.Pattern"}]}},
]


@pytest.mark.parametrize("arguments", HOSTILE, ids=str)
@pytest.mark.parametrize("way", ["load_network", "load_from_checkpoint", "CheckpointModel"])
def test_no_argument_of_a_description_runs_code(tiny_llama, tmp_path, monkeypatch, arguments, way):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('sprung')\n")
    (tmp_path / "evil.yaml").write_text("class_path: evil.Cayley\nvocab_size: 4\n")
    file = saved(described(tiny_llama, **arguments), tmp_path / "bad.ckpt")
    ways = {
        "load_network": lambda: load_network(read_checkpoint(file), file),
        "load_from_checkpoint": lambda: PoetModule.load_from_checkpoint(file),
        "CheckpointModel": CheckpointModel(file),
    }
    with pytest.raises(ConfigurationError, match=r"bad\.ckpt"):
        ways[way]()
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_that_starts_from_itself_is_refused(tiny_llama, tmp_path):
    (tmp_path / "other.ckpt").symlink_to("bad.ckpt")
    model = {
        "class_path": "orthotrain.export.CheckpointModel",
        "init_args": {"path": str(tmp_path / "other.ckpt")},
    }
    file = saved(described(tiny_llama, model=model), tmp_path / "bad.ckpt")
    with pytest.raises(ConfigurationError, match="bad.ckpt: .*describes its network by the file itself"):
        CheckpointModel(file)()
