"""The whole table, and the part of it that ``make test`` runs."""

import os
from collections import Counter
from collections.abc import Iterator

from hostile import (
    bombs,
    broken_values,
    deletions,
    description_keys,
    descriptions,
    folders,
    options,
    planted,
    shards,
    special_files,
    states,
    text_bombs,
)
from hostile.rows import Row

MODULES = (
    descriptions, description_keys, deletions, planted, bombs, text_bombs, special_files, broken_values, states,
    options, folders, shards,
)  # fmt: skip
ALL = [row for module in MODULES for row in module.rows()]
KINDS = {
    "description", "deletion", "planted", "bomb", "text bomb", "special file", "path", "broken value", "state",
    "option", "folder", "shards",
}  # fmt: skip
COMMANDS = {
    "fit", "validate", "test", "predict", "plan", "export", "export-peft", "consolidate", "checkpoint_model",
    "load_network", "load_from_checkpoint", "load_adapter", "import_peft", "pretrained", "tokenizer", "fit-from",
    "plan-from", "main", "calibrate", "finetune", "fit-last",
}  # fmt: skip
SLOW = {"fit", "validate", "test", "predict", "plan", "tokenizer", "fit-from", "plan-from", "finetune", "fit-last"}
"""Commands that parse a config, which takes half a second; all others take a tenth."""

ALWAYS = (
    "optimizer as json", "scheduler as json", "model as json", "parameterization as json", "optimizer as dotted",
    "model as file url", "optimizer as yaml file", "key _instantiator os.system", "best_model_path local",
    "last_model_path upwards", "saved upwards", "foreign folder .thesis.old", ".out.{pid}.partial to sub",
    "negative seed", "accumulate 0", "stdout closed", "yaml aliases", "template power", "token 2^31",
    "without optimizer states", "permutation repeats", "zeros.json.gz", "prompt of 16 MiB of letters",
    "stride 0 as weight",
)  # fmt: skip
"""Beginnings of the names of rows that are never left out: the faults that led to this table."""


def chosen() -> Iterator[Row]:
    """Three of five rows of each kind and quick command, every 40th of each slow one, and those that always run."""
    seen: Counter[tuple[str, str]] = Counter()
    for row in ALL:
        group = (row.kind, row.command)
        every = seen[group] % 40 == 0 if row.command in SLOW else seen[group] % 5 in (0, 2, 4)
        if every or row.name.startswith(ALWAYS):
            yield row
        seen[group] += 1


ROWS = ALL if os.environ.get("ORTHOTRAIN_SAFETY") == "all" else list(chosen())
