"""Log lines and warnings of libraries that tell a user nothing, hidden in one place."""

import logging
import re
import warnings

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


class HideLines(logging.Filter):
    """Hides the lines of a logger that contain a pattern."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line is shown."""
        return not self.pattern.search(record.getMessage())


def hide_messages() -> None:
    """Hide the lines and warnings from now on; a second call changes nothing."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, pattern in LOG_LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, HideLines) for known in logger.filters):
            logger.addFilter(HideLines(pattern))


def hide_lightning() -> None:
    """Hide also what Lightning logs about short runs, for a program that prints a table of its own."""
    hide_messages()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*(no `val_dataloader`|log_every_n|in eval mode).*")
