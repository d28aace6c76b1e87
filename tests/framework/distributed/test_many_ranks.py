"""Every kind of run on two real processes, replicated and sharded: its own config, small, under configs/trainer."""

import json
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from orthotrain.checkpoints.reading import read_checkpoint

FAULTS = Path(__file__).parents[2] / "faults"
RANKS = runpy.run_path(str(FAULTS / "ranks.py"))
POET = ["--model.layers.block_size", "8", "--model.layers.parameterization", "cayley", "--model.merge_every", "2"]
STEPWISE = ["--model.layers.block_size", "8", "--model.resample_every", "2"]
OPTIONS = "pretrain/options"
RUNS = {
    "8-bit Adam": ["-c", "pretrain/paper/poet_llama_8b.yaml", *POET],
    "int8": [
        "-c",
        "pretrain/paper/poet_llama_1.3b.yaml",
        "-c",
        f"{OPTIONS}/int8.yaml",
        *POET,
        "--model.layers.group_size",
        "16",
    ],
    "nf4": ["-c", "pretrain/paper/poet_llama_1.3b.yaml", "-c", f"{OPTIONS}/nf4.yaml", *POET],
    "residual": ["-c", "pretrain/llama_1.3b.yaml", *STEPWISE],
    "Muon": ["-c", "pretrain/adamw_quickstart.yaml", "-c", f"{OPTIONS}/muon.yaml"],
    "LoRA": ["-c", "pretrain/lora_quickstart.yaml", "--model.merge_every", "2", "--model.layers.rank", "4"],
}

COMPARED = ("nf4", "residual", "Muon")
"""With the replicated run; of the others there are such comparisons elsewhere, or sharding could change nothing."""


@pytest.fixture
def small(tmp_path, corpus):
    """Write a config that makes a run small; return its arguments."""

    def write(pretrain=True, **trainer):
        run = tmp_path / "run"
        save = {"dirpath": str(run), "every_n_train_steps": 2, "save_last": True, "enable_version_counter": False}
        settings = {
            "max_steps": 4, "val_check_interval": 4, "limit_val_batches": 1, "num_sanity_val_steps": 0, "logger": False,
            "accumulate_grad_batches": 1, "enable_progress_bar": False, "default_root_dir": str(run),
            "log_every_n_steps": 1, "precision": "32-true",
            "callbacks": [
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": save}],
        }  # fmt: skip
        network = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        network |= {"vocab_size": 320, "num_key_value_heads": 2, "max_position_embeddings": 64}
        data = {
            "source": str(corpus), "streaming": False, "tokenizer": None, "vocab_size": 320, "sequence_length": 32,
            "batch_size": 4, "num_workers": 0, "cache_dir": str(tmp_path.parent / "cache"), "val_fraction": 0.2,
            "test_fraction": 0.0,
        }  # fmt: skip
        config = {"trainer": {**settings, **trainer}}
        if pretrain:
            config |= {
                "model": {"init_args": {"model": {"init_args": {"config": network}}}},
                "data": {"init_args": data},
            }
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(config))
        return ["-c", str(path)]

    return write


def launch(arguments, trainer, log, ranks=2, command="fit", environment=None):
    given = [command, *arguments, "-c", f"trainer/{trainer}.yaml", "--trainer.accelerator", "cpu"]
    job = {"arguments": [*given, "--trainer.devices", str(ranks)]}
    processes = RANKS["start"](FAULTS / "command.py", job, ranks, log=log, environment=environment)
    codes = RANKS["wait"](processes)
    return codes, "".join(path.read_text() for path in sorted(log.parent.glob(f"{log.name}.*")))


@pytest.mark.parametrize("name", RUNS)
def test_pretraining_on_two_ranks(name, small, tmp_path):
    """Replicated and sharded runs reach the same weights, up to the order of sums and the rounding of the storage."""
    found = []
    for trainer in ("ddp", "fsdp2") if name in COMPARED else ("fsdp2",):
        codes, log = launch([*RUNS[name][:2], *small(), *RUNS[name][2:]], trainer, tmp_path / trainer)
        assert codes == [0, 0], log[-3000:]
        found.append(read_checkpoint(tmp_path / "run" / "last.ckpt"))
        assert found[-1]["global_step"] == 4
    states = [checkpoint["state_dict"] for checkpoint in found]
    for tensor, value in states[0].items():
        assert states[-1][tensor].dtype == value.dtype
        if value.dtype == torch.float32:
            torch.testing.assert_close(states[-1][tensor], value, rtol=0, atol=2e-3, msg=tensor)


@pytest.fixture
def finetune(small, tmp_path):
    base = tmp_path / "base"
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(base)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"repeat {i}", "response": f"{i} {i}"}) + "\n" for i in range(64)))
    saving = [{"class_path": "AdapterCheckpoint", "init_args": {"every_n_steps": 2}}]
    arguments = ["-c", "finetune/quickstart.yaml", *small(False, callbacks=saving)]
    arguments += ["--model.model", "PretrainedModel", "--model.model.name", str(base), "--model.layers.block_size", "8"]
    arguments += ["--data.source", str(rows), "--data.tokenizer", str(tokenizer(tmp_path)), "--data.batch_size", "4"]
    arguments += ["--data.max_length", "64"]
    return [*arguments, "--model.max_new_tokens", "4"]


def tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: number for number, text in enumerate(["<pad>", "<eos>", *map(chr, range(32, 127))])}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder / "tok"
    )
    return folder / "tok"


def finetuned(arguments, trainer, folder, step=None):
    run = [*arguments, "--run_folder", str(folder)]
    if step is not None:
        run += ["--ckpt_path", str(folder / "adapters" / f"step-{step:06}" / "resume.ckpt")]
    codes, log = launch(run, trainer, folder.parent / f"{folder.name}.{step}")
    assert codes == [0, 0], log[-3000:]
    return read_checkpoint(folder / "adapters" / "step-000004" / "resume.ckpt")


def test_finetuning_on_two_ranks_and_going_on_with_its_adapter(finetune, tmp_path):
    replicated, sharded = (finetuned(finetune, trainer, tmp_path / trainer) for trainer in ("ddp", "fsdp2"))
    assert replicated["frozen_fingerprints"] == sharded["frozen_fingerprints"]
    assert "model.lm_head.weight" in sharded["frozen_fingerprints"]
    assert not any(name in sharded["state_dict"] for name in sharded["frozen_fingerprints"])
    resumed = finetuned(finetune, "fsdp2", tmp_path / "fsdp2", step=2)
    for name, tensor in replicated["state_dict"].items():
        torch.testing.assert_close(sharded["state_dict"][name], tensor, rtol=0, atol=1e-4, msg=name)
        torch.testing.assert_close(resumed["state_dict"][name], sharded["state_dict"][name], rtol=0, atol=1e-6)


def test_finetuning_of_a_quantised_network_on_two_ranks(finetune, tmp_path):
    finetuned([*finetune, "--model.layers.storage", "nf4"], "fsdp2", tmp_path / "run")


def test_a_sharded_network_predicts_an_uneven_number_of_prompts(small, tmp_path):
    prompts = ["--data.predict_prompts", "['def ', 'class ', 'import ']", "--run_folder", str(tmp_path / "out")]
    run = ["-c", "pretrain/poet_quickstart.yaml", *small(), *POET, *prompts]
    codes, log = launch(run, "fsdp2", tmp_path / "log", command="predict")
    assert codes == [0, 0], log[-3000:]
    rows = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "out").rglob("samples-*.jsonl"))]
    assert rows == [2, 1]


def test_ranks_that_see_different_checkpoints_are_stopped(small, tmp_path):
    """As on hosts without a shared folder: one finds a checkpoint to resume from, the other none."""
    run = ["-c", "pretrain/poet_quickstart.yaml", *small(), *POET]
    codes, log = launch([*run, "--trainer.max_steps", "2"], "cpu", tmp_path / "first", ranks=1)
    assert codes == [0], log[-3000:]
    port, processes, logs = RANKS["free_port"](), [], []
    for rank in range(2):
        logs.append(tmp_path / f"host{rank}")
        own = ["--trainer.callbacks.dirpath", str(tmp_path / ("run" if rank == 0 else "elsewhere"))]
        given = ["fit", *run, *own, "-c", "trainer/ddp.yaml", "--trainer.accelerator", "cpu", "--trainer.devices", "2"]
        job = {"arguments": [*given, "--ckpt_path", "last"]}
        environment = RANKS["rank_environment"](rank, 2, port)
        processes += RANKS["start"](FAULTS / "command.py", job, 1, log=logs[-1], environment=environment)
    codes = RANKS["wait"](processes)
    text = [Path(f"{log}.0").read_text() for log in logs]
    assert codes == [2, 2], text
    for said in text:
        assert "rank 0 sees last.ckpt of step 2, rank 1 sees no checkpoint" in said
        assert "put the run folder on a file system that all hosts share" in said


def test_a_distributed_checkpoint_on_one_device_says_what_to_do(small, tmp_path):
    run = ["-c", "pretrain/poet_quickstart.yaml", *small(), *POET, "--ckpt_path", str(tmp_path / "x.ckpt")]
    (tmp_path / "x.ckpt").mkdir()
    codes, log = launch(run, "cpu", tmp_path / "log", ranks=1)
    assert codes == [2] and "is a folder, as FSDP2 writes it" in log and "orthotrain consolidate" in log
