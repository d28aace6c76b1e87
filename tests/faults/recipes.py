"""The runs that the harness breaks: a network of a few thousand parameters, 12 steps, a checkpoint every two steps."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

STEPS, EVERY = 12, 2


@dataclass(frozen=True)
class Recipe:
    """What a run is.

    Attributes:
        name: Suffix in the table of faults; empty for POET on one rank or under DDP.
        ranks: Number of processes; more than one runs under DDP, or sharded.
        sharded: Whether the run uses FSDP2, and each rank writes its part of a checkpoint.
        stepwise: Whether rotations are folded every step.
        adapter: Whether the run finetunes the result of ``POET`` and saves its trained parameters alone.
    """

    name: str = ""
    ranks: int = 1
    sharded: bool = False
    stepwise: bool = False
    adapter: bool = False


POET = Recipe()
DDP = Recipe(ranks=2)
STEPWISE = Recipe("step-wise POET", stepwise=True)
SHARDED = Recipe("sharded checkpoints (FSDP2)", ranks=2, sharded=True)
STEPWISE_SHARDED = Recipe("sharded checkpoints (FSDP2) of step-wise POET", ranks=2, sharded=True, stepwise=True)
ADAPTER = Recipe("finetuning with AdapterCheckpoint", adapter=True)


def config(recipe, run, corpus, pretrained):
    """Return the config of a run as YAML would hold it.

    Args:
        recipe: What the run is.
        run: Folder of its checkpoints.
        corpus: Folder with its text.
        pretrained: The checkpoint that an adapter's run starts from.
    """
    checkpoints = {"dirpath": str(run), "every_n_train_steps": EVERY, "save_top_k": 2, "save_last": True}
    checkpoints |= {"monitor": "step", "mode": "max", "enable_version_counter": False}
    saves = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints}
    if recipe.adapter:
        options = {"every_n_steps": EVERY, "keep": 2, "dirpath": str(run)}
        saves = {"class_path": "AdapterCheckpoint", "init_args": options}
    trainer = {
        "max_steps": STEPS, "accumulate_grad_batches": 2 // recipe.ranks, "logger": False, "limit_val_batches": 0,
        "enable_progress_bar": False, "enable_model_summary": False, "gradient_clip_val": 1.0,
        "default_root_dir": f"{run}.root", "callbacks": [saves],
    }  # fmt: skip
    module, data = finetuning(corpus, pretrained) if recipe.adapter else pretraining(recipe, corpus)
    return {"seed_everything": 0, "trainer": trainer, "model": module, "data": data}


def pretraining(recipe, corpus):
    """The module and the data of a POET run."""
    network = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    network |= {"num_attention_heads": 2, "max_position_embeddings": 64}
    options = {"merge_every": 3, "layers": {"block_size": 8}}
    if recipe.stepwise:  # permutations are drawn anew at some of the checkpoints, and between others
        options = {"merge_every": 1, "resample_every": 5, "layers": {"block_size": 8}}
        options["layers"] |= {"stepwise": True, "trained_scale": True}
        options |= {"optimization": {"rotation_lr": 0.035, "rotation_optimizer": {"class_path": "LieOptimizer"}}}
    model = {"class_path": "CausalLM", "init_args": {"config": network}}
    text = {"source": str(corpus), "vocab_size": 320, "sequence_length": 32, "batch_size": 4, "val_fraction": 0.0}
    text |= {"test_fraction": 0.0, "cache_dir": str(Path(corpus).parent / "cache")}
    return (
        {"class_path": "PoetModule", "init_args": {**options, "model": model}},
        {"class_path": "TextData", "init_args": text},
    )


def finetuning(corpus, pretrained):
    """The module and the data of an OFT run: consecutive lines of the corpus, one epoch and a half."""
    source = Path(corpus).parent / "pairs.jsonl"
    if not source.exists():
        lines = [line for path in sorted(Path(corpus).iterdir()) for line in path.read_text().splitlines() if line]
        pairs = [{"prompt": a, "response": b} for a, b in itertools.pairwise(lines[:61])]
        source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    model = {"class_path": "CheckpointModel", "init_args": {"path": str(pretrained)}}
    options = {"layers": {"block_size": 8}, "max_new_tokens": 0, "model": model}
    rows = {"source": str(source), "tokenizer": str(pretrained), "batch_size": 4, "max_length": 64}
    rows |= {"val_fraction": 0.0, "on_too_long": "truncate"}
    return (
        {"class_path": "OftModule", "init_args": options},
        {"class_path": "InstructionData", "init_args": rows},
    )


def placement(recipe):
    """Return the arguments that add a config of configs/trainer to the run."""
    if recipe.ranks == 1:
        return ["-c", "trainer/cpu.yaml"]
    file = "trainer/fsdp2.yaml" if recipe.sharded else "trainer/ddp.yaml"
    arguments = ["-c", file, "--trainer.accelerator", "cpu", "--trainer.devices", str(recipe.ranks)]
    if recipe.sharded:
        arguments += ["--trainer.strategy.init_args.save_distributed_checkpoint", "true"]
    return arguments
