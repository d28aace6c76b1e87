"""The whole table."""

from hostile import bombs, broken_values, deletions, descriptions, folders, special_files, text_bombs

MODULES = (descriptions, deletions, bombs, text_bombs, special_files, broken_values, folders)
ROWS = [row for module in MODULES for row in module.rows()]
KINDS = {"description", "deletion", "planted", "bomb", "text bomb", "special file", "path", "broken value", "state", "option", "folder"}
COMMANDS = {
    "fit", "validate", "test", "predict", "plan", "export", "export-peft", "consolidate", "checkpoint_model", "load_network",
    "load_from_checkpoint", "load_adapter", "import_peft", "pretrained", "tokenizer", "fit-from", "plan-from", "main",
    "calibrate", "finetune", "fit-last",
}  # fmt: skip
