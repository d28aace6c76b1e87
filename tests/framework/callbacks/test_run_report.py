"""The report of a run does not change the module."""

import csv
import json
from collections import defaultdict
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from orthotrain.callbacks import RunReport
from orthotrain.console.run_summary import References, summary_lines
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
    states, others = [], References(128, str(corpus), {"AdamW": 2})
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
            callbacks=[RunReport(sample_tokens=2, spectrum_layers=1, references=others)],
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
        assert values["references"] is None and "AdamW" not in text  # one batch of validation is not the whole split
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


@pytest.mark.parametrize("changed", [{}, {"tokens": 129}, {"source": "mine"}, {"limit_val_batches": 0.5}], ids=str)
def test_results_of_others_stand_beside_those_of_a_comparable_run(tmp_path, changed):
    report = RunReport(references=References(128, "text", {"AdamW": 1.7161, "POET as published": 1.7757}))
    run = {"tokens": 128, "source": "text", "limit_val_batches": 1.0} | changed
    report.spent["tokens"] = run["tokens"]
    data = SimpleNamespace(hparams={"source": run["source"]})
    found = report._comparable(SimpleNamespace(datamodule=data, limit_val_batches=run["limit_val_batches"]))
    after = {"val_loss": 3.0, "val_bits_per_byte": 1.69, "val_perplexity": 20.1}
    values = defaultdict(lambda: None, steps=4, before={}, after=after, references=found, data={}, wall_seconds=1.0)
    values |= {"trainable_parameters": 1, "total_parameters": 2}
    lines = summary_lines(values, tmp_path)
    place = lines.index("validation bits per byte  1.690")
    line = "  at the same tokens      AdamW 1.716, POET as published 1.776"
    assert (lines[place + 1] == line) == (not changed) and "AdamW" not in "".join(
        [*lines[: place + 1], *lines[place + 2 :]]
    )
