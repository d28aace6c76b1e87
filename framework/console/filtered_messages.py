"""Log lines and warnings of libraries that tell a user nothing, hidden in one place."""

import functools
import logging
import re
import warnings
from collections.abc import Callable

# main prints its own line once a checkpoint is restored
_RANK_ZERO = r"GPU available: |TPU available: |Tip:|litlogger|Restoring states from"
LOG_LINES = {
    "lightning.pytorch.utilities.rank_zero": _RANK_ZERO,
    "lightning.fabric.utilities.rank_zero": _RANK_ZERO,  # logs these lines if it is imported after the first one
    "lightning.fabric.utilities.seed": r"Seed set to",
    "lightning.pytorch.trainer.connectors.checkpoint_connector": r"`weights_only` was not set",
    # advises to install a package that downloads code and runs it; the product is computed without that package
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward",
}
"""Name of a logger -> pattern of the lines that are hidden."""

WARNINGS = (
    r".*LeafSpec.*",
    r".*treespec.*",
    r".*does not have many workers.*",
    r"Checkpoint directory .* exists and is not empty",
)


@functools.cache
def lines_without(pattern: str) -> Callable[[logging.LogRecord], bool]:
    """Return the filter of a logger that hides the lines with a pattern; the same filter for the same pattern."""
    return lambda record: not re.search(pattern, record.getMessage())


def hide_messages() -> None:
    """Hide the lines and warnings from now on; a second call changes nothing."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, pattern in LOG_LINES.items():
        logging.getLogger(name).addFilter(lines_without(pattern))  # a filter is added once


def hide_lightning() -> None:
    """Hide also what Lightning logs about short runs, for a program that prints a table of its own."""
    hide_messages()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*(no `val_dataloader`|log_every_n|in eval mode).*")
