"""The progress of a run in a log: steps of the whole run, validations, and nothing where it is switched off."""

import pytest

import orthotrain.console.progress
from orthotrain.cli.main import main

QUICK = ["-c", "pretrain/poet_quickstart.yaml"]


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(orthotrain.console.progress, "say", lines.append)
    return lines


def command(small_config, name, *more):
    return [name, *QUICK, "-c", str(small_config), "--trainer.enable_progress_bar", "true", *more]


def test_a_run_counts_its_steps_over_epochs_and_after_a_resume(small_config, said, caplog):
    progress = '{"class_path": "RunProgress", "init_args": {"seconds": 0}}'
    main(command(small_config, "fit", "--trainer.callbacks+", progress, "--trainer.max_steps", "4"))
    steps = [line for line in said if line.startswith("training: ")]
    assert steps[0] == "training: 4 steps"
    assert [line.split(",")[0] for line in steps[1:]] == [f"training: {n} of 4 steps" for n in (1, 2, 3, 4)]
    assert all(" left, " in line and "loss " in line for line in steps[2:])
    # a line shows the values that were logged before it; the throughput counts from the end of the first step
    assert all(line.endswith(" tokens/s") for line in steps[3:])
    assert any(line.startswith("validation: 2 of 2 batches") for line in said)
    assert "step 3: val_loss" in caplog.text
    said.clear()
    main(command(small_config, "fit", "--trainer.callbacks+", progress, "--ckpt_path", "last"))
    steps = [line for line in said if line.startswith("training: ")]
    assert [line.split(",")[0] for line in steps[1:]] == [f"training: {n} of 6 steps" for n in (5, 6)]


def test_it_is_the_default_and_can_be_switched_off(small_config, said):
    main(command(small_config, "fit", "--trainer.max_steps", "1"))
    assert said == ["training: 1 steps"]
    said.clear()
    main(command(small_config, "fit", "--trainer.max_steps", "1", "--trainer.enable_progress_bar", "false"))
    assert said == []
