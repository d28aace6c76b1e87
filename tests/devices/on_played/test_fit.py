"""Lightning's Trainer on a played device: the bits of the run on the CPU, and no host wait between logging steps."""

from collections import Counter
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from orthotrain.callbacks import (
    FinalCheckpoint,
    MergeRotations,
    MovementMonitor,
    OrthogonalityMonitor,
    RunProgress,
    RunReport,
    SpectrumMonitor,
)
from orthotrain.distributed.agreement import LateAgreement
from orthotrain.errors import TrainingDiverged
from orthotrain.layers.protocols import mergeable_layers
from orthotrain.modules import LoraLayers, LoraModule, OftLayers, OftModule, Optimization, PoetLayers, PoetModule
from orthotrain.optimizers import LieOptimizer
from orthotrain.optimizers.galore import GaLore

PLAIN = Optimization(lr=0.01, optimizer=partial(torch.optim.AdamW, foreach=False))
# with auto, the table of costs would choose another route, which rounds differently
BLOCKS = PoetLayers(block_size=8, route="input")
STEPWISE = {"layers": PoetLayers(block_size=8, route="input", stepwise=True), "merge_every": 1, "resample_every": 2}


def lie(**options):
    return Optimization(lr=0.01, rotation_optimizer=partial(LieOptimizer, **options))


def on_embeddings(optimizer):
    return Optimization(lr=0.01, optimizer_overrides={"*embed_tokens*": optimizer})


MODULES = {
    "POET": partial(PoetModule, layers=BLOCKS, merge_every=4, optimization=PLAIN),
    "stepwise": partial(PoetModule, **STEPWISE, optimization=PLAIN),
    "stepwise, LieOptimizer": partial(PoetModule, **STEPWISE, optimization=lie()),
}


def fit(module, network, folder, steps, ckpt_path=None, callbacks=(), save_every=2, **where):
    torch.manual_seed(0)
    module = module(network)
    # every batch is the same: on a resume, a plain DataLoader begins again
    ids = torch.randint(0, 96, (4, 13), generator=torch.Generator().manual_seed(1)).repeat(16, 1)
    rows = DataLoader([{"input_ids": row[:-1], "labels": row[1:]} for row in ids], batch_size=4)
    saver = [ModelCheckpoint(folder, every_n_train_steps=save_every, save_last=True)] if save_every else []
    options = {
        **{"log_every_n_steps": 3, "val_check_interval": 3, "limit_val_batches": 2, "accumulate_grad_batches": 2},
        **{"logger": False, "enable_model_summary": False, "enable_checkpointing": bool(saver)},
    }
    callbacks = [*callbacks, *saver, RunProgress(), RunReport(prompt="")]
    trainer = L.Trainer(max_steps=steps, default_root_dir=folder, callbacks=callbacks, **(options | where))
    trainer.fit(module, rows, rows, ckpt_path=ckpt_path)
    return module, trainer


def logged(run):
    metrics = run[1].callback_metrics.items()
    return {name: float(value) for name, value in metrics if name not in ("tokens_per_second", "peak_memory_gib")}


@pytest.mark.parametrize("name", MODULES)
def test_a_run_there_is_the_run_on_the_cpu(played, network, tmp_path, name):
    def runs(folder, **where):
        """Four steps, and two more from their checkpoint."""
        parts = []
        for steps, start in ((4, None), (6, folder / "last.ckpt")):
            watching = [SpectrumMonitor(2), OrthogonalityMonitor(2), MovementMonitor(2)]
            parts.append(logged(fit(MODULES[name], network, folder, steps, start, callbacks=watching, **where)))
        return parts

    expected = runs(tmp_path / "here", accelerator="cpu")
    with played.Mode():
        found = runs(tmp_path / "there", strategy=played.strategy())
    # the decomposition on the CPU reads another memory layout
    assert [exact(part) for part in found] == [exact(part) for part in expected]
    assert found == [pytest.approx(part, rel=1e-5, abs=2e-6) for part in expected]
    expected, found = (torch.load(tmp_path / folder / "last.ckpt", weights_only=True) for folder in ("here", "there"))
    torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=0)
    assert found["global_step"] == expected["global_step"] == 6


def exact(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith("spectrum/")}


class WaitsOfBatches(L.Callback):
    """Host waits from the beginning of a batch to the beginning of the next one."""

    def __init__(self, played):
        self.played, self.batches = played, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.end()
        self.before = Counter(self.played.WAITS)

    def on_train_end(self, trainer, pl_module):
        self.end()

    def end(self):
        if hasattr(self, "before"):
            self.batches.append(dict(Counter(self.played.WAITS) - self.before))
            del self.before


WAITING = {
    "POET, AdamW": partial(PoetModule, layers=BLOCKS, merge_every=4),
    "POET, early": partial(PoetModule, layers=BLOCKS, merge_every=100, max_generator_norm=0.01),
    "POET, SGD": partial(PoetModule, layers=BLOCKS, optimization=Optimization(optimizer=torch.optim.SGD)),
    "POET, Muon": partial(PoetModule, layers=BLOCKS, optimization=on_embeddings(torch.optim.Muon)),
    "stepwise, AdamW": partial(PoetModule, **STEPWISE),
    "stepwise, orthogonal": partial(PoetModule, **STEPWISE, optimization=lie()),
    "stepwise, adam": partial(PoetModule, **STEPWISE, optimization=lie(direction="adam", alternate=False)),
    "stepwise, sign": partial(PoetModule, **STEPWISE, optimization=lie(direction="sign", movement=0.5)),
    "OFT": partial(OftModule, layers=OftLayers(block_size=8)),
    "OFT, limited": partial(OftModule, layers=OftLayers(block_size=8), max_generator_norm=1e-3),
    "LoRA": partial(LoraModule, layers=LoraLayers(rank=4), merge_every=4),
}


@pytest.mark.parametrize("name", WAITING)
def test_no_step_waits_but_those_that_log(played, network, tmp_path, name):
    waits = WaitsOfBatches(played)
    callbacks = [waits, *([MovementMonitor(4)] if "stepwise" in name else [])]
    with played.Mode():
        fit(
            WAITING[name], network, tmp_path, 8, strategy=played.strategy(), callbacks=callbacks, save_every=0,
            log_every_n_steps=4, limit_val_batches=0, gradient_clip_val=1.0,
        )  # fmt: skip
    assert len(waits.batches) == 16
    # before the first batch, the network is checked for causality; a step of two batches logs, and waits, in its second
    # batch; the last batch includes the end of the run
    assert {place for place, found in enumerate(waits.batches) if found} == {0, 7, 15}


def test_a_merge_waits_once_and_so_does_a_decomposition(played, network, tmp_path):
    waits, galore = WaitsOfBatches(played), on_embeddings(partial(GaLore, rank=4, update_proj_gap=5))
    run = partial(PoetModule, layers=BLOCKS, merge_every=3, optimization=galore)
    with played.Mode():
        fit(run, network, tmp_path, 7, strategy=played.strategy(), callbacks=[waits], save_every=0,
            log_every_n_steps=0, limit_val_batches=0, accumulate_grad_batches=1)  # fmt: skip
    look = {"aten::_local_scalar_dense": 1}  # at the generators; the new weights are looked at one step later
    decomposition = {"aten::_linalg_svd": 1}
    causality = Counter(waits.batches[0]) - Counter(decomposition)
    assert sum(causality.values()) == 5
    assert waits.batches[:6] == [causality | decomposition, {}, look, {}, {}, look | decomposition]


class Poisoned(PoetModule):
    """One gradient of the fifth step is not finite."""

    side = "rotation_in"

    def on_train_start(self):
        super().on_train_start()
        getattr(self.model.down, self.side).generators.register_hook(self.poison)

    def poison(self, gradient):
        return gradient * float("nan") if self.global_step == 4 else gradient


@pytest.mark.parametrize(
    ("settings", "side", "weights_only"),
    [
        ({"layers": BLOCKS, "merge_every": 6}, "rotation_in", False),
        (STEPWISE, "rotation_out", True),
        # the fifth step moves the output sides, and the input sides rest
        ({**STEPWISE, "optimization": lie()}, "rotation_in", True),
        ({**STEPWISE, "optimization": lie()}, "rotation_out", False),
    ],
)
def test_a_poisoned_step_is_found_at_the_next_look_and_neither_merged_nor_saved(
    played, network, tmp_path, settings, side, weights_only
):
    """The trainer logs after step 20, the merge and the checkpoint come after step 6."""
    modules = []

    def build(network):
        modules.append(Poisoned(network, **settings))
        modules[0].side = side
        return modules[0]

    saver = ModelCheckpoint(
        tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}", save_weights_only=weights_only
    )
    message = rf"at optimizer step 5 \(batch 9\): the gradient of model.down.{side}.generators holds NaN"
    with played.Mode(), pytest.raises(TrainingDiverged, match=message):
        fit(
            build, network, tmp_path, 8, strategy=played.strategy(), callbacks=[saver], save_every=0,
            log_every_n_steps=20, limit_val_batches=0, enable_checkpointing=True,
        )  # fmt: skip
    assert modules[0].global_step == 6
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step=3.ckpt"]
    assert all(bool(torch.isfinite(played.raw(p)).all()) for p in modules[0].parameters() if not p.requires_grad)


def test_a_layer_that_goes_too_far_is_folded_one_step_later_also_in_a_resumed_run(played, network, tmp_path):
    early = partial(PoetModule, layers=BLOCKS, merge_every=100, max_generator_norm=0.01, optimization=PLAIN)
    quiet = {"limit_val_batches": 0, "accumulate_grad_batches": 1}
    folds = []

    class Folds(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            folds.append([int(played.raw(layer.fold_count)) for _, layer in mergeable_layers(pl_module)])

    fit(early, network, tmp_path / "cpu", 6, callbacks=[Folds()], accelerator="cpu", **quiet)
    here, folds = folds, []
    with played.Mode():
        run = partial(fit, early, network)

        def on_device(folder, steps, ckpt_path=None, **options):
            return run(tmp_path / folder, steps, ckpt_path, strategy=played.strategy(), **quiet, **options)

        whole, _ = on_device("whole", 6, callbacks=[Folds()])
        on_device("parts", 4)
        resumed, trainer = on_device("parts", 6, tmp_path / "parts" / "last.ckpt")
    assert here[0] == folds[0] == folds[1] == [0, 0] and here[1] == folds[2] == [1, 1]
    merging = next(callback for callback in trainer.callbacks if isinstance(callback, MergeRotations))
    assert merging.early_folds == sum(int(played.raw(layer.fold_count)) for _, layer in mergeable_layers(whole)) > 2
    torch.testing.assert_close(played.raw_state(resumed), played.raw_state(whole), rtol=0, atol=0)


def test_ranks_agree_one_step_later_and_wait_for_nothing(played, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        agreement, answers = LateAgreement(), []
        with played.Mode():
            played.WAITS.clear()
            for flag in (False, True, True):
                answers.append(agreement.on_any_rank(flag, played.DEVICE))
                for _ in range(played.LAG):
                    torch.zeros((), device=played.DEVICE)
            trainer = L.Trainer(strategy=played.strategy(), logger=False)
            FinalCheckpoint().setup(trainer, None, "fit")
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()  # Lightning calls this before each batch
        assert answers == [False, False, True] and not played.WAITS
        assert LateAgreement().on_any_rank(True, torch.device("cpu"))
    finally:
        torch.distributed.destroy_process_group()
