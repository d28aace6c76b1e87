"""The program of one rank of test_distributed.py; run as ``__main__`` with ``JOB`` among its globals."""

import os
import sys
import traceback
import zlib
from functools import partial

os.environ.update(JOB["environment"])  # noqa: F821

import bitsandbytes as bnb
import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from orthotrain.data import TextData
from orthotrain.distributed.strategy import ShardedStrategy
from orthotrain.layers import mergeable_layers
from orthotrain.layers.folding import merge_rotations
from orthotrain.layers.sharding import gathered, is_sharded, whole
from orthotrain.models import CausalLM
from orthotrain.modules import Optimization, PoetLayers, PoetModule
from orthotrain.optimizers import LieOptimizer
from orthotrain.schedules import CosineWithWarmup

JOB = JOB  # noqa: F821
NETWORK = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


class Traffic(TorchDispatchMode):
    """Counts the bytes that this process gives to every collective, DDP's C++ reducer included."""

    def __init__(self):
        super().__init__()
        self.totals = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d" or function._schema.name == "_c10d_functional::all_gather_into_tensor":
            # outputs come first; the input is sent, which is the second argument of an all-gather and a reduce-scatter
            given = args[1] if function._schema.name in TWO_TENSORS else args[0]
            tensors = [t for t in torch.utils._pytree.tree_leaves(given) if isinstance(t, torch.Tensor)]
            name = function._schema.name.split("::")[1].strip("_")
            self.totals[name] = self.totals.get(name, 0) + sum(t.numel() * t.element_size() for t in tensors)
        return function(*args, **(kwargs or {}))


TWO_TENSORS = {"c10d::_allgather_base_", "c10d::_reduce_scatter_base_", "c10d::allgather_", "c10d::reduce_scatter_"}


class Record(L.Callback):
    """Losses of each optimizer step on this rank, the batches, and the bytes of every collective in each step."""

    def __init__(self, counts_bytes=True):
        self.counts_bytes = counts_bytes
        self.losses, self.batches, self.bytes, self.traffic, self.before = {}, [], {}, Traffic(), {}
        self.step_losses, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if hasattr(module, "masks"):
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            self.gradients.append(torch.cat([whole(gradient).flatten() for gradient in gradients]))

    def on_train_start(self, trainer, module):
        if self.counts_bytes:  # a network cannot be compiled under the mode that counts bytes
            self.traffic.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if len(self.gradients) > len(self.step_losses):
            self.step_losses.append(float(trainer.callback_metrics["train_loss"]))
        self.losses.setdefault(trainer.global_step, []).append(outputs["loss"].item())
        self.batches.append([trainer.global_step, [zlib.crc32(row.numpy().tobytes()) for row in batch["input_ids"]]])

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        # from start to start: work after the end of a batch, such as a merge, belongs to the batch's step
        self._close(trainer.global_step)

    def on_train_epoch_end(self, trainer, module):
        self._close(trainer.global_step)
        if self.counts_bytes:
            self.traffic.__exit__(None, None, None)

    def _close(self, step):
        now = dict(self.traffic.totals)
        self.bytes[step] = {n: b - self.before.get(n, 0) for n, b in now.items() if b != self.before.get(n, 0)}
        self.before = now


class Masked(PoetModule):
    """Trains on a part of each row only, from 1 to 20 targets, as a chat does."""

    masks = True

    def on_after_batch_transfer(self, batch, dataloader_idx):
        labels = batch["labels"].clone()
        for row, ids in zip(labels, batch["input_ids"], strict=True):
            row[1 + int(ids.sum()) % 20 :] = -100
        return {**batch, "labels": labels}


def strategy_of(name, distributed):
    if name == "fsdp2":
        return ShardedStrategy(save_distributed_checkpoint=distributed)
    return name


def fit(
    steps,
    resume=None,
    save_at=None,
    strategy=None,
    accumulate=1,
    precision="32-true",
    layers=None,
    distributed=False,
    stepwise=False,
    eight_bit=False,
    masked=False,
    batches=None,
    **module_options,
):
    L.seed_everything(0, verbose=False)
    record = Record(counts_bytes="compile" not in module_options)
    torch._dynamo.reset(), counters.clear()
    options = {"lr": 1e-2, "rotation_lr": 1e-2, "scheduler": lambda o: CosineWithWarmup(o, warmup_steps=2)}
    if stepwise:
        options |= {"rotation_lr": 0.035, "rotation_optimizer": LieOptimizer}
        module_options["resample_every"] = 3
    # 8-bit moments for the largest matrices; 32 bits for smaller ones, and for parts that are small on two ranks
    if eight_bit:
        options["optimizer"] = partial(bnb.optim.AdamW8bit, min_8bit_size=1024)
    if masked:  # a gradient moves the weights in proportion, so that rounding stays rounding
        options |= {"optimizer": torch.optim.SGD, "scheduler": None}
    module = (Masked if masked else PoetModule)(
        CausalLM(NETWORK),
        PoetLayers(block_size=8, stepwise=stepwise, trained_scale=stepwise, **(layers or {})),
        merge_every=1 if stepwise else 2,
        optimization=Optimization(**options),
        **module_options,
    )
    data = TextData(
        JOB["corpus"], vocab_size=320, sequence_length=32, batch_size=4, cache_dir=JOB["cache"], val_fraction=0.1,
        test_fraction=0.0,
    )  # fmt: skip
    folder, step = save_at or (None, None)
    save = [ModelCheckpoint(folder, every_n_train_steps=step, save_top_k=-1, filename="{step}")] if folder else []
    trainer = L.Trainer(
        accelerator="cpu", devices=JOB["ranks"], strategy=strategy_of(strategy or "auto", distributed), max_steps=8,
        precision=precision, accumulate_grad_batches=accumulate, limit_train_batches=batches or steps * accumulate,
        max_epochs=1, logger=False, enable_checkpointing=bool(save), enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=2, gradient_clip_val=1.0,
        log_every_n_steps=1, callbacks=[record, *save], default_root_dir=JOB["out"],
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=resume)
    state = {n: whole(t).clone() for n, t in module.state_dict().items()}
    if stepwise:
        held = trainer.optimizers[0].state
        named = {n: held[p] for n, p in module.named_parameters() if n.endswith("generators")}
        state |= {f"momentum of {n}": whole(moments["momentum"]).clone() for n, moments in named.items()}
    return record, state, trainer, module


def same_everywhere(state):
    """Names of the tensors that differ between ranks, by a hash of their bits."""
    bits = {n: zlib.crc32(t.contiguous().flatten().view(torch.uint8).numpy().tobytes()) for n, t in state.items()}
    everyone = [None] * JOB["ranks"]
    dist.all_gather_object(everyone, bits)
    return [name for name in bits if len({other[name] for other in everyone}) > 1]


def merged_otherwise(module, stepwise):
    """Merge three times with random generators, sharded and in one process: names of tensors whose bits differ."""
    layers = PoetLayers(block_size=8, stepwise=stepwise, trained_scale=stepwise)
    plain = PoetModule(CausalLM(NETWORK), layers, 1 if stepwise else 2)
    plain.configure_model()
    plain.load_state_dict({n: whole(t) for n, t in module.state_dict().items()})
    for merge in range(3):
        for network in (module, plain):
            generator = torch.Generator().manual_seed(merge)
            for _, layer in mergeable_layers(network):
                with gathered(layer), torch.no_grad():
                    for parameter in layer.rotation_parameters():
                        parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            merge_rotations(dict(mergeable_layers(network)), [])
    expected = plain.state_dict()
    return [n for n, t in module.state_dict().items() if not torch.equal(whole(t), expected[n])]


def most_gathered(module):
    """The largest number of layers whose shards are whole at once while all of them are merged."""
    layers = dict(mergeable_layers(module))
    most = 0

    def count(layer, merge):
        nonlocal most
        merge()
        held = [other for other in layers.values() if not is_sharded(other)]
        assert held == [layer]
        most = max(most, len(held))

    for layer in layers.values():
        layer.merge_ = partial(count, layer, layer.merge_)
    merge_rotations(layers, [])
    for layer in layers.values():
        del layer.merge_
    return most


def main():
    if JOB["log"]:
        log = os.open(JOB["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
    torch.set_num_threads(1)
    torch.compile = partial(torch.compile, backend="aot_eager")  # graphs and gradients, but no generated code
    results = {}
    for name, given in JOB["runs"].items():
        record, state, trainer, module = fit(**given)
        results[name] = {
            "losses": record.losses,
            "batches": record.batches,
            "bytes": dict(record.bytes),
            "state": state,
            "loss": module.loss_described,
            "step losses": record.step_losses,
            "step gradients": record.gradients,
        }
        results[name]["graphs"] = counters["stats"]["unique_graphs"]
        results[name]["merges"] = {n: int(layer.merge_count) for n, layer in mergeable_layers(module)}
        results[name]["metrics"] = {n: float(v) for n, v in trainer.callback_metrics.items()}
        results[name]["gradients"] = [
            n for n, p in module.named_parameters() if p.grad is not None and not p.requires_grad
        ]
        results[name]["trained_bytes"] = sum(
            p.numel() * p.element_size() for p in module.parameters() if p.requires_grad
        )
        if given.get("strategy") == "fsdp2" and given.get("precision", "32-true") == "32-true":
            results[name]["merged otherwise"] = merged_otherwise(module, given.get("stepwise", False))
            results[name]["gathered at once"] = most_gathered(module)
        if JOB["ranks"] > 1:
            results[name]["differing"] = same_everywhere(state)
    torch.save(results, f"{JOB['out']}/{JOB['name']}.{JOB['rank']}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
