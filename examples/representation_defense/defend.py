"""Finetune a chat model so that harmful requests have other hidden states than benign ones, with OFT and with LoRA.

    make smollm2
    .venv/bin/python examples/representation_defense/defend.py
    .venv/bin/python examples/representation_defense/defend.py --model FOLDER    # another Llama

The objective is a triplet loss on hidden states with negatives found by attacking the embeddings; see README.md.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from prompts import BENIGN, HARMFUL, PROSE
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import binary_auroc
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from orthotrain.console.filtered_messages import hide_lightning
from orthotrain.modules import LoraLayers, LoraModule, OftLayers, OftModule, Optimization

MARGIN = 2.0
RADIUS = 0.05
"""How far an attack may move a token's embedding, in units of the mean norm of an embedding."""

DRIFT = 30.0
"""Weight of the relative squared change of benign tokens and prose beside the triplets."""

Batch = dict[str, Tensor]


def pool(tokens: Tensor, batch: Batch) -> Tensor:
    """Return the mean ``(B, d)`` of the hidden states ``(B, T, d)`` of a prompt's tokens, without the padding."""
    mask = batch["attention_mask"][..., None].to(tokens.dtype)
    return (tokens * mask).sum(1) / mask.sum(1)


def drift(tokens: Tensor, original: Tensor, batch: Batch) -> Tensor:
    """Return the mean over tokens of ``|h - h0|^2 / |h0|^2``; not of the sums, since a few tokens have huge norms."""
    moved = (tokens - original).square().sum(-1) / original.square().sum(-1)
    return moved[batch["attention_mask"] == 1].mean()


class Defense:
    """The objective, for any module whose network returns hidden states; distances are in units of ``scale``.

    Call ``anchor`` with the untouched network before training.
    """

    def anchor(self, benign: Batch, prose: Batch, attack_steps: int) -> None:
        """Keep the hidden states of the untouched network for benign prompts and prose."""
        self.attack_steps = attack_steps
        self.original_tokens = self.tokens(self.embed(benign["input_ids"]), benign).detach()
        self.original_prose = self.tokens(self.embed(prose["input_ids"]), prose).detach()
        self.original = pool(self.original_tokens, benign)
        self.center = self.original.mean(0)
        self.scale = (self.original - self.center).norm(dim=-1).mean()

    def embed(self, ids: Tensor) -> Tensor:
        """Return the embeddings of tokens ``(B, T)``."""
        return self.model.embed_tokens(ids)

    def states(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Return the state ``(B, d)`` of every prompt: the mean of the states of its tokens."""
        return pool(self.tokens(embeddings, batch), batch)

    def tokens(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Return the hidden states ``(B, T, d)``."""
        mask = batch["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        output = self(inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, use_cache=False)
        return output.last_hidden_state

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``||a - b|| / scale``."""
        return (a - b).norm(dim=-1) / self.scale

    def attack(self, batch: Batch, steps: int) -> Tensor:
        """Return embeddings near those of harmful prompts that look most benign: hard negatives.

        Steepest descent of the distance to the benign center, each token moved by up to ``RADIUS``, with steps that
        shorten. Every prompt keeps the nearest embeddings that were found.
        """
        place = start = best = self.embed(batch["input_ids"]).detach()
        radius = RADIUS * self.model.embed_tokens.weight.norm(dim=1).mean()
        nearest = torch.full((len(start),), torch.inf)
        for step in range(steps + 1):
            place = place.detach().requires_grad_()
            distance = self.distance(self.states(place, batch), self.center)
            nearer = distance.detach() < nearest
            nearest = torch.where(nearer, distance.detach(), nearest)
            best = torch.where(nearer[:, None, None], place.detach(), best)
            if step < steps:
                (gradient,) = torch.autograd.grad(distance.sum(), place)
                shift = place.detach() - start - radius * (1 - step / steps) * F.normalize(gradient, dim=-1)
                place = start + shift * (radius / shift.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp(max=1)
        return best

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Return the triplets of benign and of harmful prompts, and the drift of benign tokens and prose."""
        benign, harmful, prose = batch["benign"], batch["harmful"], batch["prose"]
        rows = batch["rows"]
        tokens = self.tokens(self.embed(benign["input_ids"]), benign)
        good = pool(tokens, benign)
        twice = {name: torch.cat([value, value]) for name, value in harmful.items()}
        attacked = self.attack(harmful, self.attack_steps)
        bad = self.states(torch.cat([self.embed(harmful["input_ids"]), attacked]), twice)
        nearest = self.distance(good[:, None], bad[None]).min(1).values
        kept = F.relu(self.distance(good, self.original[rows]) - nearest + MARGIN).mean()
        hardest = self.distance(bad[:, None], self.original[None]).min(1).values
        apart = F.relu(self.distance(bad, bad.mean(0)) - hardest + MARGIN).mean()
        moved = drift(tokens, self.original_tokens[rows], benign)
        moved += drift(self.tokens(self.embed(prose["input_ids"]), prose), self.original_prose[batch["lines"]], prose)
        return kept + apart + DRIFT * moved


class OftDefense(Defense, OftModule):
    """Rotates the inputs of every linear layer."""


class LoraDefense(Defense, LoraModule):
    """Adds a low-rank update to every linear layer."""

    def wrap(self, model: nn.Module) -> None:
        """Freeze the rest too: LoraModule is made for pretraining and trains it."""
        model.requires_grad_(False)
        super().wrap(model)


def build(method: str, body: nn.Module, lr: float) -> Defense:
    """Return the module; both methods train about as many parameters."""
    rates = Optimization(lr=lr)
    if method == "oft":
        return OftDefense(body, OftLayers(block_size=32, parameterization="cayley"), rates)
    return LoraDefense(body, LoraLayers(rank=8, alpha=16), optimization=rates)


def lower_part(network: nn.Module, layers: int) -> nn.Module:
    """Return the embedding and the first layers as a network that shares these modules and has no final norm."""
    config = type(network.config).from_dict({**network.config.to_dict(), "num_hidden_layers": layers})
    body = AutoModel.from_config(config)
    body.embed_tokens, body.norm = network.model.embed_tokens, nn.Identity()
    body.layers = network.model.layers[:layers]
    return body.eval()


def load(folder: str | None) -> tuple[nn.Module, Any]:
    """Return network (fp32) and tokenizer; without a folder a tiny random Llama that reads bytes."""
    if folder is None:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
        return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=256, **sizes)), None
    if not (Path(folder) / "config.json").is_file():
        sys.exit(f"{folder} is not there: `make smollm2` makes it, or name another with --model")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), AutoTokenizer.from_pretrained(folder)


def encode(texts: list[str], tokenizer: Any, chat: bool) -> Batch:
    """Tokenize texts, as requests with the beginning of an answer or unchanged, padded on the left."""
    if tokenizer is None:
        rows = [list(text.encode()) for text in texts]
    else:
        form = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n" if chat else "{}"
        rows = [tokenizer(form.format(text)).input_ids for text in texts]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def take(batch: Batch, rows: Tensor) -> Batch:
    """Return some rows of a batch."""
    return {name: value[rows] for name, value in batch.items()}


def batches(benign: Batch, harmful: Batch, prose: Batch, steps: int, size: int) -> list[dict[str, Any]]:
    """Draw the batches of a run; every method has the same."""
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(steps):
        rows, others, lines = (
            torch.randperm(len(batch["input_ids"]), generator=generator)[:size] for batch in (benign, harmful, prose)
        )
        one = {"benign": take(benign, rows), "harmful": take(harmful, others), "prose": take(prose, lines)}
        drawn.append({**one, "rows": rows, "lines": lines})
    return drawn


@torch.no_grad()
def perplexity(network: nn.Module, prose: Batch) -> float:
    """Return the perplexity of text per token."""
    logits = network(**prose).logits[:, :-1]
    labels = prose["input_ids"][:, 1:].masked_fill(prose["attention_mask"][:, :-1] == 0, -100)
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()).exp().item()


def measure(module: Defense, network: nn.Module, held_out: dict[str, Batch]) -> dict[str, float]:
    """Measure on held-out prompts how well the distance to the benign center separates harmful from benign."""
    with torch.no_grad():
        good, bad = (
            module.distance(module.states(module.embed(batch["input_ids"]), batch), module.center)
            for batch in (held_out["benign"], held_out["harmful"])
        )
    attacked = module.attack(held_out["harmful"], 4)
    with torch.no_grad():
        hidden = module.distance(module.states(attacked, held_out["harmful"]), module.center)
    labels = torch.tensor([0] * len(good) + [1] * len(bad))
    return {
        "good": good.mean().item(),
        "bad": bad.mean().item(),
        "hidden": hidden.mean().item(),
        "auroc": binary_auroc(torch.cat([good, bad]), labels).item(),
        "attacked": binary_auroc(torch.cat([good, hidden]), labels).item(),
        "perplexity": perplexity(network, held_out["prose"]),
    }


def show(name: str, one: dict[str, float], trained: int, seconds: float) -> None:
    """Print a line of the table."""
    left = f"{name:<10}{trained:>10,}{seconds:>9.0f}{one['good']:>9.2f}{one['bad']:>9.2f}{one['hidden']:>11.2f}"
    print(f"{left}{one['auroc']:>9.3f}{one['attacked']:>11.3f}{one['perplexity']:>12.2f}", flush=True)


def run(method: str, lr: float, chosen: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train with one method; print and return what is measured before and after."""
    L.seed_everything(0, verbose=False)
    network, tokenizer = load(chosen.model)
    every = {"benign": encode(BENIGN, tokenizer, True), "harmful": encode(HARMFUL, tokenizer, True)}
    train = {name: take(batch, torch.arange(28)) for name, batch in every.items()}
    held_out = {name: take(batch, torch.arange(28, 40)) for name, batch in every.items()}
    train["prose"], held_out["prose"] = (encode(part, tokenizer, False) for part in (PROSE[:8], PROSE[8:]))
    module = build(method, lower_part(network, chosen.layers), lr)
    module.configure_model()
    with torch.no_grad():
        module.anchor(train["benign"], train["prose"], chosen.attack_steps)
    drawn = batches(**train, steps=chosen.steps, size=chosen.batch)
    before = {**measure(module, network, held_out), "loss": module.loss(drawn[0]).item()}
    trainer = L.Trainer(max_steps=chosen.steps, accelerator="cpu", gradient_clip_val=1.0, logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    start = time.perf_counter()
    trainer.fit(module, DataLoader(drawn, batch_size=None))
    seconds = time.perf_counter() - start
    after = {**measure(module, network, held_out), "loss": module.loss(drawn[0]).item()}
    if method == "oft":
        show("before", before, 0, 0)
    show(f"{method} {lr:g}", after, sum(p.numel() for p in module.parameters() if p.requires_grad), seconds)
    return {"before": before, "after": after}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Run both methods."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--layers", type=int, default=6, help="the hidden states behind this layer are moved")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=6, help="benign and harmful prompts of a step, each")
    parser.add_argument("--attack-steps", type=int, default=2)
    parser.add_argument("--oft-lr", type=float, nargs="*", default=[1e-3])
    parser.add_argument("--lora-lr", type=float, nargs="*", default=[3e-3])
    parser.add_argument("--fast", action="store_true", help="a tiny random network, 12 steps")
    chosen = parser.parse_args(arguments)
    hide_lightning()
    if chosen.fast:
        chosen.model, chosen.layers, chosen.steps = None, 2, 12
        chosen.oft_lr, chosen.lora_lr = [3e-3], [3e-3]
    print(f"{'':<10}{'':>10}{'':>9}{'distance to the benign center':>29}{'AUROC':>20}{'perplexity':>12}")
    print(
        f"{'':<10}{'trained':>10}{'seconds':>9}{'benign':>9}{'harmful':>9}{'attacked':>11}{'plain':>9}{'attacked':>11}"
    )
    runs = [("oft", lr) for lr in chosen.oft_lr] + [("lora", lr) for lr in chosen.lora_lr]
    return {f"{method} {lr:g}": run(method, lr, chosen) for method, lr in runs}


if __name__ == "__main__":
    main()
