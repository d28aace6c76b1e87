"""Networks without storage, from their descriptions: on them a run is checked before data are prepared."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from orthotrain.errors import ConfigurationError
from orthotrain.models.builders import CausalLM, PretrainedModel


def check_described(builder: Any, check: Callable[[nn.Module], None]) -> None:
    """Call ``check`` with the network that a builder will build, without storage; draw no random number.

    Nothing is checked where the description alone does not give the network: for a builder of another class, for a
    model that brings its own code, and where the network cannot be built without storage. Building it decides then.

    Args:
        builder: The builder of a module, or None.
        check: Raises a ConfigurationError for a network that does not fit.

    Raises:
        ConfigurationError: As ``check``; or if the builder refuses its own description.
    """
    own = {CausalLM: CausalLM.__call__, PretrainedModel: PretrainedModel.__call__}
    kind = next((kind for kind in own if isinstance(builder, kind)), None)
    if kind is None or type(builder).__call__ is not own[kind]:
        return
    with torch.random.fork_rng([]), FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            network = builder() if isinstance(builder, CausalLM) else builder.described()
            if network is not None:
                check(network)
        except ConfigurationError:
            raise
        except Exception:  # a class of transformers that reads values, or damaged files: building names the fault
            return
