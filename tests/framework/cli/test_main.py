"""The command line: every command once for real, and bad input as one line with exit code 2."""

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orthotrain.checkpoints.reading import read_checkpoint
from orthotrain.cli.main import COMMANDS, TRAINER_COMMANDS, main
from orthotrain.cli.trainer_cli import no_child_left
from orthotrain.data.corpus.tokenizing import build_caches
from orthotrain.errors import ConfigurationError
from orthotrain.export import load_network
from orthotrain.modules import PoetModule

QUICK = ["-c", "pretrain/poet_quickstart.yaml"]


def refuse(capsys, *arguments):
    """Run a command that must fail; return its one line."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("orthotrain: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_from_fit_to_an_exported_model(small_config, tmp_path, capsys):
    command = [*QUICK, "-c", str(small_config)]
    main(["fit", *command])
    printed = capsys.readouterr().out
    for word in ("validation bits per byte", "tokens per second", "spectrum drift", "curves", "checkpoint", "sample"):
        assert word in printed
    run = tmp_path / "run"
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 6 and summary["merges"] == 3 and 0 <= summary["spectrum_drift"] < 1e-4
    assert f"{summary['trainable_parameters']:,} trained of {summary['total_parameters']:,}" in printed
    assert f"tokens per second         {summary['tokens_per_second']:,.0f}\n" in printed
    assert summary["checkpoint"] == str(run / "checkpoints" / "last.ckpt") and summary["early_folds"] is None
    config, last = (run / "config.yaml").read_bytes(), run / "checkpoints" / "last.ckpt"
    assert summary["config_sha256"] == hashlib.sha256(config).hexdigest()
    assert set(summary["data_digests"]) == {"train", "val"} and len(set(summary["data_digests"].values())) == 2
    refuse(capsys, "fit", *command, "--ckpt_path", str(last), "--data.seed", "7")
    assert (run / "config.yaml").read_bytes() == config, "a refused run leaves the config as it was"

    main(["validate", *command, "--ckpt_path", "last"])
    main(["test", *command, "--ckpt_path", str(last)])
    main(["predict", *command, "--ckpt_path", str(last), "--data.predict_prompts", "['def ', 'import os']"])
    rows = [json.loads(line) for line in (run / "samples-0.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["def ", "import os"] and all(row["continuation"] for row in rows)

    out = tmp_path / "exported"
    main(["export", "--ckpt", str(last), "--out", str(out)])
    assert not [name for name in load_file(out / "model.safetensors") if "rotation" in name or "generators" in name]
    merged, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([tokenizer.encode("def main(argv):\n    return")])
    wrapped = load_network(read_checkpoint(last))
    module = PoetModule.load_from_checkpoint(last)
    assert all(torch.equal(value, module.model.state_dict()[name]) for name, value in wrapped.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, wrapped(ids).logits, rtol=1e-5, atol=1e-5)
    assert tokenizer.decode(ids[0]) == "def main(argv):\n    return"

    main(["export", "--ckpt", str(last), "--out", str(tmp_path / "narrow"), "--dtype", "bfloat16"])
    assert {tensor.dtype for tensor in load_file(tmp_path / "narrow" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert "is not empty" in refuse(capsys, "export", "--ckpt", str(last), "--out", str(out))
    adapter = ["export", "--ckpt", str(last), "--out", "x", "--format", "peft"]
    assert "--dtype float16 with --format peft" in refuse(capsys, *adapter, "--dtype", "float16")
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(last.read_bytes()[:1000])
    message = refuse(capsys, "export", "--ckpt", str(truncated), "--out", "x")
    assert "truncated.ckpt' cannot be read: it is not a checkpoint, or is truncated" in message
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert len(modes) == 1, "the weights are readable for whom the configuration is"
    message = refuse(capsys, "fit", *command, "--ckpt_path", str(last), "--model.layers.block_size", "4")
    assert "the checkpoint was trained with block_size=8, this run has 4" in message
    message = refuse(capsys, "validate", *command, "--ckpt_path", str(last), "--data.seed", "1")
    assert "tokenizer of this run" in message and "differs from the checkpoint's" in message
    message = refuse(capsys, "fit", *command, "--ckpt_path", str(truncated))
    assert "truncated.ckpt' cannot be read: it is not a checkpoint, or is truncated" in message
    assert "nothing.ckpt" in refuse(capsys, "fit", *command, "--ckpt_path", "nothing.ckpt")


def test_continuing_with_last_equals_the_uninterrupted_run(small_config, tmp_path):
    command = ["fit", *QUICK, "-c", str(small_config)]
    main(command)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    whole = read_checkpoint(last)["state_dict"]
    for path in last.parent.iterdir():
        path.unlink()
    # max_steps fixes the schedule's length, so the killed run keeps it and is stopped after three steps
    main([*command, "--trainer.limit_train_batches", "3", "--trainer.max_epochs", "1"])
    assert read_checkpoint(last)["global_step"] < 6
    main([*command, "--ckpt_path", "last"])
    resumed = read_checkpoint(last)
    assert resumed["global_step"] == 6
    assert all(torch.equal(whole[name], resumed["state_dict"][name]) for name in whole)


BAD = [
    (["--model.layers.block_size", "0"], "block_size=0 does not fit 32 features: take an integer from 2 to 32"),
    (["--model.layers.block_size", "1"], "block_size=1"),
    (["--model.layers.block_size", "-8"], "block_size=-8"),
    (["--model.layers.block_size", "33"], "layer model.layers.0.self_attn.q_proj (32 x 32): block_size=33"),
    (["--model.layers.include", "['*conv*']"], "include pattern '*conv*' matches no linear layer; the model has"),
    (
        ["--model.layers.include", "['*qproj*']"],
        "'*qproj*' matches no linear layer; the model has 8, for example model.layers.0.self_attn.q_proj",
    ),
    (["--model.layers.exclude", "['*lmhead*']"], "exclude pattern '*lmhead*' matches no module: the model has, for"),
    (["--model.layers.init", "zeros"], "init"),
    (["--model.merge_every", "0"], "merge_every=0: take an integer of at least 1"),
    (["--model.merge_evry", "3"], "'merge_evry' is not accepted; did you mean merge_every"),
    (["--trainer.max_stepss", "3"], "did you mean trainer.max_steps"),
    (["--chekpoint.monitor", "x"], "unrecognized arguments: --chekpoint.monitor x; did you mean checkpoint"),
    (["--model", "PoetModul"], "unknown class 'PoetModul'; did you mean PoetModule"),
    (["--model.layers.parameterization", "caley"], "unknown parameterization 'caley' (did you mean 'cayley'?)"),
    (
        ["--model.layers.parameterization", "{class_path: CayleyNeumann, init_args: {order: 0}}"],
        "order must be an integer of at least 1, got 0",
    ),
    (["--model.model.init_args.config.hiden_size", "8"], "hiden_size"),
    (["--model.optimization.lr", "-1"], "optimization.lr=-1"),
    (["--model.optimization.lr_overrides", "{'*nope*': 1.0}"], "'*nope*' matches no trainable parameter"),
    (["--data.source", "/nowhere/at/all.txt"], "/nowhere/at/all.txt"),
    (["--data.sequence_length", "0"], "sequence_length"),
    (["--data.batch_size", "eight"], "data: batch_size: expected int, got 'eight'"),
    (["--data", "LabeledData", "--data.labels", "[no, yes]"], "got '[False, True]'; YAML reads words such as yes, no"),
    (["--trainer.precision", "fp16"], "bf16-mixed or 32-true or 64-true or 64 or 32 or 16 or bf16, got 'fp16'"),
    (["--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"], "CosineWithWarmup needs the length of the run"),
    (["--trainer.max_steps", "-5"], "trainer.max_steps -5: must be at least -1"),
    (["--trainer.accelerator", "gpus"], "trainer: You selected an invalid accelerator name"),
    (["--trainer.devices", "0"], "trainer: `Trainer(devices='0')` value is not a valid input"),
    (["--trainer.callbacks", "RunReprt"], "trainer.callbacks: unknown class 'RunReprt'; did you mean RunReport?"),
    (
        ["--trainer.callbacks", "{class_path: RunReport, init_args: {promt: x}}"],
        "'promt' is not accepted; did you mean",
    ),
    (["--model.model", "{init_args: {path: x}}"], "'path' is not accepted"),
    (["--model.optimization.optimizer", "torch.optim.AdamV"], "no attribute 'AdamV'; did you mean Adam"),
    (["--model.optimization.scheduler.init_args.warmup", "3"], "warmup_steps"),
    (["pretrain/quickstart.yaml"], "a config is given as -c pretrain/quickstart.yaml"),
    (["-c"], "-c needs the name of a config, such as pretrain/quickstart.yaml"),
    (["--data.vocab_size", "330"], "vocabulary"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=["=".join(b[0]).removeprefix("--") for b in BAD])
def test_bad_input_is_one_clear_line(small_config, capsys, overrides, message):
    assert message in refuse(capsys, "fit", *QUICK, "-c", str(small_config), *overrides)


RECIPES = {
    "clip ramp": {"optimization": {"clip_ramp": {"steps": 3}}},
    "WSD": {"optimization": {"scheduler": {"class_path": "WarmupStableDecay", "init_args": {"warmup_steps": 1}}}},
    "8-bit Adam": {"optimization": {"optimizer": {"class_path": "bitsandbytes.optim.AdamW8bit"}}},
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_parts_from_yaml(small_config, tmp_path, name):
    path = tmp_path / "part.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"gradient_clip_val": 1.0}, "model": {"init_args": RECIPES[name]}}))
    main(["fit", *QUICK, "-c", str(small_config), "-c", str(path)])
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 6
    if name == "WSD":
        schedule = checkpoint["lr_schedulers"][0]
        assert schedule["decay_fraction"] == 0.2 and schedule["_last_lr"][-1] < 0.3 * schedule["base_lrs"][-1]
    if name == "8-bit Adam":
        states = checkpoint["optimizer_states"][0]["state"].values()
        assert any("__bnb_optimizer_quant_state__" in state for state in states)


def test_a_clip_ramp_from_the_command_line(small_config):
    ramp = ["--model.optimization.clip_ramp.steps", "3", "--trainer.gradient_clip_val", "1.0"]
    main(["fit", *QUICK, "-c", str(small_config), *ramp])


def test_yaml_keys_and_files_are_checked_too(small_config, tmp_path, capsys):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump({"model": {"init_args": {"layers": {"blok_size": 8}}}}))
    assert "'blok_size'" in refuse(capsys, "fit", *QUICK, "-c", str(wrong))
    assert "did you mean block_size" in refuse(capsys, "fit", *QUICK, "-c", str(wrong))
    message = refuse(capsys, "fit", "-c", "pretrain/quickstar.yaml")
    assert "neither a file nor shipped; did you mean pretrain/quickstart.yaml" in message
    message = refuse(capsys, "fit", "-c", "quickstart.yaml")
    assert message.endswith("did you mean finetune/quickstart.yaml, pretrain/quickstart.yaml?")
    assert refuse(capsys, "fit", "-c", "quickstart").endswith("finetune/quickstart.yaml, pretrain/quickstart.yaml?")
    assert refuse(capsys, "fit", "-c", "pretrain/quickstart").endswith("did you mean pretrain/quickstart.yaml?")
    assert "shipped are finetune/classification.yaml, " in refuse(capsys, "fit", "-c", "zzz")
    wrong.write_text("model: [unclosed")
    assert "wrong.yaml" in refuse(capsys, "fit", "-c", str(wrong))
    for content, said in (("", "is empty"), ("hello", "holds a str")):
        wrong.write_text(content)
        assert f"wrong.yaml' {said}: it must have keys" in refuse(capsys, "fit", "-c", str(wrong))
    wrong.write_text("data: {class_path: TextData}")
    assert "no model given: name a config" in refuse(capsys, "fit", "-c", str(wrong))
    nameless = {"class_path": "PoetModule", "init_args": {"model": {"init_args": {"config": {"hidden_size": 8}}}}}
    wrong.write_text(yaml.safe_dump({"data": {"class_path": "TextData"}, "model": nameless}))
    assert "model: class_path must name a ModelBuilder, such as" in refuse(capsys, "fit", "-c", str(wrong))
    assert "unknown command 'fitt': did you mean fit?" in refuse(capsys, "fitt")
    for word in ("train", "trian", "finetune"):
        assert f"unknown command {word!r}: did you mean fit?" in refuse(capsys, word)
    assert "export: the following arguments are required: --ckpt, --out" in refuse(capsys, "export")
    message = refuse(capsys, "export", "--ckpt", "x", "--out", "y", "--dtype", "int8")
    assert "--dtype: invalid choice: 'int8' (choose from" in message


def test_a_truncated_token_cache_is_refused(small_config, tmp_path, capsys):
    command = [*QUICK, "-c", str(small_config), "--data.cache_dir", str(tmp_path / "cache"), "--trainer.max_steps", "1"]
    main(["fit", *command, "--trainer.callbacks", "null"])
    (cache,) = (tmp_path / "cache").rglob("train.tokens")
    cache.write_bytes(cache.read_bytes()[:-100])
    message = refuse(capsys, "fit", *command)
    assert "train.tokens" in message and "delete" in message


def test_empty_binary_and_short_corpora_are_refused(small_config, tmp_path, capsys):
    command = ["fit", *QUICK, "-c", str(small_config), "--data.source"]
    for name, content in (("empty.txt", b""), ("binary.txt", b"\x00\x01\xff" * 999), ("short.txt", b"a b c")):
        path = tmp_path / name
        path.write_bytes(content)
        message = refuse(capsys, *command, str(path))
        assert name in message if name != "short.txt" else "more text" in message


def test_plan_counts_without_allocating(small_config, capsys):
    main(["plan", *QUICK, "-c", str(small_config)])
    printed = capsys.readouterr().out
    for category in ("frozen", "trainable, rotations", "gradients", "optimizer state", "activations"):
        assert category in printed
    totals = [float(line.split()[-1]) for line in printed.splitlines() if line.startswith(("total", "all trained by"))]
    assert len(totals) == 2 and "planned to fit on       16, 24, 48, 80 GB; AdamW: 16, 24, 48, 80 GB" in printed


def test_plugins_lists_a_line_each(capsys):
    main(["plugins"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "[orthotrain." in line] == ["cayley", "cayley_neumann", "exponential"]
    assert all(len(line) > 40 for line in lines)


def test_the_run_folder_is_one_option(small_config, tmp_path, capsys, caplog):
    command = ["fit", *QUICK, "-c", str(small_config), "--run_folder", str(tmp_path / "other"), "--trainer.max_steps"]
    main([*command, "2"])
    assert "earlier run" not in caplog.text and not (tmp_path / "run").exists()
    for name in ("summary.json", "config.yaml", "metrics.csv", "checkpoints/last.ckpt"):
        assert (tmp_path / "other" / name).exists()
    summary = (tmp_path / "other" / "summary.json").read_text()
    main([*command, "2", "--ckpt_path", "last"])
    assert "no step was taken: the run is at step 2 of 2" in caplog.text
    assert (tmp_path / "other" / "summary.json").read_text() == summary
    main([*command, "1"])
    assert "has checkpoints of an earlier run. This run starts anew and may replace them" in caplog.text
    file = tmp_path / "file"
    file.touch()
    message = refuse(capsys, *command[:-3], "--run_folder", str(file))
    assert f"'{file}' cannot be read or written: File exists" in message


def test_without_a_checkpoint_an_evaluation_says_what_it_evaluates(small_config, caplog):
    main(["validate", *QUICK, "-c", str(small_config)])
    assert "no --ckpt_path: validate takes the network as the config builds it" in caplog.text


def test_an_interrupt_before_training_is_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("orthotrain.cli.main.run_trainer", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *QUICK])
    assert stop.value.code == 130
    assert capsys.readouterr().err == "orthotrain: error: interrupted; run the same command again\n"


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_while_the_caches_are_built_is_one_line(small_config, tmp_path, monkeypatch, capsys, name, code):

    def interrupted(*arguments):
        os.kill(os.getpid(), getattr(signal, name))
        build_caches(*arguments)  # some item of it is the safe point at which it ends

    monkeypatch.setattr("orthotrain.data.corpus.cache_folder.build_caches", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *QUICK, "-c", str(small_config), "--data.cache_dir", str(tmp_path / "cache")])
    assert stop.value.code == code
    assert capsys.readouterr().err.endswith("orthotrain: error: interrupted; run the same command again\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not list((tmp_path / "cache").rglob("*.tokens"))


def test_the_best_checkpoint_is_that_of_the_metric_that_is_watched(small_config, tmp_path, capsys, caplog):
    command = [*QUICK, "-c", str(small_config), "--ckpt_path", "best"]
    message = refuse(capsys, "validate", *command)
    assert message.endswith("best needs a metric to compare by, such as --checkpoint.monitor val_loss; take last")
    watching = {"monitor": "val_loss", "filename": "{step}", "dirpath": str(tmp_path / "watched")}
    callback = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": watching}
    command += ["--trainer.callbacks", json.dumps([callback])]
    assert "this run has no checkpoint yet; fit it first" in refuse(capsys, "validate", *command)
    main(["fit", *command[:-4], *command[-2:]])
    main(["validate", *command])
    assert f"--ckpt_path best is {tmp_path / 'watched' / 'step='}" in caplog.text


@pytest.mark.parametrize(
    "arguments",
    [["fit", *QUICK, "--trainer.max_step", "1"], ["fit", "--conf", QUICK[1]], ["export", "--ck", "x", "--out", "y"]],
)
def test_an_option_is_not_abbreviated(capsys, arguments):
    message = refuse(capsys, *arguments)
    assert "did you mean" in message or "--ckpt" in message


@pytest.mark.parametrize(("name", "command"), [("oft_smollm2", "make smollm2"), ("quickstart", "make fit")])
def test_what_a_shipped_config_starts_from_is_missed_at_once(tmp_path, monkeypatch, capsys, name, command):
    monkeypatch.chdir(tmp_path)
    message = refuse(capsys, "fit", "-c", f"finetune/{name}.yaml")
    assert "no file or folder" in message and message.endswith(f"`{command}` makes it")


def test_help_names_the_classes_of_this_package(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "PoetModule"])
    printed = capsys.readouterr().out
    assert "PretrainedModel" in printed and "torch.nn.Linear" not in printed


@pytest.mark.parametrize(
    ("option", "known"),
    [("model", "LoraModule, OftModule, PoetModule"), ("data", "InstructionData, LabeledData, TextData")],
)
def test_help_of_an_unknown_class_lists_the_known_ones(option, known):
    """In a process of its own: other tests define classes, too."""
    command = [sys.executable, "-c", "from orthotrain.cli.main import main; main()", "fit", f"--{option}.help", "Nope"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"unknown class 'Nope'; known: {known}" in done.stderr


def test_what_no_user_can_act_on_is_not_printed(small_config, tmp_path, caplog, capsys):
    with caplog.at_level(logging.INFO):
        main(["fit", *QUICK, "-c", str(small_config), "--trainer.max_steps", "1"])
        main(["validate", *QUICK, "-c", str(small_config), "--ckpt_path", "last"])
    for noise in ("Seed set", "TPU available", "litlogger", "weights_only", "gemm_4bit"):
        assert noise not in caplog.text
    garbage = tmp_path / "garbage.ckpt"
    garbage.write_bytes(b"garbage" * 99)
    assert "it is not a checkpoint, or is truncated" in refuse(capsys, "export", "--ckpt", str(garbage), "--out", "x")


@pytest.mark.parametrize("arguments", [["--version"], ["help", "export"], ["help", "plan"]])
def test_version_and_help_of_a_command(arguments, capsys):
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 0
    said = {"--version": "orthotrain 0", "export": "usage: orthotrain export", "plan": "usage: orthotrain plan"}
    assert capsys.readouterr().out.startswith(said[arguments[-1]])


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(arguments, capsys):
    main(arguments)
    printed = capsys.readouterr().out
    assert all(f"\n  {command} " in printed for command in (*TRAINER_COMMANDS, *COMMANDS))


CLOSED = "orthotrain: error: standard output is closed: write it to a file, or to /dev/null\n"


@pytest.mark.parametrize(
    ("line", "code", "expected"),
    [("plugins >&-", 2, CLOSED), ("--version >&-", 2, CLOSED), ("fitt 2>&-", 2, ""), ("fitt <&- >&- 2>&-", 2, "")],
)
def test_closed_standard_streams_are_one_line(line, code, expected, tmp_path):
    command = f"{Path(sys.executable).with_name('orthotrain')} {line}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (code, expected, "")


@pytest.mark.parametrize("argument", ["--help", "plugins"])
def test_a_pipe_that_nobody_reads_is_one_line(argument):
    reader, writer = os.pipe()
    os.close(reader)
    command = [Path(sys.executable).with_name("orthotrain"), argument]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == 1
    assert (
        done.stderr.startswith("orthotrain: error: standard output was closed before") and done.stderr.count("\n") == 1
    )


def test_messages_show_escape_sequences_and_do_not_send_them(capsys):
    name = "x\x1b]0;title\x07\x1b[2J\u202e\udcff.ckpt\ny"
    message = refuse(capsys, "export", "--ckpt", name, "--out", "o")
    assert r"x\x1b]0;title\x07\x1b[2J\u202e\udcff.ckpt" in message
    assert str(ConfigurationError(f"a\n{name}")).isprintable()


@pytest.mark.parametrize("error", [RuntimeError("a rank is silent"), SystemExit(143)])
def test_a_run_that_fails_leaves_no_stopped_rank_behind(error):
    """One that ends as a signal asks lets its ranks end by themselves."""
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=2, num_nodes=1)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    launcher.procs = observed = [child]
    child.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(type(error)), no_child_left(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))):
            raise error
        if isinstance(error, RuntimeError):
            assert child.wait(30) == -signal.SIGKILL and observed == []
        else:
            assert child.poll() is None and observed == [child]
    finally:
        child.kill()
        child.wait()


def test_a_run_in_a_relative_folder_goes_on(small_config, tmp_path, monkeypatch, capsys):
    """As the shipped configs name it; it may be moved, and be named another way."""
    monkeypatch.chdir(tmp_path)
    command = [*QUICK, "-c", str(small_config), "--run_folder", "relative"]
    main(["fit", *command, "--trainer.max_steps", "3"])
    main(["validate", *command, "--ckpt_path", "last"])
    main(["fit", *command, "--ckpt_path", "last", "--trainer.max_steps", "5"])
    (tmp_path / "relative").rename(tmp_path / "moved")
    main(["fit", *QUICK, "-c", str(small_config), "--run_folder", str(tmp_path / "moved"), "--ckpt_path", "last"])
    assert "forgotten" not in capsys.readouterr().err
    assert read_checkpoint("moved/checkpoints/last.ckpt")["global_step"] == 6
    assert sorted(path.name for path in (tmp_path / "moved" / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
