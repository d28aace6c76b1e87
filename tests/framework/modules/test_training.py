"""Training steps against a loop of plain PyTorch: weights, losses and norms, with and without clipping."""

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from orthotrain.modules import BaseModule, OftLayers, OftModule, Optimization, PoetLayers, PoetModule

SGD = Optimization(lr=0.5, weight_decay=0.0, optimizer=torch.optim.SGD)


class Network(nn.Module):
    """A language model of one token of context."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden = nn.Embedding(16, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 16)

    def forward(self, input_ids):
        return self.head(self.hidden(self.embedding(input_ids)).tanh())

    def get_output_embeddings(self):
        return self.head


class Seen(L.Callback):
    """Logged values at the end of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step > len(self.steps):
            self.steps.append([float(trainer.callback_metrics[name]) for name in ("train_loss", "grad_norm")])


def rows():
    """Micro-batches of two rows, some of whose labels do not count."""
    ids = torch.randint(0, 16, (6, 2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids[..., 1:].clone()
    labels[::3, 0, 2:] = -100
    return [{"input_ids": a, "labels": b} for a, b in zip(ids[..., :-1], labels, strict=True)]


def by_hand(network, batches, parts, clip):
    """Train a network with the mean over all targets of a step; return the loss and the norm of every step."""
    steps, trained = [], [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, SGD.lr)
    for start in range(0, len(batches), parts):
        window = batches[start : start + parts]
        logits = torch.cat([network(batch["input_ids"]) for batch in window])
        loss = F.cross_entropy(logits.flatten(0, 1), torch.cat([batch["labels"] for batch in window]).flatten())
        optimizer.zero_grad()
        loss.backward()
        steps.append([loss.item(), torch.nn.utils.get_total_norm([p.grad for p in trained]).item()])
        clip(trained)
        optimizer.step()
    return steps


CLIPS = {
    "none": ({}, lambda parameters: None),
    "norm": ({"gradient_clip_val": 0.05}, lambda p: torch.nn.utils.clip_grad_norm_(p, 0.05)),
    "value": (
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        lambda p: torch.nn.utils.clip_grad_value_(p, 0.01),
    ),
}
POET = PoetLayers(block_size=4, include=["hidden"], init="keep")
MODULES = {
    "whole logits": partial(BaseModule, chunked_loss=False),
    "chunked loss": partial(BaseModule, chunked_loss=True),
    "poet": partial(PoetModule, layers=POET),
    "oft": partial(OftModule, layers=OftLayers(block_size=4)),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("clip", CLIPS)
def test_a_run_is_that_of_plain_pytorch(clip, parts, make, tmp_path):
    module, seen, (options, by) = make(Network(), optimization=SGD), Seen(), CLIPS[clip]
    L.Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=parts, log_every_n_steps=1, callbacks=[seen],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path, **options,
    ).fit(module, DataLoader(rows(), batch_size=None))  # fmt: skip
    other = make(Network(), optimization=SGD)
    other.configure_model()
    steps = by_hand(other.model, rows(), parts, by)
    torch.testing.assert_close(torch.tensor(seen.steps), torch.tensor(steps), rtol=1e-5, atol=0)
    torch.testing.assert_close(module.model.state_dict(), other.model.state_dict(), rtol=1e-5, atol=1e-6)
    assert clip != "norm" or min(norm for _, norm in steps) > 0.05, "the bound does not bind"
