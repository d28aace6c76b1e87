"""A small Llama on a played device, from the sanity check to the exported folder, and no host wait in its steps."""

import json
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, masking_utils

from orthotrain.callbacks import AdapterCheckpoint, RunReport
from orthotrain.callbacks.sample_writer import SampleWriter
from orthotrain.data import InstructionData
from orthotrain.export import export_huggingface, make_plain_
from orthotrain.models import CausalLM
from orthotrain.modules import OftLayers, OftModule, PoetLayers, PoetModule
from orthotrain.modules.transformers_masks import sequences_of

FIND_PACKED = masking_utils.find_packed_sequence_indices


class Tokens:
    """A tokenizer whose tokens are letters."""

    eos_token_id = 0

    def encode(self, text):
        return [ord(letter) % 96 for letter in text]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(65 + int(number) % 26) for number in ids)

    def save_pretrained(self, folder):
        """Nothing is saved."""


class Rows(L.LightningDataModule):
    """Rows of 12 tokens; with ``padding`` attention masks whose last tokens are padding; or packed, 5 and 7."""

    tokenizer = Tokens()
    on_before_batch_transfer = InstructionData.on_before_batch_transfer
    on_after_batch_transfer = InstructionData.on_after_batch_transfer

    def __init__(self, padding=None, packed=False):
        super().__init__()
        ids = torch.randint(1, 96, (4, 13), generator=torch.Generator().manual_seed(1)).repeat(4, 1)
        self.rows = [{"input_ids": row[:-1], "labels": row[1:]} for row in ids]
        for place, row in enumerate(self.rows if padding is not None else ()):
            row["attention_mask"] = (torch.arange(12) < 12 - padding * (place % 3)).long()
        for row in self.rows if packed else ():
            row["position_ids"] = torch.cat([torch.arange(5), torch.arange(7)])

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=4)

    def val_dataloader(self):
        return DataLoader(self.rows[:8], batch_size=4)

    def predict_dataloader(self):
        return DataLoader([{"input_ids": row["input_ids"][:5]} for row in self.rows[:2]], batch_size=2)


@pytest.fixture
def small(tiny_llama):
    return {**tiny_llama, "num_hidden_layers": 1}


def trainer(folder, callbacks, steps=4, **where):
    return L.Trainer(
        max_steps=steps, logger=CSVLogger(folder, "", ""), enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=2, val_check_interval=2, default_root_dir=folder, callbacks=callbacks, inference_mode=False,
        **where,
    )  # fmt: skip


KINDS = {
    "POET": (partial(PoetModule, layers=PoetLayers(block_size=8), merge_every=3), {}),
    "OFT, packed rows": (partial(OftModule, layers=OftLayers(block_size=8)), {"packed": True}),
    "OFT, rows without padding": (partial(OftModule, layers=OftLayers(block_size=8, coft_eps=0.01)), {"padding": 0}),
    "OFT, padded rows": (
        partial(OftModule, layers=OftLayers(block_size=8, storage="int8", group_size=16)),
        {"padding": 2},
    ),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_step_reads_no_mask_and_no_positions(played, small, tmp_path, name, checkpointing):
    waits = []

    class Steps(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            waits.append(dict(played.WAITS))

    module, rows = KINDS[name]
    with played.Mode():
        module = module(CausalLM(small, gradient_checkpointing=checkpointing))
        # after the callbacks, some of which try the network before the first batch
        module.on_train_batch_start = lambda batch, batch_idx: played.WAITS.clear()
        trainer(tmp_path, [Steps()], strategy=played.strategy(), limit_val_batches=0, enable_checkpointing=False).fit(
            module, Rows(**rows)
        )
    assert waits[0] == waits[2] == {}
    assert masking_utils.find_packed_sequence_indices is FIND_PACKED


def test_sequences_of_packed_rows_are_those_that_transformers_finds():
    rows = torch.stack([torch.cat([torch.arange(5), torch.arange(7)]), torch.cat([torch.arange(11), torch.arange(1)])])
    assert torch.equal(sequences_of(rows), FIND_PACKED(rows))


def test_from_the_sanity_check_to_the_exported_folder(played, small, tmp_path):
    def run(folder, **where):
        torch.manual_seed(0)
        module, data = KINDS["POET"][0](CausalLM(small)), Rows()
        saver = ModelCheckpoint(folder, save_last=True, every_n_train_steps=2)
        trainer(folder, [saver, RunReport("def f(", sample_tokens=4, spectrum_layers=1)], **where).fit(module, data)
        summary = json.loads((folder / "summary.json").read_text())
        sample = (folder / "summary.txt").read_text().split("sample\n")[1]
        torch.manual_seed(0)
        module.model.generation_config.eos_token_id = list(range(64))  # an answer ends after a token or a few
        predicting = trainer(folder / "samples", [SampleWriter()], **where)
        predicting.predict(module, datamodule=data, ckpt_path=str(folder / "last.ckpt"))
        samples = (folder / "samples" / "samples-0.jsonl").read_text()
        return module, summary, sample, samples

    _, expected, *texts = run(tmp_path / "here", accelerator="cpu")
    with played.Mode():
        module, found, *texts_there = run(tmp_path / "there", strategy=played.strategy())
        network = module.to(played.DEVICE).eval().model
        logits = played.raw(network(played.batch(IDS)).logits.detach())
        make_plain_(network)
        export_huggingface(network.cpu(), tmp_path / "folder")  # writing the files needs memory addresses
    # attention has another kernel there, and the table of costs gives other routes
    for part in ("before", "after"):
        assert found[part] == pytest.approx(expected[part], rel=1e-4)
    assert found["curves"]["train_loss"][-1] == pytest.approx(expected["curves"]["train_loss"][-1], rel=1e-4)
    assert found["merges"] == expected["merges"] == 1 and texts_there == texts
    with torch.no_grad():
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()(IDS).logits
    torch.testing.assert_close(exported, logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_goes_on_there(played, small, tmp_path):
    def run(folder, steps, ckpt_path=None):
        torch.manual_seed(0)
        module = KINDS["OFT, rows without padding"][0](CausalLM(small))
        saver = AdapterCheckpoint(2, dirpath=folder)
        options = {"strategy": played.strategy(), "enable_checkpointing": True, "limit_val_batches": 0}
        trainer(folder / "log", [saver], steps, **options).fit(module, Rows(0), ckpt_path=ckpt_path)
        return saver.last_model_path, module

    with played.Mode():
        path, _ = run(tmp_path / "parts", 2)
        _, parts = run(tmp_path / "parts", 4, path)
        _, whole = run(tmp_path / "whole", 4)
    torch.testing.assert_close(played.raw_state(parts), played.raw_state(whole), rtol=0, atol=0)


IDS = torch.arange(1, 25).view(2, 12)
