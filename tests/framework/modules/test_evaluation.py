"""Bits per byte count the bytes of the targets that were evaluated, and no others."""

import math
import random

import lightning as L
import pytest
import torch
from tokenizers import Tokenizer, normalizers
from torch import nn
from torch.nn import functional as F

from orthotrain.data import TextData
from orthotrain.data.token_bytes import token_bytes
from orthotrain.modules import BaseModule, OftLayers, OftModule
from orthotrain.modules.optimization import Optimization


class Bigrams(nn.Module):
    """Logits of the next token from the token before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, 300)

    def forward(self, input_ids):
        return self.table(input_ids)


@pytest.fixture(scope="module")
def make_data(tmp_path_factory):
    """Text whose documents become ever richer in characters of several bytes."""
    folder, generator = tmp_path_factory.mktemp("text"), random.Random(0)
    for number in range(60):
        letters = "abcdef ghi\n" + "éß漢字🎉" * (number // 10)
        (folder / f"{number:02}.txt").write_text("".join(generator.choice(letters) for _ in range(400)))

    def make(**changes):
        return TextData(
            str(folder), vocab_size=300, sequence_length=16, batch_size=4, val_fraction=0.3, test_fraction=0.3,
            cache_dir=str(folder / "cache"), **changes,
        )  # fmt: skip

    return make


def trainer_for(tmp_path, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(accelerator="cpu", default_root_dir=tmp_path, enable_model_summary=False, **quiet, **settings)


def by_hand(module, data, split, batches=None):
    """Bits per byte of the first batches of a split, from the losses of single tokens and from their text."""
    nats, text_bytes = 0.0, 0
    for batch in list(getattr(data, f"{split}_dataloader")())[:batches]:
        labels = batch["labels"].flatten()
        logits = module.model(batch["input_ids"]).double().flatten(0, 1)
        nats += float(F.cross_entropy(logits, labels, reduction="sum"))
        pieces = data.tokenizer.backend_tokenizer.id_to_token
        text_bytes += sum(len(pieces(token)) for token in labels.tolist() if token != data.tokenizer.eos_token_id)
    return nats / math.log(2) / text_bytes


@pytest.mark.parametrize("make", [BaseModule, lambda network: OftModule(network, OftLayers(block_size=30))])
@torch.no_grad()
def test_bits_per_byte_of_a_whole_split_and_of_a_part(make, make_data, tmp_path):
    module, data = make(Bigrams()), make_data()
    for split in ("val", "test"):
        found = []
        for limit in (1.0, 3):
            trainer = trainer_for(tmp_path, limit_val_batches=limit, limit_test_batches=limit)
            (trainer.validate if split == "val" else trainer.test)(module, data, verbose=False)
            found.append(float(trainer.callback_metrics[f"{split}_bits_per_byte"]))
        expected = [by_hand(module, data, split), by_hand(module, data, split, 3)]
        assert found == pytest.approx(expected, rel=1e-6)
    # over a whole split, the bytes are those of its text, without the first token and the end that fills no window
    cache = data._cache("test")
    targets = torch.from_numpy(cache.tokens.astype("int64"))
    rest = [targets[:1], targets[1 + (len(targets) - 1) // 16 * 16 :]]
    outside = sum(data.text_bytes(tokens, "test") for tokens in rest)
    evaluated = sum(data.text_bytes(batch["labels"], "test") for batch in data.test_dataloader())
    assert evaluated == cache.metadata.text_bytes - outside


@torch.no_grad()
def test_fit_logs_the_bits_per_byte_of_the_batches_that_it_validates(make_data, tmp_path):
    module, data = BaseModule(Bigrams(), Optimization(lr=0.0)), make_data()
    trainer = trainer_for(tmp_path, max_steps=2, val_check_interval=1, limit_val_batches=2)
    with torch.enable_grad():
        trainer.fit(module, datamodule=data)
    assert float(trainer.callback_metrics["val_bits_per_byte"]) == pytest.approx(by_hand(module, data, "val", 2))


def test_a_tokenizer_that_changes_the_text_is_charged_for_the_text(make_data, tmp_path):
    data = make_data()
    data.setup("validate")
    backend = Tokenizer.from_str(data.tokenizer.backend_tokenizer.to_str())
    backend.normalizer = normalizers.Replace("c", "")
    backend.save(str(tmp_path / "tokenizer.json"))
    other = make_data(tokenizer=str(tmp_path / "tokenizer.json"))
    other.setup("validate")
    cache = other._cache("val")
    assert cache.metadata.text_bytes == data._cache("val").metadata.text_bytes
    tokens = torch.from_numpy(cache.tokens.astype("int64"))
    assert other.text_bytes(tokens, "val") == pytest.approx(cache.metadata.text_bytes)
    assert other.text_bytes(tokens[:50], "val") > token_bytes(other.tokenizer)[tokens[:50]].sum()
