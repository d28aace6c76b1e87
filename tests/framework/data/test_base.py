"""What the data modules share."""

import pytest

from orthotrain.data import InstructionData, TextData
from orthotrain.errors import ConfigurationError


@pytest.mark.parametrize("data", [TextData, InstructionData])
def test_a_checkpoint_builds_no_data_module(data, tmp_path):
    """Lightning would build the class that the file names, with what it says."""
    with pytest.raises(ConfigurationError, match=f"{data.__name__}.load_from_checkpoint: build the data module"):
        data.load_from_checkpoint(str(tmp_path / "any.ckpt"), weights_only=False)


@pytest.mark.parametrize(
    "sizes", [{"batch_size": 10**12}, {"sequence_length": 10**12}, {"num_workers": 10**6}, {"batch_size": 2**70}]
)
def test_sizes_that_no_machine_can_hold(make_data, sizes):
    with pytest.raises(ConfigurationError, match=f"^{'num_workers' if 'num_workers' in sizes else 'batch_size'} "):
        make_data(**sizes)
