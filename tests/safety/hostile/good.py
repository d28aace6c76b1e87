"""What the hostile inputs are made from: the files of a small real run of each kind, made once a session."""

import json
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

NETWORK = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def pretraining(run: Path, corpus: Path, cache: Path) -> dict[str, Any]:
    """Return the config of a POET run of two steps; ``run`` is its folder."""
    saves = {"every_n_train_steps": 1, "save_last": True, "save_top_k": 1, "dirpath": str(run / "checkpoints")}
    saves["enable_version_counter"] = False
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 0.95]}}
    scheduler = {"class_path": "CosineWithWarmup", "init_args": {"warmup_steps": 1}}
    layers = {"block_size": 8, "parameterization": {"class_path": "Cayley"}, "overrides": {"*mlp*": {"sides": "in"}}}
    module = {
        "merge_every": 2,
        "layers": layers,
        "optimization": {"lr": 0.01, "optimizer": optimizer, "scheduler": scheduler},
        "model": {"class_path": "CausalLM", "init_args": {"config": NETWORK}},
    }
    data = {"source": str(corpus), "vocab_size": 320, "sequence_length": 32, "batch_size": 4, "cache_dir": str(cache)}
    return {
        "seed_everything": 0,
        "trainer": {**trainer(run), "callbacks": [{"class_path": "ModelCheckpoint", "init_args": saves}]},
        "model": {"class_path": "PoetModule", "init_args": module},
        "data": {"class_path": "TextData", "init_args": {**data, "val_fraction": 0.2, "test_fraction": 0.2}},
    }


def finetuning(run: Path, base: Path, rows: Path) -> dict[str, Any]:
    """Return the config of an OFT run of two steps that starts from the model folder ``base``."""
    saves = {"class_path": "AdapterCheckpoint", "init_args": {"every_n_steps": 1, "dirpath": str(run / "adapters")}}
    network = {"class_path": "PretrainedModel", "init_args": {"name": str(base)}}
    data = {"source": str(rows), "tokenizer": str(base), "max_length": 64, "batch_size": 4, "val_fraction": 0.2}
    return {
        "seed_everything": 0,
        "trainer": {**trainer(run), "callbacks": [saves]},
        "model": {
            "class_path": "OftModule",
            "init_args": {"layers": {"block_size": 8}, "max_new_tokens": 2, "model": network},
        },
        "data": {"class_path": "InstructionData", "init_args": {**data, "generation_samples": 2}},
    }


def trainer(run: Path) -> dict[str, Any]:
    """Return the trainer's part of a config."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    steps = {"max_steps": 2, "limit_val_batches": 1, "limit_test_batches": 1, "num_sanity_val_steps": 0}
    return {"accelerator": "cpu", "precision": "32-true", "default_root_dir": str(run), **quiet, **steps}


@dataclass(frozen=True)
class Good:
    """The files, all of them only to be read; ``folder`` holds them."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        places = {
            "corpus": "corpus", "rows": "rows.jsonl", "cache": "cache", "pretrain": "pretrain.yaml",
            "finetune": "finetune.yaml", "run": "run", "checkpoint": "run/checkpoints/last.ckpt", "model": "model",
            "adapters": "tune/adapters", "resume": "tune/adapters/step-000002/resume.ckpt",
            "adapter": "tune/adapters/step-000002/adapter.safetensors", "peft": "peft", "shards": "shards.ckpt",
        }  # fmt: skip
        if name.startswith("_"):
            raise AttributeError(name)
        return self.folder / places[name]

    def contents(self, name: str = "checkpoint") -> dict[str, Any]:
        """Return a checkpoint as a dictionary of one's own."""
        return torch.load(getattr(self, name), weights_only=True)

    def config(self, name: str = "pretrain") -> dict[str, Any]:
        """Return a config as a dictionary of one's own."""
        return yaml.safe_load(getattr(self, name).read_text())


def make_good(folder: Path, run: Any) -> Good:
    """Make everything below ``folder``.

    Args:
        folder: A new folder.
        run: Called with arguments of the command line, or with ``entry=`` and those of a function of entries.py.
    """
    good = Good(folder)
    good.corpus.mkdir(parents=True)
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-b]*.py"))[:12]:
        text = path.read_text(encoding="utf-8")[:6000]
        (good.corpus / f"{path.stem}.txt").write_text(text, encoding="utf-8")
    rows = [{"prompt": f"repeat {number}", "response": f"{number} {number}"} for number in range(40)]
    good.rows.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    good.pretrain.write_text(yaml.safe_dump(pretraining(good.run, good.corpus, good.cache)))
    good.finetune.write_text(yaml.safe_dump(finetuning(folder / "tune", good.model, good.rows)))
    run(["fit", "-c", good.pretrain])
    run(["export", "--ckpt", good.checkpoint, "--out", good.model])
    run(["fit", "-c", good.finetune])
    run(["export", "--ckpt", good.resume, "--out", good.peft, "--format", "peft"])
    run([str(good.checkpoint), str(good.shards)], entry="make_shards")
    return good
