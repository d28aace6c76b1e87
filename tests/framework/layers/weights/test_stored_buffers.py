"""What a layer takes from a state dict besides weights: permutations that are some, and counts that count."""

import pytest
import torch
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers import PoetLinear, StepwiseLinear
from orthotrain.layers.lora_linear import LoraLinear

WRONG = {
    "repeats": torch.tensor([0, 0, 2, 3, 4, 5, 6, 7]),
    "beyond": torch.tensor([0, 1, 2, 3, 4, 5, 6, 8]),
    "far beyond": torch.tensor([0, 1, 2, 3, 4, 5, 6, 2**40]),
    "negative": torch.tensor([-1, 1, 2, 3, 4, 5, 6, 7]),
    "floating": torch.arange(8.0),
    "short integers": torch.arange(8, dtype=torch.int32),
}


@pytest.mark.parametrize("make", [PoetLinear, StepwiseLinear])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("assign", [False, True])
def test_a_permutation_that_is_none_is_refused(make, wrong, assign):
    network = nn.Sequential(nn.Identity(), make.from_linear(nn.Linear(8, 8), 4) if make is PoetLinear else stepwise())
    state = network.state_dict()
    network.load_state_dict(state, assign=assign)
    name = next(name for name in state if name.endswith("rotation_in.permutation"))
    assert state[name].shape == (8,)
    with pytest.raises(ConfigurationError, match=r"1\.rotation_in\.permutation is (no permutation|torch\.\w+; a perm)"):
        network.load_state_dict({**state, name: WRONG[wrong]}, assign=assign)


def stepwise():
    from orthotrain.layers.poet.poet_settings import PoetSettings

    return StepwiseLinear.from_settings(nn.Linear(8, 8), PoetSettings(block_size=4, stepwise=True))


@pytest.mark.parametrize("value", [torch.tensor(-1), torch.tensor(2**31), torch.tensor(1.5), torch.tensor(True)])
@pytest.mark.parametrize("make", [lambda: PoetLinear.from_linear(nn.Linear(8, 8), 4), stepwise,
                                  lambda: LoraLinear.from_linear(nn.Linear(8, 8), 2)])  # fmt: skip
def test_a_count_that_is_none_is_refused(make, value):
    layer = make()
    state = layer.state_dict()
    counts = [name for name in state if name.endswith("_count")]
    assert counts
    for name in counts:
        with pytest.raises(ConfigurationError, match=f"^{name} is .* no count of merges"):
            layer.load_state_dict({**state, name: value})


def test_a_meta_network_still_takes_its_state():
    """Networks are described without values before they are built."""
    with torch.device("meta"):
        layer = PoetLinear.from_linear(nn.Linear(8, 8), 4)
    layer.load_state_dict(layer.state_dict())
