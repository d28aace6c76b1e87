"""The defaults of every run of the command line, and how a config replaces them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger

from orthotrain.callbacks import AdapterCheckpoint, RunProgress, RunReport, Throughput
from orthotrain.checkpoints.run_folder import checkpoint_folders
from orthotrain.cli.config_files import shipped_configs
from orthotrain.cli.main import main
from orthotrain.cli.overlay import overlaid_values
from orthotrain.cli.parser import OneLineParser
from orthotrain.cli.run_paths import expand_home, logger_arguments, move_base, place_run
from orthotrain.cli.trainer_cli import OrthotrainCLI
from orthotrain.cli.trainer_options import (
    CALLBACKS,
    check_checkpoint_period,
    place_validations,
    trainer_defaults,
    with_run_callbacks,
)
from orthotrain.errors import ConfigurationError

NETWORK = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1}
CONFIG = {
    "trainer": {"accelerator": "cpu", "max_steps": 1},
    "model": {
        "class_path": "BaseModule",
        "init_args": {"model": {"class_path": "CausalLM", "init_args": {"config": NETWORK}}},
    },
    "data": {"class_path": "TextData", "init_args": {"vocab_size": 32000}},
}


@pytest.fixture(scope="module")
def trainer_of(tmp_path_factory):
    """Build the trainer of a small config, in a folder of its own, with more options."""
    path = tmp_path_factory.mktemp("configs") / "mine.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    return lambda *options: OrthotrainCLI(["-c", str(path), *options], run=False).trainer


def saved_in(trainer):
    return [logger.save_dir for logger in trainer.loggers]


def test_a_config_without_them_has_loggers_checkpoints_report_and_progress(trainer_of):
    trainer = trainer_of()
    assert trainer.default_root_dir.endswith("runs/mine") and saved_in(trainer) == ["runs/mine"] * 2
    assert [type(logger).__name__ for logger in trainer.loggers] == ["TensorBoardLogger", "CSVLogger"]
    (checkpoint,) = trainer.checkpoint_callbacks
    assert isinstance(checkpoint, ModelCheckpoint) and checkpoint.save_last and checkpoint._every_n_train_steps == 500
    assert sum(isinstance(callback, RunReport) for callback in trainer.callbacks) == 1
    assert isinstance(trainer.progress_bar_callback, RunProgress)
    assert trainer.gradient_clip_val == 1.0 and trainer.log_every_n_steps == 10
    assert trainer.num_sanity_val_steps == float("inf"), "the value before training is that of the whole split"
    assert trainer.check_val_every_n_epoch is None and trainer.val_check_interval == 1


def test_each_of_them_can_be_changed(trainer_of, tmp_path):
    trainer = trainer_of(
        "--checkpoint.every_n_train_steps", "7", "--report", "null", "--trainer.logger", "false",
        "--trainer.default_root_dir", str(tmp_path), "--trainer.val_check_interval", "5",
    )  # fmt: skip
    assert trainer.checkpoint_callbacks[0]._every_n_train_steps == 7 and trainer.checkpoint_callbacks[0].save_last
    assert not any(isinstance(callback, RunReport) for callback in trainer.callbacks)
    assert trainer.loggers == [] and trainer.default_root_dir == str(tmp_path)
    assert trainer.check_val_every_n_epoch is None


def test_the_loggers_follow_the_folder_of_the_run(trainer_of, tmp_path):
    assert saved_in(trainer_of("--trainer.default_root_dir", "elsewhere")) == ["elsewhere"] * 2
    both = ("--trainer.default_root_dir", "elsewhere", "--run_folder", str(tmp_path))
    assert saved_in(trainer_of(*both)) == [str(tmp_path)] * 2


@pytest.mark.parametrize(
    ("given", "interval", "every"),
    [
        ({"max_steps": 400}, 40, None),
        ({"max_steps": 407}, 37, None),  # the last validation is at the end
        ({"max_steps": 401}, 40, None),
        ({"max_steps": 4}, 1, None),
        ({"max_steps": 100, "accumulate_grad_batches": 4}, 40, None),  # the interval counts batches
        ({"max_steps": 400, "val_check_interval": 400}, 400, None),
        ({"max_steps": 400, "check_val_every_n_epoch": 2}, None, 2),
        ({"max_epochs": 3}, 0.25, 1),
        ({"max_epochs": 12}, None, 1),
        ({"max_epochs": 3, "streaming": True}, None, 1),
        ({"max_epochs": 3, "class_path": "mine.Data"}, None, 1),
    ],
    ids=str,
)
def test_a_run_is_validated_ten_times_unless_its_config_says_how_often(given, interval, every):
    names = ("max_steps", "max_epochs", "val_check_interval", "check_val_every_n_epoch", "accumulate_grad_batches")
    options = SimpleNamespace(streaming=given.get("streaming", False))
    data = SimpleNamespace(class_path=given.get("class_path", "orthotrain.data.TextData"), init_args=options)
    trainer = SimpleNamespace(**{name: given.get(name) for name in names})
    place_validations(SimpleNamespace(trainer=trainer, data=data))
    assert (trainer.val_check_interval, trainer.check_val_every_n_epoch) == (interval, every)


OPTIONS = {"callbacks": None, "enable_checkpointing": None, "enable_progress_bar": None}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, "ModelCheckpoint RunReport RunProgress"),
        ({"callbacks": Throughput()}, "ModelCheckpoint RunReport RunProgress Throughput"),
        ({"callbacks": [ModelCheckpoint(monitor="val_loss")]}, "RunReport RunProgress ModelCheckpoint"),
        ({"callbacks": [AdapterCheckpoint(), TQDMProgressBar()]}, "RunReport AdapterCheckpoint TQDMProgressBar"),
        ({"enable_checkpointing": False, "enable_progress_bar": False}, "RunReport"),
    ],
)
def test_a_callback_of_the_config_takes_the_place_of_the_default_of_its_kind(options, kept):
    defaults = [ModelCheckpoint(), RunReport(), RunProgress()]
    callbacks = with_run_callbacks({**OPTIONS, **options}, defaults)["callbacks"]
    assert [type(callback).__name__ for callback in callbacks] == kept.split()


def test_a_default_that_is_null_is_not_replaced_by_one_of_lightning(trainer_of):
    trainer = trainer_of("--checkpoint", "null", "--progress", "null", "--trainer.logger", "null")
    assert trainer.checkpoint_callbacks == trainer.loggers == [] and trainer.progress_bar_callback is None


def test_checkpoints_lie_in_the_folder_of_the_run_whatever_the_loggers(trainer_of, tmp_path):
    csv = "[{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: elsewhere}}]"
    for loggers in ("true", "false", csv):
        trainer = trainer_of("--trainer.logger", loggers, "--run_folder", str(tmp_path))
        assert checkpoint_folders(trainer) == [tmp_path / "checkpoints"]


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        (["fit", "-c", "pretrain/quickstart.yaml", "-c", "trainer/ddp.yaml"], "runs/quickstart"),
        (["fit", "-c", "trainer/ddp.yaml", "-c", "pretrain/quickstart.yaml"], "runs/quickstart"),
        (
            ["fit", "-c", "pretrain/adamw_quickstart.yaml", "-c", "pretrain/options/muon.yaml"],
            "runs/adamw_quickstart-muon",
        ),
        (["fit", "--config=/a/b.yaml", "-c", "c.yaml"], "runs/b-c"),
        (["fit"], "runs/default"),
    ],
)
def test_the_configs_name_the_folder(arguments, folder):
    assert trainer_defaults(arguments)["default_root_dir"] == folder


def test_a_tilde_is_the_home_folder_in_every_path_of_a_config(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    logger = Namespace(class_path="CSVLogger", init_args=Namespace(save_dir="~/runs", prefix="~/x"))
    config = Namespace(
        run_folder="~/run",
        ckpt_path="~/a.ckpt",
        trainer=Namespace(default_root_dir="~", logger=[logger], callbacks=[{"init_args": {"dirpath": "~/c"}}]),
        model=Namespace(init_args=Namespace(model=Namespace(init_args=Namespace(name="~/m", path="/a/~")))),
        data=Namespace(init_args=Namespace(cache_dir="~/cache", prompt_template="~/{prompt}")),
    )
    expand_home(config)
    assert (config.run_folder, config.ckpt_path) == ("/home/me/run", "/home/me/a.ckpt")
    assert config.trainer.default_root_dir == "/home/me" and logger.init_args.save_dir == "/home/me/runs"
    assert config.trainer.callbacks[0]["init_args"]["dirpath"] == "/home/me/c"
    network = config.model.init_args.model.init_args
    assert (network.name, network.path) == ("/home/me/m", "/a/~")
    assert config.data.init_args.cache_dir == "/home/me/cache"
    assert (logger.init_args.prefix, config.data.init_args.prompt_template) == ("~/x", "~/{prompt}")
    with pytest.raises(ConfigurationError, match="run_folder '~nobody-of-this-name': there is no such user"):
        expand_home(Namespace(run_folder="~nobody-of-this-name"))


@pytest.mark.parametrize("command", ["export", "calibrate"])
def test_commands_expand_a_tilde_in_their_options(command, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("orthotrain.export.export_checkpoint", lambda *given, **allowed: seen.extend(given[:2]))
    monkeypatch.setattr("orthotrain.cli.calibrate.calibrate", lambda device: ({}, {}))
    monkeypatch.setattr("orthotrain.cli.calibrate.write_table", lambda entry, path: seen.append(path))
    main([command, "--out", "~/out", *(["--ckpt", "~/a.ckpt"] if command == "export" else [])])
    assert seen == [*([tmp_path / "a.ckpt"] if command == "export" else []), tmp_path / "out"]


def test_base_moves_the_model_and_the_tokenizer_beside_it():
    network = Namespace(class_path="PretrainedModel", init_args=Namespace(name="old"))
    data = Namespace(init_args=Namespace(tokenizer="old", source="old"))
    config = Namespace(base="new", model=Namespace(init_args=Namespace(model=network)), data=data)
    move_base(config)
    assert (network.init_args.name, data.init_args.tokenizer, data.init_args.source) == ("new", "new", "old")
    assert config.base is None
    config.base, network.init_args = "new", Namespace(config=None)
    with pytest.raises(ConfigurationError, match="--base 'new': the config has no base model"):
        move_base(config)


def test_a_logger_without_a_folder_takes_the_one_of_the_run(trainer_of, tmp_path):
    for name in ("CSVLogger", "TensorBoardLogger"):
        logger = trainer_of("--trainer.logger", name, "--run_folder", str(tmp_path)).logger
        assert type(logger).__name__ == name and Path(logger.log_dir) == tmp_path
    both = trainer_of("--trainer.logger", "[{class_path: CSVLogger, init_args: {name: x}}, TensorBoardLogger]").loggers
    assert [Path(logger.log_dir) for logger in both] == [Path("runs/mine/x"), Path("runs/mine")]
    own = trainer_of("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path / "own")).logger
    assert Path(own.root_dir) == tmp_path / "own"


@pytest.mark.parametrize("name", ["csv", "tensorboard", "wandb", "mlflow"])
def test_the_configs_of_loggers_write_to_the_run_folder(name, monkeypatch):
    """Weights & Biases and MLflow are not needed here: their loggers are named and placed, not built."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    given = yaml.safe_load(shipped_configs()[f"logger/{name}.yaml"].read_text())["trainer"]["logger"]
    parser = OneLineParser()
    parser.add_argument("--trainer.logger", type=Logger | list[Logger])
    with overlaid_values({}, logger_arguments("runs/mine")):
        found = parser.parse_args(["--trainer.logger", yaml.safe_dump(given, default_flow_style=True)])
    config = Namespace(run_folder="/run", checkpoint=None, trainer=found.trainer)
    config.trainer.default_root_dir, config.trainer.check_val_every_n_epoch = "runs/mine", 1
    place_run(config, "runs/mine")
    loggers = found.trainer.logger if isinstance(given, list) else [found.trainer.logger]
    assert name in loggers[0].class_path.lower()
    assert "runs/mine" not in str(loggers) and all(each.init_args.save_dir == "/run" for each in loggers)
    if name == "mlflow":
        assert loggers[0].init_args.tracking_uri == "sqlite:////run/mlflow.db"
    assert trainer_defaults(["-c", "a.yaml", "-c", f"logger/{name}.yaml"])["default_root_dir"] == "runs/a"


def test_two_periods_of_a_checkpoint_are_refused():
    steps = CALLBACKS["checkpoint"]["init_args"]["every_n_train_steps"]
    for name in ("every_n_epochs", "train_time_interval"):
        for given, said in ((steps, f"is {steps}, the default of the command line"), (7, "is 7, which is set too")):
            both = Namespace(init_args=Namespace(every_n_train_steps=given, **{name: 1}))
            with pytest.raises(ConfigurationError, match=f"checkpoint.{name} 1: .*{said}: add --checkpoint.every_n_tr"):
                check_checkpoint_period(both)
        check_checkpoint_period(Namespace(init_args=Namespace(every_n_train_steps=None, **{name: 1})))
    for fine in (None, Namespace(class_path="x"), Namespace(init_args=Namespace(every_n_train_steps=steps))):
        check_checkpoint_period(fine)
