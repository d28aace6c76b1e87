"""What libraries print that no user can act on, dropped in one place; what says something stays."""

import logging
import re
import warnings

_RANK_ZERO = r"GPU available: |TPU available: |Tip:|litlogger|Restoring states from"
# what was restored is said once it is
LINES = {
    "lightning.pytorch.utilities.rank_zero": _RANK_ZERO,
    "lightning.fabric.utilities.rank_zero": _RANK_ZERO,  # where the others go if it is imported later
    "lightning.fabric.utilities.seed": r"Seed set to",
    "lightning.pytorch.trainer.connectors.checkpoint_connector": r"`weights_only` was not set",
    # advises to install a package that fetches code and runs it; the product is computed all the same
    "bitsandbytes.backends.cpu.ops": r"Failed to load CPU gemm_4bit_forward",
}
"""Logger -> what a line has that is dropped."""

WARNINGS = (
    r".*LeafSpec.*",
    r".*treespec.*",
    r".*does not have many workers.*",
    r"Checkpoint directory .* exists and is not empty",
)


class Drop(logging.Filter):
    """Drops the lines of a logger that a pattern finds."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a line is kept."""
        return not self.pattern.search(record.getMessage())


def drop_noise() -> None:
    """Drop it from now on; a second call changes nothing."""
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, pattern in LINES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, Drop) for known in logger.filters):
            logger.addFilter(Drop(pattern))


def silence() -> None:
    """Drop it, and all that Lightning says of short runs in a program that prints a table of its own."""
    drop_noise()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=r".*(no `val_dataloader`|log_every_n|in eval mode).*")
