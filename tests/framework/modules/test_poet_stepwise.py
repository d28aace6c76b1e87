"""Step-wise POET in a real Trainer: it trains, resumes, keeps its momenta as long as they mean something, refuses."""

import copy
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from orthotrain.callbacks import FiniteGuard, MergeRotations, MovementMonitor, OrthogonalityMonitor, Throughput
from orthotrain.errors import ConfigurationError
from orthotrain.layers import PoetSettings, StepwiseLinear, mergeable_layers
from orthotrain.modules import Optimization, PoetLayers, PoetModule
from orthotrain.optimizers import LieOptimizer
from orthotrain.plugins import Cayley
from orthotrain.schedules import CosineWithWarmup


class Regression(L.LightningDataModule):
    """Rows of a linear map."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 16, generator=generator)
        self.rows = list(zip(x, x @ torch.randn(16, 8, generator=generator), strict=True))

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=4)


class Poet(PoetModule):
    """Mean squared error in place of the language model's loss."""

    def loss(self, batch):
        x, y = batch
        return (self(x) - y).square().mean()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))


def trainer_for(folder, steps, **kwargs):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    return L.Trainer(accelerator="cpu", max_steps=steps, default_root_dir=folder, **options, **kwargs)


LAYERS = {"block_size": 4, "exclude": [], "stepwise": True, "parameterization": "cayley"}


def stepwise(layers=LAYERS, **options):
    recipe = Optimization(lr=1e-2, rotation_lr=0.02, rotation_optimizer=LieOptimizer)
    return Poet(net, PoetLayers(**layers), **{"merge_every": 1, "resample_every": 4, "optimization": recipe, **options})


def losses_of(module, folder, steps=60):
    losses = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            losses.append(float(outputs["loss"]))

    monitor = MovementMonitor(every_n_steps=10)
    module.configure_callbacks = lambda: [monitor, module.merging]
    trainer = trainer_for(folder, steps, callbacks=[Losses()])
    trainer.fit(module, datamodule=Regression())
    return losses, trainer


def test_stepwise_poet_trains_keeps_the_spectrum_and_logs_its_movement(tmp_path):
    module = stepwise()
    module.configure_model()
    layers = dict(mergeable_layers(module))
    start = {name: torch.linalg.svdvals(layer.merged_weight()) for name, layer in layers.items()}
    losses, trainer = losses_of(module, tmp_path)
    resting = Optimization(lr=1e-2, rotation_lr=1e-9, rotation_optimizer=LieOptimizer)
    without, _ = losses_of(stepwise(optimization=resting), tmp_path)
    assert sum(losses[-16:]) < 0.9 * sum(without[-16:])
    for name, layer in layers.items():
        assert not any(p.any() for p in layer.rotation_parameters())
        assert int(layer.fold_count) == 45 and int(layer.merge_count) == 15
        torch.testing.assert_close(torch.linalg.svdvals(layer.merged_weight()), start[name], rtol=1e-4, atol=1e-4)
        # one side turns by 0.02, which moves the weight by as much
        rms, angle = (float(trainer.callback_metrics[f"movement/{name}/{what}"]) for what in ("rms", "angle"))
        assert angle == pytest.approx(0.02, rel=0.05) and rms == pytest.approx(angle, rel=0.2)
    assert float(trainer.callback_metrics["angle"]) == pytest.approx(0.02)


@pytest.mark.parametrize("storage", ["dense", "residual"])
@pytest.mark.parametrize("options", [{}, {"direction": "adam", "movement": 0.5}, {"alternate": False}])
def test_resumes_to_the_same_bits(storage, options, tmp_path):
    """With a schedule, in the middle of a period of the permutations."""
    data = Regression()
    data.rows = data.rows[:4]  # one batch an epoch: a plain loader does not know its place in one
    recipe = Optimization(
        lr=1e-2, rotation_lr=0.02, rotation_optimizer=partial(LieOptimizer, **options),
        scheduler=lambda optimizer: CosineWithWarmup(optimizer, warmup_steps=3, total_steps=12),
    )  # fmt: skip
    straight, second = (stepwise(layers=LAYERS | {"storage": storage}, optimization=recipe) for _ in range(2))
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1, filename="{step}")
    trainer = trainer_for(tmp_path / "a", 12, callbacks=[saver])
    trainer.fit(straight, datamodule=data)
    resumed = trainer_for(tmp_path / "b", 12)
    resumed.fit(second, datamodule=data, ckpt_path=tmp_path / "step=7.ckpt")
    for (name, a), b in zip(straight.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    ends = [[group["lr"] for group in t.optimizers[0].param_groups] for t in (trainer, resumed)]
    assert ends[0] == ends[1] and ends[0][0] != 0.02


def test_another_direction_is_refused_when_a_run_goes_on(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=2, filename="{step}")
    trainer_for(tmp_path, 2, callbacks=[saver]).fit(stepwise(), datamodule=Regression())
    recipe = Optimization(rotation_lr=0.02, rotation_optimizer=partial(LieOptimizer, direction="adam"))
    with pytest.raises(ConfigurationError, match="trained with direction='orthogonal', this run has 'adam'"):
        trainer_for(tmp_path, 4).fit(
            stepwise(optimization=recipe), datamodule=Regression(), ckpt_path=tmp_path / "step=2.ckpt"
        )


def test_momentum_survives_folds_and_goes_with_the_permutations(tmp_path):
    counts = []

    class Counts(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            state, own = trainer.optimizers[0].state, [p for n, p in module.named_parameters() if "generators" in n]
            counts.append({state[p]["step"] if p in state else 0 for p in own})

    trainer_for(tmp_path, 10, callbacks=[Counts()]).fit(stepwise(resample_every=4), datamodule=Regression())
    assert counts == [{n} for n in (0, 1, 2, 3, 0, 1, 2, 3, 0, 1)]


def test_a_layer_with_one_side_moves_every_step(tmp_path):
    moved = []

    class Moved(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            own = {n: p for n, p in module.named_parameters() if n.endswith("generators")}
            moved.append([n.split(".")[1] for n, p in own.items() if p.any()])

    layers = LAYERS | {"overrides": {"0": {"sides": "in"}}}
    trainer_for(tmp_path, 4, callbacks=[Moved()]).fit(stepwise(layers=layers), datamodule=Regression())
    assert moved == [["0", "2"]] * 4


def test_accumulated_micro_batches_are_one_step(tmp_path):
    whole, halves = stepwise(), stepwise()
    data = Regression()
    data.train_dataloader = lambda: DataLoader(data.rows, batch_size=8)
    trainer_for(tmp_path, 5).fit(whole, datamodule=data)
    trainer_for(tmp_path, 5, accumulate_grad_batches=2).fit(halves, datamodule=Regression())
    for (name, a), b in zip(whole.state_dict().items(), halves.state_dict().values(), strict=True):
        if a.is_floating_point():
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_one_switch_brings_the_period_the_optimizer_and_the_order_of_the_series():
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    module = PoetModule(copy.deepcopy(net), PoetLayers(block_size=4, exclude=[]), stepwise=True)
    module.configure_model()
    assert all(isinstance(layer, StepwiseLinear) for _, layer in mergeable_layers(module))
    assert all(rotation.parameterization.order == 2 for _, rotation in module.model[0].sides())
    assert (module.merging.every_n_steps, module.merging.resample_every) == (1, 200)
    optimizer = module.optimization.configure(module.model, 10)["optimizer"]
    angles = {part["lr"] for part in optimizer.parts[0].param_groups}
    assert isinstance(optimizer.parts[0], LieOptimizer) and angles == {0.025}
    given = Optimization(rotation_lr=0.02, rotation_optimizer=torch.optim.SGD)
    layers = PoetLayers(block_size=4, exclude=[], parameterization="cayley")
    module = PoetModule(net, layers, merge_every=1, resample_every=7, stepwise=True, optimization=given)
    module.configure_model()
    assert module.optimization is given and module.merging.resample_every == 7
    assert isinstance(module.model[0].rotation_in.parameterization, Cayley)


def test_what_stepwise_poet_refuses(tmp_path):
    with pytest.raises(
        ConfigurationError, match="merge_every=4: layers that are stepwise fold every step, set it to 1"
    ):
        stepwise(merge_every=4)
    some = PoetLayers(block_size=4, exclude=[], overrides={"0": {"stepwise": True}})
    with pytest.raises(ConfigurationError, match="merge_every=400: overrides '0' that are stepwise fold every step"):
        Poet(net, some, merge_every=400)
    with pytest.raises(
        ConfigurationError, match="model.0: stepwise with a weight in torch.bfloat16: .* storage: residual"
    ):
        trainer_for(tmp_path, 2, precision="bf16-true").fit(stepwise(), datamodule=Regression())
    with pytest.raises(ConfigurationError, match="resample_every=0: take a multiple of every_n_steps=1"):
        stepwise(resample_every=0)
    with pytest.raises(ConfigurationError, match=r"resample_every=4: model.0 \(PoetLinear\) draws new permutations"):
        trainer_for(tmp_path, 2).fit(
            Poet(net, PoetLayers(block_size=4, exclude=[]), merge_every=1, resample_every=4), datamodule=Regression()
        )

    class Another(MergeRotations):
        pass

    for given in (Another(3), MergeRotations(3)):
        message = rf"has {type(given).__name__}\(every_n_steps=3\) beside .*, and both would fold: leave it out"
        with pytest.raises(ConfigurationError, match=message):
            trainer_for(tmp_path, 2, callbacks=[given]).fit(stepwise(), datamodule=Regression())
    with pytest.raises(ConfigurationError, match="stepwise with storage='int8'"):
        PoetLayers(stepwise=True, storage="int8")


class Own(L.LightningModule):
    """A module that is none of this package's, with a layer that folds every step."""

    def __init__(self):
        super().__init__()
        self.layer = StepwiseLinear.from_settings(nn.Linear(16, 8), PoetSettings(block_size=4, stepwise=True), 0)

    def training_step(self, batch, batch_idx):
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return LieOptimizer(self.layer.rotation_parameters())


def test_a_period_that_would_leave_rotations_unused_is_refused(tmp_path):
    message = r"every_n_steps=400: layer \(StepwiseLinear\) computes without its rotations and must fold every step"
    with pytest.raises(ConfigurationError, match=message):
        trainer_for(tmp_path, 2, callbacks=[MergeRotations(400)]).fit(Own(), datamodule=Regression())

    class Another(MergeRotations):
        pass

    with pytest.raises(ConfigurationError, match="two callbacks that both fold the rotations"):
        trainer_for(tmp_path, 2, callbacks=[MergeRotations(1), Another(1)]).fit(Own(), datamodule=Regression())
    trainer_for(tmp_path, 2, callbacks=[MergeRotations(1)]).fit(Own(), datamodule=Regression())


def test_callbacks_of_the_user_stay(tmp_path):
    class Slower(Throughput):
        pass

    given = [MovementMonitor(every_n_steps=2), Slower(), FiniteGuard()]
    trainer = trainer_for(tmp_path, 4, callbacks=given)
    for run in range(2):  # in the second run the trainer has what the module attached in the first
        trainer.fit(stepwise(), datamodule=Regression())
        for callback in given:
            assert [c for c in trainer.callbacks if isinstance(c, type(callback))] == [callback]
        assert sum(isinstance(c, Throughput) for c in trainer.callbacks) == 1
        assert sum(isinstance(c, MergeRotations) for c in trainer.callbacks) == 1
        assert run or "movement/model.0/rms" in trainer.callback_metrics  # after 2 steps, not 100


def test_layers_of_both_kinds_have_both_monitors():
    layers = PoetLayers(block_size=4, exclude=[], overrides={"0": {"stepwise": True}})
    kinds = {type(c) for c in Poet(net, layers, merge_every=1).configure_callbacks()}
    assert {MovementMonitor, OrthogonalityMonitor} <= kinds


class EvaluationMode(L.Callback):
    """Trains with dropout and all else off, as a finetuning may."""

    def on_train_start(self, trainer, module):
        module.eval()


def test_training_in_evaluation_mode_takes_the_same_steps(tmp_path):
    trained = []
    for callbacks in ([], [EvaluationMode()]):
        module = stepwise()
        trainer_for(tmp_path, 6, callbacks=callbacks, enable_checkpointing=False).fit(module, Regression())
        trained.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    start = stepwise()
    start.configure_model()
    moved = [name for name, tensor in start.state_dict().items() if not torch.equal(tensor, trained[1][name])]
    assert any("weight" in name for name in moved)
