"""The report of a run does not change the module."""

import csv
import json

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger

from orthotrain.callbacks import RunReport
from orthotrain.data import TextData
from orthotrain.models import CausalLM
from orthotrain.models.network_checks import evaluating
from orthotrain.modules import PoetLayers, PoetModule


def test_a_second_fit_trains_the_module_that_a_report_was_made_of(tiny_llama, corpus, tmp_path):
    module = PoetModule(CausalLM({**tiny_llama, "vocab_size": 320}), PoetLayers(block_size=8, stepwise=True), 1)
    module.configure_model()
    module.model.model.layers[0].mlp.eval()  # the user's own choice
    modes = {name: part.training for name, part in module.named_modules()}
    assert len(set(modes.values())) == 2
    states = []
    for number in range(2):
        folder = tmp_path / str(number)
        data = TextData(
            str(corpus), vocab_size=320, sequence_length=16, batch_size=2, cache_dir=str(corpus.parent / "cache"),
            val_fraction=0.1, test_fraction=0.0,
        )  # fmt: skip
        trainer = L.Trainer(
            accelerator="cpu", max_steps=2, limit_val_batches=1, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, logger=CSVLogger(folder, name="", version=""),
            accumulate_grad_batches=2, log_every_n_steps=1, val_check_interval=2, check_val_every_n_epoch=None,
            callbacks=[RunReport(sample_tokens=2, spectrum_layers=1, compared_with="adamw.yaml")],
        )  # fmt: skip
        trainer.fit(module, data)
        text, values = (folder / "summary.txt").read_text(), json.loads((folder / "summary.json").read_text())
        check_curves(values["curves"], list(csv.DictReader((folder / "metrics.csv").open())))
        assert values["tokens"] == 2 * 2 * 2 * 16 and values["wall_seconds"] > 0
        assert "\nwall time                 0:0" in text and "\ntokens trained            128\n" in text
        sizes = values["data"]["train"]
        amount = f"{sizes['documents']:,} documents, {sizes['tokens']:,} tokens"
        assert f"\ntrain data                {amount}\n" in text and set(values["data"]) == {"train", "val"}
        prompt = data.tokenizer.decode(data.sample_prompt())
        assert f"\nprompt\n  {prompt.splitlines()[0]}" in text and (folder / "curves.png").exists()
        share = "of the largest singular value (1 of 14 rotated layers)\n"
        assert share in text and len(values["spectrum_layers"]) == 1 and values["mergeable_layers"] == 14
        assert "sample" in text and "\nkernels                   PyTorch code on the CPU\n" in text
        assert "\nnext-token loss           with whole logits (a batch fits into one chunk)\n" in text
        assert f"\npeak memory               {values['memory']}\n" in text and values["peak_memory_bytes"] > 0
        assert "\ncompared with             orthotrain fit -c adamw.yaml (not run yet)\n" in text
        assert values["planned_bytes"] is None and values["tokens_per_second"] > 0
        assert {name: part.training for name, part in module.named_modules()} == modes
        states.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    still = [name for name in states[0] if "q_proj" in name and torch.equal(states[0][name], states[1][name])]
    assert not [name for name in still if name.endswith("weight")]


def check_curves(curves, rows):
    """The points have the steps and values of metrics.csv, with accumulation too."""
    for name in ("train_loss", "val_loss"):
        logged = [[int(row["step"]), float(row[name])] for row in rows if row[name]]
        assert curves[name] == logged and [step for step, _ in logged] == [0, 1]
    assert curves["tokens_per_second"][0][0] == 1 and curves["lr/rotations_in"] == [[0, 1e-3], [1, 1e-3]]


def test_modes_come_back_after_an_error_too():
    network = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Sequential(torch.nn.Dropout().eval()))
    try:
        with evaluating(network):
            assert not any(part.training for part in network.modules())
            raise KeyError
    except KeyError:
        pass
    assert [part.training for part in network.modules()] == [True, True, True, False]


def test_a_run_names_the_run_that_it_is_compared_with(tmp_path):
    report = RunReport(compared_with="pretrain/adamw_quickstart.yaml")
    command = "orthotrain fit -c pretrain/adamw_quickstart.yaml"
    assert report._compared(tmp_path / "quickstart") == f"{command} (not run yet)"
    other = tmp_path / "adamw_quickstart"
    other.mkdir()
    for broken in ("[]", "{", '{"steps": 400}', '{"steps": 400, "after": {"val_loss": "low"}}'):
        (other / "summary.json").write_text(broken)
        assert report._compared(tmp_path / "quickstart") == f"{command} (not run yet)"
    (other / "summary.json").write_text('{"steps": 400, "after": {"val_loss": 3.25, "val_bits_per_byte": 1.6491}}')
    expected = f"{other}: loss 3.250, bits per byte 1.649 after 400 steps"
    assert report._compared(tmp_path / "quickstart") == expected
