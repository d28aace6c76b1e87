"""Trials leave the folder of an earlier run as it is."""

import os
import signal

import pytest
import yaml
from lightning.pytorch.tuner import Tuner

from orthotrain.cli.config_files import resolve_config_arguments
from orthotrain.cli.main import main
from orthotrain.cli.trainer_cli import OrthotrainCLI
from orthotrain.modules import BaseModule

QUICK = ["-c", "pretrain/poet_quickstart.yaml"]


def contents(folder):
    return {str(path): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


@pytest.fixture
def earlier(small_config, tmp_path):
    """The config of a finished run with every callback that writes files, and the contents of its folder."""
    config = yaml.safe_load(small_config.read_text())
    spectrum = {"class_path": "SpectrumMonitor", "init_args": {"every_n_steps": 2, "values": True}}
    orthogonality = {"class_path": "OrthogonalityMonitor", "init_args": {"every_n_steps": 1}}
    config["trainer"]["callbacks"] += [spectrum, orthogonality]
    config["trainer"]["max_steps"] = 3
    small_config.write_text(yaml.safe_dump(config))
    command = [*QUICK, "-c", str(small_config)]
    main(["fit", *command])
    before = contents(tmp_path / "run")
    names = {path.split("/run/")[1] for path in before}
    assert {"checkpoints/last.ckpt", "config.yaml", "metrics.csv", "summary.json", "spectra.csv"} <= names
    assert {"curves.png", "spectrum.png", "orthogonality.png"} <= names
    return command, before


TRIALS = {
    "fast_dev_run": ["--trainer.fast_dev_run", "2"],
    "overfit_batches": ["--trainer.overfit_batches", "2", "--trainer.max_steps", "4"],
}


@pytest.mark.parametrize("trial", TRIALS)
def test_a_trial_changes_nothing(earlier, tmp_path, trial, caplog):
    command, before = earlier
    main(["fit", *command, *TRIALS[trial]])
    main(["fit", *command, "--ckpt_path", "last", *TRIALS[trial]])
    assert "--ckpt_path last is" in caplog.text
    if trial == "fast_dev_run":
        for other in ("validate", "test", "predict"):
            main([other, *command, *TRIALS[trial]])
    assert contents(tmp_path / "run") == before


def test_the_check_before_training_saves_nothing(earlier, tmp_path, monkeypatch):
    command, before = earlier
    monkeypatch.setattr(BaseModule, "validation_step", lambda *given: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        main(["fit", *command, "--trainer.num_sanity_val_steps", "2"])
    assert stop.value.code == 143
    saved = {path: data for path, data in before.items() if path.endswith((".ckpt", "summary.json", ".png"))}
    assert len(saved) >= 6 and saved.items() <= contents(tmp_path / "run").items()


@pytest.mark.parametrize("finder", ["lr_find", "scale_batch_size"])
def test_a_search_of_the_tuner_changes_nothing(earlier, tmp_path, finder):
    command, before = earlier
    # a search is refused with merges within its steps, two rates or a schedule
    one_rate = ["--model.merge_every", "9", *(f"--model.optimization.{k}=null" for k in ("rotation_lr", "scheduler"))]
    cli = OrthotrainCLI(resolve_config_arguments([*command, *one_rate]), run=False)
    tuner = Tuner(cli.trainer)
    if finder == "lr_find":
        found = tuner.lr_find(cli.model, datamodule=cli.datamodule, num_training=5, update_attr=False)
        assert len(found.results["lr"]) == 5
    else:
        tuner.scale_batch_size(cli.model, datamodule=cli.datamodule, max_trials=2, steps_per_trial=1)
    assert contents(tmp_path / "run") == before
    cli.trainer.fit(cli.model, cli.datamodule)
    assert contents(tmp_path / "run") != before, "the training that follows is no trial"
