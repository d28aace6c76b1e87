"""Runs that are larger than their device, before the start and in the middle."""

from types import SimpleNamespace

import pytest
import torch

from orthotrain.checkpoints.reading import check_checkpoint
from orthotrain.cli import memory_advice as fitting
from orthotrain.cli.main import main
from orthotrain.cli.memory_advice import GIB, Planned, advice, check_fits
from orthotrain.errors import ConfigurationError
from orthotrain.models import CausalLM
from orthotrain.modules import OftLayers, OftModule, PoetLayers, PoetModule

WIDE = {"vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
DATA = {"batch_size": 8, "sequence_length": 64}
QUICK = ["-c", "pretrain/poet_quickstart.yaml"]


@pytest.fixture
def gpu(monkeypatch):
    """A trainer on a GPU of so much memory."""

    def play(memory):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA L4")
        monkeypatch.setattr(fitting, "total_bytes", lambda device: memory)
        return SimpleNamespace(precision="32-true", strategy=SimpleNamespace(root_device=torch.device("cuda", 0)))

    return play


def poet(tiny_llama, **options):
    return PoetModule(CausalLM({**tiny_llama, **WIDE}), PoetLayers(block_size=64), **options)


def test_a_run_that_fits_is_planned_for_its_summary(tiny_llama, gpu):
    module = poet(tiny_llama)
    state = torch.get_rng_state()
    assert check_fits(module, DATA, gpu(80 * GIB)).plan().total_bytes == module.planned_bytes > 0
    assert module.model is None and torch.equal(state, torch.get_rng_state())


def test_a_run_whose_weights_do_not_fit_is_refused_with_what_would(tiny_llama, gpu):
    module = poet(tiny_llama, chunked_loss=False)
    plan = Planned.of(module, DATA, None).plan()
    with pytest.raises(ConfigurationError) as caught:
        check_fits(module, DATA, gpu(plan.certain_bytes - 1))
    message = str(caught.value)
    assert "this run is planned to take 0.0 GiB, 0.0 without activations, and NVIDIA L4 has 0.0: " in message
    options = ("gradient_checkpointing true", "activation_mode mem", "storage int8", "storage nf4", "batch_size 1")
    for option in options:
        assert f"{option} plans " in message
    assert "--model.layers.storage nf4 together " in message and "\n" not in message


def test_a_run_that_its_activations_may_not_fit_is_told(tiny_llama, gpu):
    module = poet(tiny_llama)
    plan = Planned.of(module, DATA, None).plan()
    assert plan.certain_bytes < plan.least_bytes <= plan.total_bytes
    with pytest.warns(UserWarning, match="NVIDIA L4 has .*--data.batch_size 1 plans"):
        check_fits(module, DATA, gpu(plan.least_bytes - 1))


def test_the_options_are_those_that_a_run_has_not_taken(tiny_llama):
    taken = PoetLayers(block_size=64, activation_mode="mem", storage="nf4")
    module = PoetModule(CausalLM({**tiny_llama, **WIDE}, gradient_checkpointing=True), taken)
    run = Planned.of(module, {**DATA, "batch_size": 1}, "bf16-true")
    assert advice(run, None) == "no option lowers that"
    finetuned = Planned.of(OftModule(CausalLM({**tiny_llama, **WIDE}), OftLayers()), DATA, "bf16-true")
    told, resuming = advice(finetuned, None), advice(finetuned, None, resumes=True)
    assert "--model.layers.storage nf4 plans" in told and "storage" not in resuming


def test_what_cannot_be_planned_is_left_alone(gpu):
    module = OftModule(torch.nn.Linear(2, 2))
    assert check_fits(module, DATA, gpu(1)) is None and module.planned_bytes is None


OUT_OF_MEMORY = """
import lightning as L, torch

class Full(L.Callback):
    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 4:
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which ..."
            )
"""


def test_memory_that_runs_out_in_the_middle_of_a_run(small_config, tmp_path, capsys, monkeypatch):
    (tmp_path / "device_that_is_full.py").write_text(OUT_OF_MEMORY)
    monkeypatch.syspath_prepend(tmp_path)
    command = ["fit", *QUICK, "-c", str(small_config)]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--trainer.callbacks+=device_that_is_full.Full"])
    assert stop.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("orthotrain: error: ")]
    said = "the memory of the cpu has run out after step 4 (CUDA out of memory. Tried to allocate 2.00 GiB): the run is"
    assert said in line and " GiB; the checkpoints are intact. To resume with --ckpt_path last add: " in line
    anew = line.partition("; to start anew: ")[2]
    assert "activation_mode mem plans" in line and "activation_mode" not in anew and "--data.batch_size 1 plans" in anew
    check_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    main([*command, "--ckpt_path", "last", "--model.layers.activation_mode", "mem"])
    assert "optimizer steps           6" in capsys.readouterr().out
