"""Writing the text of predictions to a file."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L

from orthotrain.checkpoints.run_folder import run_folder
from orthotrain.console.failures import naming
from orthotrain.files.atomic_writes import open_to_append, write_text
from orthotrain.models.network_checks import generated_tokens


class SampleWriter(L.Callback):
    """Write the prompts and continuations of ``predict`` to ``samples-<rank>.jsonl`` in the run folder."""

    path: Path | None = None

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start a new file."""
        folder = run_folder(trainer)
        self.path = None if folder is None else folder / f"samples-{trainer.global_rank}.jsonl"
        if self.path is not None:
            write_text(self.path, "")

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Append the texts of a batch."""
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if self.path is None or tokenizer is None or not isinstance(batch, Mapping):
            return
        with naming(self.path), open_to_append(self.path) as file:
            for prompt, output in zip(batch["input_ids"], outputs, strict=True):
                answer = generated_tokens(getattr(pl_module, "model", None), output, len(prompt))
                row = {
                    "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
                    "continuation": tokenizer.decode(answer, skip_special_tokens=True),
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the path of the file."""
        if self.path is not None:
            print(f"samples: {self.path}", flush=True)
