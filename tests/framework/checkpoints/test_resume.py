"""Going on from any step gives the bits of the uninterrupted run, also where batches draw random numbers."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from orthotrain.callbacks import BatchSeeds
from orthotrain.data import TextData
from orthotrain.models import CausalLM
from orthotrain.modules import LoraLayers, LoraModule, OftLayers, OftModule, PoetLayers, PoetModule

STEPS = 6


def poet(network):
    return PoetModule(CausalLM({**network, "attention_dropout": 0.1}), PoetLayers(block_size=8), merge_every=3)


def oft(network):
    return OftModule(CausalLM(network), OftLayers(block_size=8, block_dropout=0.2), max_new_tokens=0)


def run(make, network, corpus, folder, workers=0, resume=None):
    L.seed_everything(0 if resume is None else 1, verbose=False)
    torch.manual_seed(0 if resume is None else 1)  # a run that goes on does not depend on its own seed
    module = make({**network, "vocab_size": 320})
    data = TextData(
        str(corpus), vocab_size=320, sequence_length=32, batch_size=4, cache_dir=str(folder / "cache"),
        val_fraction=0.1, test_fraction=0.0, num_workers=workers, seed=0,
    )  # fmt: skip
    save = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}", save_last=False)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=STEPS, accumulate_grad_batches=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=1, val_check_interval=4, num_sanity_val_steps=1,
        callbacks=[] if resume else [save], enable_checkpointing=resume is None,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize(("make", "steps"), [(poet, (1, 3, 4)), (oft, (2, 5))], ids=["attention dropout", "blocks"])
def test_dropout_is_that_of_the_uninterrupted_run(make, steps, tiny_llama, corpus, tmp_path):
    if make is oft:  # finetuning starts from given weights, not from the seed
        torch.manual_seed(3)
        weights = CausalLM({**tiny_llama, "vocab_size": 320})()

        def make(network):
            module = oft(network)
            module._builder = lambda: copy.deepcopy(weights)
            return module

    whole = run(make, tiny_llama, corpus, tmp_path)
    for step in steps:
        resumed = run(make, tiny_llama, corpus, tmp_path, resume=str(tmp_path / f"step={step}.ckpt"))
        assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


@pytest.mark.parametrize(("before", "after"), [(0, 2), (1, 0)])
def test_the_number_of_data_workers_may_change(before, after, tiny_llama, corpus, tmp_path):
    whole = run(poet, tiny_llama, corpus, tmp_path, workers=before)
    resumed = run(poet, tiny_llama, corpus, tmp_path, workers=after, resume=str(tmp_path / "step=2.ckpt"))
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_every_batch_of_every_rank_draws_its_own():
    """The place of a batch counts all ranks: the second batch of one is the first batch of the second of two."""

    class Strategy:
        @staticmethod
        def broadcast(value):
            return value

    def drawn(epoch, batch, rank=0, ranks=1):
        trainer = type("Trainer", (), {"strategy": Strategy, "world_size": ranks, "global_rank": rank})
        trainer.current_epoch = epoch
        seeds = BatchSeeds()
        seeds.load_state_dict({"seed": 5})
        seeds.on_train_start(trainer, None)
        seeds.on_train_batch_start(trainer, None, None, batch)
        return torch.rand(4).tolist()

    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({tuple(drawn(*place)) for place in places}) == 4
    assert drawn(0, 0, rank=1, ranks=2) == drawn(0, 1)
    assert drawn(0, 1, rank=0, ranks=2) == drawn(0, 2)


@pytest.mark.parametrize("kind", [OftModule, LoraModule])
def test_every_module_stops_at_nan_before_a_checkpoint_holds_it(kind, tmp_path):
    class Breaks(kind):
        def loss(self, batch):
            return (self(batch[0]) ** 2).mean()

    data = torch.randn(32, 16)
    data[9, 3] = float("nan")  # in the third batch
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=4)
    options = (
        {"layers": OftLayers(block_size=4)} if kind is OftModule else {"layers": LoraLayers(rank=4), "merge_every": 2}
    )
    module = Breaks(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), **options)
    save = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_last=True)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=6, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[save],
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="training diverged at optimizer step 3"):
        trainer.fit(module, loader)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2
    assert all(torch.isfinite(t).all() for t in saved["state_dict"].values() if t.is_floating_point())
