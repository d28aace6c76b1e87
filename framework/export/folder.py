"""Writes a merged model, or an adapter, in a folder that other tools load."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from transformers import AutoTokenizer

from orthotrain.adapters import export_peft
from orthotrain.checkpoints.reading import read_checkpoint
from orthotrain.console.progress import transformers_bars, waiting, writing
from orthotrain.data.tokenizer_checks import SAMPLE
from orthotrain.errors import ConfigurationError, check_choice
from orthotrain.export.checkpoint_model import load_network, make_plain_
from orthotrain.models.folder import check_new_folder, new_folder

Dtype = Literal["float32", "bfloat16", "float16"]


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    format: Literal["hf", "peft"] = "hf",
    dtype: Dtype | None = None,
    allow: Iterable[str | type] = (),
    trust_remote_code: bool = False,
    base: str | Path | None = None,
) -> Path:
    """Write the network of a checkpoint as a folder for other tools.

    Args:
        checkpoint: A ``.ckpt`` file that ``orthotrain fit`` wrote.
        out: Folder to write. It must be missing or empty.
        format: ``hf`` for a merged Hugging Face folder (safetensors, config, tokenizer); ``peft`` for the OFT adapter
            alone, as ``PeftModel.from_pretrained`` reads it.
        dtype: Dtype of the merged model; None for the dtype of the network. An adapter keeps its dtype.
        allow: As for :func:`load_network`.
        trust_remote_code: As for :func:`load_network`.
        base: As for :func:`load_network`.

    Returns:
        The folder.

    Raises:
        ConfigurationError: The checkpoint cannot be read or has no module, the folder is not empty, PEFT has no setting
            for a layer, or the dtype does not fit the format or the values.
    """
    if format == "peft" and dtype is not None:
        raise ConfigurationError(
            f"--dtype {dtype} with --format peft: an adapter keeps the dtype of its generators; leave --dtype out, or "
            "take --format hf"
        )
    check_new_folder(out)
    with waiting("reading the checkpoint"):
        contents = read_checkpoint(checkpoint)
    network = load_network(contents, str(checkpoint), allow, trust_remote_code, base)
    if format == "peft":
        if rows := getattr(network, "enlarged_to", None):
            rank_zero_warn(
                f"the run has enlarged the embedding: call base.resize_token_embeddings({rows}) before PEFT loads the "
                "adapter"
            )
        return export_peft(network, out)
    from orthotrain.data import stored_tokenizer

    return export_huggingface(network, out, stored_tokenizer(contents), dtype)


def export_huggingface(network: nn.Module, out: str | Path, tokenizer: Any = None, dtype: Dtype | None = None) -> Path:
    """Merge the rotations of a Hugging Face network in place, and save it as a folder for ``from_pretrained``.

    Args:
        network: A transformers model, wrapped or not. Afterwards it is a plain model.
        out: Folder to write. It must be missing or empty.
        tokenizer: A tokenizer to save in the same folder.
        dtype: Dtype of the saved model; None for the dtype of the network. Quantized weights are always unpacked.

    Raises:
        ConfigurationError: The network is not a transformers model, the folder is not empty, or ``dtype`` is unknown or
            cannot represent a value of the network.
    """
    if dtype is not None:
        check_choice("dtype", dtype, Dtype)
    folder = Path(out)
    if not hasattr(network, "save_pretrained"):
        raise ConfigurationError(
            f"{type(network).__name__} is not a transformers model: call unwrap_mergeables and save its state_dict"
        )
    check_new_folder(folder)
    make_plain_(network, None if dtype is None else getattr(torch, dtype))
    total = sum(tensor.nbytes for tensor in [*network.parameters(), *network.buffers()])
    with new_folder(folder) as temporary:
        with writing("writing the model", temporary, total), transformers_bars():
            network.save_pretrained(temporary)  # type: ignore[operator]
        if tokenizer is not None:
            _save_tokenizer(tokenizer, temporary)
    return folder


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer beside its model; warn if AutoTokenizer reads other tokens from the folder.

    AutoTokenizer rebuilds the tokenizer in the class of some model types, and ignores the rules of tokenizer.json.
    """
    if not getattr(tokenizer, "has_own_padding", True):
        tokenizer.pad_token = None
        tokenizer.init_kwargs.pop("pad_token", None)
    tokenizer.save_pretrained(folder)
    try:
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        same = again(SAMPLE, verbose=False)["input_ids"] == tokenizer(SAMPLE, verbose=False)["input_ids"]
    except Exception:  # a class of transformers does not take the tokenizer
        same = False
    if not same:
        rank_zero_warn(
            f"AutoTokenizer of transformers {transformers.__version__} makes other tokens from this folder than the "
            "run was trained on: load its tokenizer with PreTrainedTokenizerFast.from_pretrained"
        )
