"""The limit of the generators: what it scales, what it leaves, and that a run with it stays orthogonal."""

import warnings

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from orthotrain.callbacks import LimitGenerators
from orthotrain.errors import ConfigurationError
from orthotrain.kernels.skew import skew
from orthotrain.layers import OftLinear, mergeable_layers
from orthotrain.layers.spectrum import limit_norms_, spectral_bound
from orthotrain.modules import OftLayers, OftModule, Optimization


def test_only_blocks_beyond_the_limit_are_scaled():
    generators = [torch.randn(3, 28), torch.randn(2, 6), torch.randn(4, 28).double()]
    generators[0][1] *= 1e-3
    generators[2][2] = 0
    before = [p.clone() for p in generators]
    assert bool(limit_norms_(generators, 0.3))
    for new, old in zip(generators, before, strict=True):
        far = spectral_bound(old) > 0.3
        assert torch.equal(new[~far], old[~far]) and bool(far.any())
        # the direction stays
        torch.testing.assert_close(new / new.norm(dim=1, keepdim=True).clamp_min(1e-9), nn.functional.normalize(old))
        torch.testing.assert_close(spectral_bound(new)[far], torch.full((int(far.sum()),), 0.3))
    sizes = [torch.linalg.matrix_norm(skew(p, b), ord=2).max() for p, b in zip(generators, (8, 4, 8), strict=True)]
    assert max(sizes) <= 0.3 + 1e-6 and not bool(limit_norms_(generators, 0.301))


BLOCKS = OftLayers(block_size=8)


class Targets(OftModule):
    """Is drawn far away from the identity."""

    def loss(self, batch):
        return (self(batch[0]) - batch[1]).square().mean()


def trained(norm, layers=BLOCKS, steps=60):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
    start = [torch.linalg.svdvals(network[i].weight.detach()) for i in (0, 2)]
    module = Targets(network, layers, Optimization(lr=1e-2), max_generator_norm=norm)
    rows = list(zip(torch.randn(16, 16), 10 * torch.randn(16, 16), strict=True))
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=steps, enable_model_summary=False, log_every_n_steps=10, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, DataLoader(rows, batch_size=8))
    told = [str(warning.message) for warning in caught]
    now = [torch.linalg.svdvals(layer.merged_weight()) for _, layer in mergeable_layers(module)]
    off = max(float((a - b).abs().max() / b[0]) for a, b in zip(now, start, strict=True))
    return module, off, [text for text in told if "generator" in text]


def test_a_fast_run_leaves_orthogonality_only_without_a_limit_and_both_are_said():
    _, off, told = trained("auto")
    assert off < 1e-3 and len(told) == 1 and "max_generator_norm (0.537)" in told[0]
    _, off, told = trained(None)
    assert off > 1e-2 and len(told) == 1 and "not orthogonal" in told[0]


def test_each_parameterization_has_its_own_limit_and_exact_cayley_none():
    exact = {"0": {"parameterization": "cayley"}}
    module, off, _ = trained("auto", OftLayers(block_size=8, overrides=exact))
    first, second = (float(spectral_bound(module.model[i].rotation_in.generators).max()) for i in (0, 2))
    assert first > 0.54 and second < 0.5372 and off < 1e-3
    module, _, _ = trained(0.1, steps=20)
    assert float(spectral_bound(module.model[2].rotation_in.generators).max()) < 0.1001


@pytest.mark.parametrize("norm", [0, -1.0, True, float("inf"), float("nan"), "none"])
def test_a_limit_that_is_none_is_refused(norm):
    with pytest.raises(ConfigurationError, match="max_generator_norm=.*take a positive norm, auto"):
        OftModule(nn.Sequential(OftLinear.from_linear(nn.Linear(8, 8), 8)), max_generator_norm=norm)
    assert LimitGenerators(0.5).max_generator_norm == 0.5
