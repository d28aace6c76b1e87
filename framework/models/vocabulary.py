"""The tokens of a tokenizer and the rows of an embedding: compared, and the embedding enlarged."""

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.models.network_size import check_memory

SAME_NUMBER = "set the model's vocab_size and the data's to the same number"
RESIZE = "set resize_vocabulary of PretrainedModel to true (--model.model.resize_vocabulary true)"


def check_vocabulary(tokens: Any, rows: Any, advice: str = SAME_NUMBER) -> None:
    """Refuse a vocabulary that is larger than the embedding. A size that is not an integer is unknown, and passes.

    Raises:
        ConfigurationError: The message gives both sizes, and the advice.
    """
    if isinstance(tokens, int) and isinstance(rows, int) and tokens > rows:
        raise ConfigurationError(
            f"the tokenizer's vocabulary of {tokens} does not fit the model's embedding of {rows} rows: {advice}"
        )


def enlarge_embeddings_(network: Any, rows: int) -> None:
    """Enlarge the embeddings of a transformers model in place; each new row is the mean of the old rows.

    The output layer follows, tied or not. Outputs for the old tokens do not change.

    Args:
        network: A model of transformers.
        rows: Rows that the embedding needs at least; fewer than it has change nothing.

    Raises:
        ConfigurationError: The new rows need more memory than there is.
    """
    embedding = network.get_input_embeddings()
    old = embedding.num_embeddings
    if rows <= old:
        return
    check_memory(2 * (rows - old) * embedding.embedding_dim, embedding.weight.dtype, f"resize_vocabulary {rows}")
    rank_zero_info(f"the embedding grows from {old} to {rows} rows; each new row is the mean of the old rows")
    network.resize_token_embeddings(rows, mean_resizing=False)
    network.enlarged_to = rows
    head = network.get_output_embeddings()
    with torch.no_grad():
        for layer in (network.get_input_embeddings(), head):
            for values in (getattr(layer, "weight", None), getattr(layer, "bias", None)):
                if values is not None and len(values) == rows:
                    # in fp64 the mean has the same bits on every device, so that a checkpoint need not hold it
                    precise = torch.float32 if values.device.type == "mps" else torch.float64
                    values[old:] = values[:old].mean(0, dtype=precise).to(values.dtype)


def check_embeddings_loaded(network: Any, resized: set[str]) -> None:
    """Refuse a model whose embedding or output layer has another size than its files, so that it is random.

    Args:
        network: A model of transformers.
        resized: Names of the parameters that have another size than in the files.

    Raises:
        ConfigurationError: The message names the parameter.
    """
    if not resized:
        return
    layers: list[nn.Module | None] = [network.get_input_embeddings(), network.get_output_embeddings()]
    embeddings = [getattr(layer, "weight", None) for layer in layers]
    for name, parameter in network.named_parameters():
        if name in resized and any(parameter is weight for weight in embeddings):
            raise ConfigurationError(
                f"ignore_mismatched_sizes would replace the whole of {name} by random values, because its size differs "
                f"from the files: leave vocab_size out of options, and {RESIZE}"
            )
