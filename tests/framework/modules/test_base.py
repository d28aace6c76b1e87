"""A module logs perplexity only if its loss is in nats per token."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from orthotrain.errors import ConfigurationError
from orthotrain.models import CausalLM, PretrainedModel
from orthotrain.modules import (
    BaseModule,
    LoraLayers,
    LoraModule,
    OftLayers,
    OftModule,
    PoetLayers,
    PoetModule,
    oft_layers,
)


class Regression(PoetModule):
    """A network that is no language model."""

    def loss(self, batch):
        return F.mse_loss(self(batch), batch.flip(-1))


class Bytes(Regression):
    """Declares its own loss a cross-entropy in nats per token."""

    logs_perplexity = True


class Classification(OftModule):
    def outputs(self, batch):
        raise NotImplementedError


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(torch.randn(16, 8), batch_size=4)

    val_dataloader = train_dataloader


def logged(cls, tmp_path):
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    module = cls(network, PoetLayers(block_size=4, init="keep"), merge_every=10)
    trainer = L.Trainer(
        max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, datamodule=Data())
    return set(trainer.callback_metrics)


def test_another_objective_logs_its_loss_alone(tmp_path):
    metrics = logged(Regression, tmp_path)
    assert {name for name in metrics if name.startswith("val_")} == {"val_loss"}
    assert "tokens_per_second" not in metrics  # there are none


def test_an_objective_of_ones_own_can_be_one_over_tokens(tmp_path):
    assert {"val_loss", "val_perplexity"} <= logged(Bytes, tmp_path)


def test_a_classification_head_has_no_perplexity():
    assert BaseModule(nn.Linear(2, 2)).logs_perplexity and OftModule(nn.Linear(2, 2)).logs_perplexity
    assert not OftModule(nn.Linear(2, 2), objective="model").logs_perplexity
    assert not Classification(nn.Linear(2, 2)).logs_perplexity


class Poisoned(L.Callback):
    """Makes the network's output NaN in the first batch of an evaluation."""

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0:
            batch[0, 0] = float("nan")

    on_test_batch_start = on_validation_batch_start


@pytest.mark.parametrize("split", ["val", "test"])
def test_nan_in_one_batch_of_an_evaluation_is_in_every_metric_of_it(split, tmp_path):
    class Rows(Data):
        def val_dataloader(self):
            return DataLoader(torch.ones(16, 8), batch_size=4)

        test_dataloader = val_dataloader

    module = Bytes(nn.Sequential(nn.Linear(8, 8)), PoetLayers(block_size=4, init="keep", exclude=[]), merge_every=10)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[Poisoned()],
    )  # fmt: skip
    (trainer.validate if split == "val" else trainer.test)(module, Rows(), verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert set(metrics) == {f"{split}_{name}" for name in ("loss", "perplexity")}
    assert all(value != value for value in metrics.values()), metrics


def test_training_fills_no_cache_of_keys_and_values():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    module = BaseModule(CausalLM({"vocab_size": 32, **sizes}))
    module.configure_model()
    ids = torch.randint(0, 32, (1, 8))
    assert module.model(input_ids=ids).past_key_values is not None
    assert module(input_ids=ids).past_key_values is None
    assert module(input_ids=ids, use_cache=True).past_key_values is not None


class Unprepared(Data):
    def prepare_data(self):
        raise AssertionError("data were prepared before the targets were checked")


def test_targets_are_checked_before_data_are_prepared(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    network = CausalLM({**sizes, "vocab_size": 64})()
    network.save_pretrained(tmp_path / "base")
    for module, message in [
        (PoetModule(CausalLM({**sizes, "vocab_size": 64}), PoetLayers(include=["nope"])), "'nope' matches no linear"),
        (LoraModule(CausalLM({**sizes, "vocab_size": 64}), LoraLayers(exclude=["nope"])), "'nope' matches no module"),
        (OftModule(PretrainedModel(str(tmp_path / "base")), OftLayers(block_size=33)), r"\(32 x 32\): block_size=33"),
        (OftModule(network, OftLayers(overrides={"nope": {}})), "'nope' matches none of the rotated layers"),
        (OftModule(lambda: network, OftLayers()), None),  # only a call builds this one
    ]:
        trainer = L.Trainer(
            max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
        )
        error = ConfigurationError if message else AssertionError
        with pytest.raises(error, match=message or "data were prepared"):
            trainer.fit(module, datamodule=Unprepared())


def test_layers_of_one_kind_are_tried_once(monkeypatch):
    tried = []
    monkeypatch.setattr(oft_layers, "oft_layer", lambda layer, *_: tried.append(layer.out_features))
    network = nn.Sequential(*(nn.Linear(16, out) for out in (16, 16, 8, 16)))
    OftLayers(block_size=4, overrides={"3": {"block_size": 8}}).choose(network)
    assert tried == [16, 8, 16]
