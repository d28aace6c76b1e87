"""The ways into the package from Python that take files, as functions of plain values, for the harness to call.

Each prints what main would: one line for a ConfigurationError, which then ends the process with exit code 2.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from orthotrain.cli.main import exit_with_error
from orthotrain.errors import ConfigurationError


def entry(function: Callable) -> Callable:
    """Let a function end as a command ends."""

    @functools.wraps(function)
    def called(*arguments: object) -> None:
        try:
            function(*arguments)
        except ConfigurationError as error:
            exit_with_error(str(error))

    return called


def make_shards(checkpoint: str, folder: str) -> None:
    """Write a checkpoint file as the distributed checkpoint of one process."""
    from orthotrain.checkpoints.shards import save_shards
    from orthotrain.distributed.optimizer_state import optimizer_key, split_state

    contents = torch.load(checkpoint, weights_only=True)
    state, states = {"state_dict": contents.pop("state_dict")}, []
    for number, saved in enumerate(contents["optimizer_states"]):
        state[optimizer_key(number)], rest = split_state(saved)
        states.append(rest)
    save_shards(state, {**contents, "optimizer_states": states}, Path(folder), bool)


@entry
def checkpoint_model(path: str, allow: list[str]) -> None:
    """Build the network that finetuning starts from."""
    from orthotrain.export import CheckpointModel

    CheckpointModel(path, allow)()


@entry
def load_network(path: str, allow: list[str]) -> None:
    """Rebuild a network as export does."""
    from orthotrain.checkpoints.reading import read_checkpoint
    from orthotrain.export import load_network

    load_network(read_checkpoint(path), path, allow)


@entry
def load_from_checkpoint(name: str, path: str) -> None:
    """Call Lightning's class method of a module of ours."""
    import orthotrain.modules

    getattr(orthotrain.modules, name).load_from_checkpoint(path)


@entry
def load_adapter(base: str, path: str) -> None:
    """Load an adapter file into a network."""
    from orthotrain.adapters import load_adapter
    from orthotrain.models import PretrainedModel
    from orthotrain.modules import OftLayers

    network = PretrainedModel(base)()
    OftLayers(block_size=8).apply_(network)
    load_adapter(network, path)


@entry
def import_peft(base: str, folder: str) -> None:
    """Load a PEFT folder into a network."""
    from orthotrain.adapters import import_peft
    from orthotrain.models import PretrainedModel

    import_peft(PretrainedModel(base)(), folder)


@entry
def pretrained(name: str, options: dict) -> None:
    """Load a model folder."""
    from orthotrain.models import PretrainedModel

    PretrainedModel(name, **options)()


@entry
def tokenizer(name: str) -> None:
    """Load the tokenizer of a model folder."""
    from orthotrain.data.tokenizer_state import load_model_tokenizer

    load_model_tokenizer(name)
