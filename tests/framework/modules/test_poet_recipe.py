"""Recipe parts of PoetModule: clip ramp, frozen parts, overrides; diverged runs and other settings are refused."""

import functools
import inspect
from dataclasses import replace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from orthotrain.errors import ConfigurationError, TrainingDiverged
from orthotrain.layers import PoetLinear, mergeable_layers
from orthotrain.models import PretrainedModel
from orthotrain.modules import BaseModule, ClipRamp, LoraLayers, LoraModule, Optimization, PoetLayers, PoetModule
from orthotrain.schedules import CosineWithWarmup, WarmupStableDecay


class Regression(L.LightningDataModule):
    """Rows of a linear map; ``poison`` makes one batch NaN."""

    def __init__(self, poison=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(64, 16, generator=generator)
        y = x @ torch.randn(16, 8, generator=generator)
        if poison is not None:
            x[4 * poison] = torch.nan
        self.rows = list(zip(x, y, strict=True))

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=4)


class Squares:
    """Mean squared error in place of the language model's loss."""

    def loss(self, batch):
        x, y = batch
        return (self(x) - y).square().mean()


class Poet(Squares, PoetModule):
    pass


class Lora(Squares, LoraModule):
    pass


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8))


def trainer_for(folder, steps, **kwargs):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    options = {} if kwargs.get("barebones") else options
    return L.Trainer(accelerator="cpu", max_steps=steps, default_root_dir=folder, **{**options, **kwargs})


LAYERS = PoetLayers(block_size=4, exclude=[])


class Norms(L.Callback):
    """Norms of the gradients that the optimizer has seen: with a bound far below them, the norm is the bound."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        self.seen.append(float(torch.nn.utils.get_total_norm(gradients)))


def test_clip_ramp_scales_the_bound_after_merges(tmp_path):
    ramp, norms = ClipRamp(steps=2, start=0.5, until_step=9), Norms()
    # folding early drops no state, and starts no ramp
    module = Poet(net, LAYERS, 4, max_generator_norm=1e-6, optimization=Optimization(clip_ramp=ramp))
    trainer_for(tmp_path, 14, gradient_clip_val=1e-3, callbacks=[norms]).fit(module, datamodule=Regression())
    # merges after step 4, 8 and 12; the last is past until_step
    factors = [1, 1, 1, 1, 0.5, 0.75, 1, 1, 0.5, 0.75, 1, 1, 1, 1]
    assert norms.seen == pytest.approx([1e-3 * factor for factor in factors], rel=1e-2)
    assert module.merging.early_folds > 0


def test_clip_ramp_goes_on_in_a_resumed_run(tmp_path):
    seen = []
    for steps, checkpoint in ((5, None), (8, tmp_path / "at_5.ckpt")):
        module = Poet(net, LAYERS, 4, optimization=Optimization(clip_ramp=ClipRamp(steps=4, start=0.5)))
        trainer = trainer_for(tmp_path, steps, gradient_clip_val=1e-3, callbacks=[norms := Norms()])
        trainer.fit(module, datamodule=Regression(), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "at_5.ckpt")
        seen += norms.seen
    # the only merge before the last step is after step 4
    assert seen == pytest.approx([1e-3 * factor for factor in (1, 1, 1, 1, 0.5, 0.625, 0.75, 0.875)], rel=1e-2)


def test_clip_ramp_clips_values_if_the_trainer_does(tmp_path):
    largest = []

    class Largest(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            largest.append(max(float(p.grad.abs().max()) for p in module.parameters() if p.grad is not None))

    module = Poet(net, LAYERS, merge_every=2, optimization=Optimization(clip_ramp=ClipRamp(steps=4, start=0.5)))
    options = {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value", "callbacks": [Largest()]}
    trainer_for(tmp_path, 4, **options).fit(module, datamodule=Regression())
    assert largest == pytest.approx([1e-4, 1e-4, 0.5e-4, 0.625e-4])


def test_a_ramp_without_a_bound_is_refused(tmp_path):
    module = Poet(net, LAYERS, optimization=Optimization(clip_ramp=ClipRamp()))
    with pytest.raises(ConfigurationError, match="clip_ramp scales trainer.gradient_clip_val: set it"):
        trainer_for(tmp_path, 2).fit(module, datamodule=Regression())


def test_a_ramp_where_nothing_merges_is_refused(tmp_path):
    module = LoraModule(net(), LoraLayers(rank=2), optimization=Optimization(clip_ramp=ClipRamp()))
    module.loss = lambda batch: module(batch[0]).square().mean()
    with pytest.raises(ConfigurationError, match="clip_ramp follows merges, and nothing merges in this run"):
        trainer_for(tmp_path, 2, gradient_clip_val=1.0).fit(module, datamodule=Regression())


def save_llama(folder, config):
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("stepwise", [False, True])
def test_a_pretrained_model_that_is_kept_starts_from_the_same_function(tmp_path, tiny_llama, stepwise):
    name = save_llama(tmp_path / "base", tiny_llama)
    layers = PoetLayers(block_size=8, init="keep", stepwise=stepwise)
    module = PoetModule(PretrainedModel(name), layers, merge_every=1 if stepwise else 400)
    module.configure_model()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected, got = PretrainedModel(name)()(ids).logits, module.model.eval()(ids).logits
    assert len(module.wrapped_names) == 14
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overrides", [None, {"*mlp*": {"init": "xavier"}}])
def test_new_values_over_pretrained_ones_are_refused(overrides):
    init = "keep" if overrides else "normalized"
    named = r"layers.init='xavier' of overrides '\*mlp\*'" if overrides else "layers.init='normalized'"
    with pytest.raises(ConfigurationError, match=f"{named} would replace the weights of the pretrained 'x': set init"):
        PoetModule(PretrainedModel("x"), PoetLayers(init=init, overrides=overrides))


def test_a_model_that_is_quantised_already_is_refused_by_layer(tmp_path, tiny_llama):
    build = PretrainedModel(save_llama(tmp_path / "base", tiny_llama), load_in_4bit=True)
    with pytest.raises(ConfigurationError, match=r"layer model.layers.0.*q_proj \(32 x 32\): its weight is quantized"):
        PoetModule(build, PoetLayers(block_size=8, init="keep")).configure_model()


@pytest.mark.parametrize("module", [Poet, Lora])
def test_a_period_below_one_is_named_as_the_module_calls_it(module):
    with pytest.raises(ConfigurationError, match="^merge_every=0: take an integer of at least 1"):
        module(net, merge_every=0)


def test_frozen_parts_do_not_move(tmp_path):
    module = Poet(net, PoetLayers(block_size=4, include=["0"], freeze=["2.*"]), optimization=Optimization(lr=0.1))
    module.configure_model()
    before = {name: p.clone() for name, p in module.named_parameters()}
    trainer_for(tmp_path, 3).fit(module, datamodule=Regression())
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"model.0.rotation_in.generators", "model.0.rotation_out.generators", "model.0.bias"}
    with pytest.raises(ConfigurationError, match=r"freeze pattern 'head\*' matches no parameter; there are "):
        Poet(net, replace(LAYERS, freeze=["head*"])).configure_model()


def test_overrides_by_pattern():
    layers = PoetLayers(
        block_size=4, exclude=[], overrides={"0": {"fraction": 0.5, "sides": "in"}, "*": {"init": "uniform", "gain": 3}}
    )
    model = net()
    layers.apply_(model)
    assert model[0].rotation_out is None and model[0].rotation_in.blocks == 1
    assert isinstance(model[2], PoetLinear) and model[2].rotation_in.block_size == 4
    spectrum = torch.linalg.svdvals(model[2].merged_weight())
    torch.testing.assert_close(spectrum, torch.full((8,), 3.0))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"0": {"blocks": 3}}, "overrides: 'blocks' is no setting"),
        ({"0": {"include": ["*"]}}, "include cannot differ by layer"),
        ({"0": {"sides": "up"}}, "sides='up': choose one of both, in, out"),
        ({"9": {"block_size": 8}}, "overrides pattern '9' matches none of the rotated layers: 0, 2"),
    ],
)
def test_bad_overrides_are_refused(overrides, message):
    with pytest.raises(ConfigurationError) as caught:
        PoetLayers(block_size=4, exclude=[], overrides=overrides).apply_(net())
    assert message in str(caught.value)


def test_a_batch_of_nan_stops_the_run_and_keeps_the_checkpoint(tmp_path):
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    module = Poet(net, LAYERS, optimization=Optimization(lr=1e-2))
    with pytest.raises(TrainingDiverged, match=r"diverged at optimizer step 6 \(batch 5\): .* holds NaN or infinite"):
        trainer_for(tmp_path, 9, callbacks=[saver]).fit(module, datamodule=Regression(poison=5))
    saved = sorted(path.name for path in tmp_path.glob("*.ckpt"))
    assert saved == [f"step={step}.ckpt" for step in range(1, 6)]
    state = torch.load(tmp_path / "step=5.ckpt", weights_only=True)["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


def test_an_infinite_loss_is_named(tmp_path):
    class Infinite(Poet):
        def loss(self, batch):
            loss = super().loss(batch)
            return loss if self.global_step < 3 else loss.detach() * 0 + float("inf") + 0 * loss

    with pytest.raises(TrainingDiverged, match="diverged at optimizer step 4"):
        trainer_for(tmp_path, 9).fit(Infinite(net, LAYERS), datamodule=Regression())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "trained with seed=0, this run has 1"),
        ({"layers": {"block_size": 8}}, "trained with block_size=4, this run has 8"),
        ({"layers": {"parameterization": "cayley"}}, "parameterization="),
        ({"layers": {"fraction": 0.5}}, "trained with fraction=None, this run has 0.5"),
        ({"layers": {"storage": "bf16"}}, "storage='dense', this run has 'bf16'"),
        ({"layers": {"overrides": {"0": {"sides": "in"}}}}, "overrides="),
    ],
)
def test_resuming_as_another_run_is_refused(tmp_path, change, message):
    def module(layers=None, **options):
        return Poet(net, PoetLayers(**{"block_size": 4, "exclude": [], **(layers or {})}), **options)

    trainer = trainer_for(tmp_path, 2)
    trainer.fit(module(), datamodule=Regression())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ConfigurationError) as caught:
        trainer_for(tmp_path, 4).fit(module(**change), datamodule=Regression(), ckpt_path=tmp_path / "a.ckpt")
    assert message in str(caught.value)
    free = module(layers={"route": "weight", "activation_mode": "mem"}, merge_every=7)
    trainer_for(tmp_path, 4).fit(free, datamodule=Regression(), ckpt_path=tmp_path / "a.ckpt")


def test_a_checkpoint_of_the_constant_part_goes_on_for_longer(tmp_path):
    rates = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    recipe = Optimization(lr=0.01, scheduler=lambda o: WarmupStableDecay(o, decay_fraction=0.5, final_ratio=0))
    saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, filename="a", enable_version_counter=False)
    trainer_for(tmp_path, 3, limit_train_batches=3, callbacks=[saver]).fit(
        Poet(net, LAYERS, optimization=recipe), datamodule=Regression()
    )
    rates.clear()
    trainer = trainer_for(tmp_path, 15, callbacks=[Rates()])
    trainer.fit(Poet(net, LAYERS, optimization=recipe), datamodule=Regression(), ckpt_path=tmp_path / "a.ckpt")
    # constant up to half of 15 steps; the first step after a resume still has the rate it was saved with
    assert rates[1:5] == pytest.approx([0.01] * 4) and rates[-1] == pytest.approx(0.01 / 7.5)


def test_lora_pretraining_and_relora(tmp_path):
    module = Lora(net, LoraLayers(rank=2, exclude=[]), merge_every=3, optimization=Optimization(lr=1e-2))
    assert isinstance(module, BaseModule)
    module.configure_model()
    frozen = {name: p.clone() for name, p in module.named_parameters() if not p.requires_grad}
    trainer = trainer_for(tmp_path, 8)
    trainer.fit(module, datamodule=Regression())
    assert float(trainer.callback_metrics["merges"]) == 2
    assert all(not torch.equal(dict(module.named_parameters())[name], before) for name, before in frozen.items())
    assert len(list(mergeable_layers(module))) == 2


def test_a_thousand_merges_of_a_quantised_weight_leave_the_loss_where_it_was(tmp_path):
    """Training that merges after each of 1,000 steps: the loss against that of an fp32 weight."""
    losses = {}
    for storage, group in (("dense", None), ("residual", None), ("int8", 8), ("nf4", 32)):
        layers = PoetLayers(block_size=4, exclude=[], storage=storage, group_size=group)
        recipe = Optimization(lr=3e-3, scheduler=lambda o: CosineWithWarmup(o, final_ratio=0.01))
        module = Poet(net, layers, merge_every=1, optimization=recipe)
        trainer_for(tmp_path / storage, 1000, barebones=True).fit(module, datamodule=Regression())
        assert all(int(layer.merge_count) == 1000 for _, layer in mergeable_layers(module))
        rows = Regression().rows
        batch = [torch.stack(column) for column in zip(*rows, strict=True)]
        losses[storage] = float(module.loss(batch))
    untrained = Poet(net, LAYERS)
    untrained.configure_model()
    assert losses["dense"] < 0.85 * (start := float(untrained.loss(batch)))
    # over seeds and draws of the noise, a residual gives 0.9999 to 1.0013 of the loss
    assert losses["residual"] < 1.003 * losses["dense"] and losses["int8"] < 1.05 * losses["dense"], losses
    # 16 values and a fold of one step: the walk of requantizing outruns such steps, but not the training; over seeds
    # and draws of the noise the loss is 0.87 to 0.97 of that of the start
    assert losses["nf4"] < start, (losses, start)


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_a_rate_that_the_groups_override_is_refused(key):
    named = functools.partial(torch.optim.AdamW, **{key: 0.125})
    built = functools.partial(lambda cls, params, **given: cls(params, **given), torch.optim.SGD, **{key: 0.125})
    for name in ("optimizer", "rotation_optimizer"):
        with pytest.raises(
            ConfigurationError, match=f"{name}: AdamW would ignore {key}=0.125.* set optimization.{key}"
        ):
            Optimization(**{name: named})
    with pytest.raises(ConfigurationError, match=rf"optimizer_overrides\['\*'\]: SGD would ignore {key}"):
        Optimization(optimizer_overrides={"*": built})
    default = inspect.signature(torch.optim.AdamW).parameters[key].default
    Optimization(optimizer=functools.partial(torch.optim.AdamW, **{key: default}))  # as a printed config has it
