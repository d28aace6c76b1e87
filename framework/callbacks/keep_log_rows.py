"""Keeping the rows that a run has logged before it was resumed."""

import csv
import io
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn

from orthotrain.files.atomic_writes import write_text


class KeepLogRows(L.Callback):
    """Let a resumed run continue the ``metrics.csv`` of a ``CSVLogger`` whose version is fixed.

    Lightning's logger deletes the file of an earlier run in its folder, before the first hook of a callback. A run that
    resumes gets the rows back that were logged before the step of its checkpoint. A run that begins anew writes a new
    file.

    Args:
        trainer: The trainer, whose loggers have not written yet; None where a module has none.
    """

    def __init__(self, trainer: L.Trainer | None) -> None:
        self._rows: list[tuple[CSVLogger, list[dict[str, str]]]] = []
        for logger in [] if trainer is None or trainer.state.fn != TrainerFn.FITTING else trainer.loggers:
            if isinstance(logger, CSVLogger) and (path := Path(logger.log_dir) / "metrics.csv").is_file():
                self._rows.append((logger, _read(path)))

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the rows before the step of the checkpoint again."""
        rows_of, self._rows = self._rows, []
        for logger, rows in rows_of:
            kept = [row for row in rows if _step(row) < checkpoint["global_step"]]
            if kept and trainer.is_global_zero:
                writer = logger.experiment
                writer.metrics_keys = list(kept[0])
                write_text(Path(writer.metrics_file_path), _written(kept))


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        try:
            return [{k: v or "" for k, v in row.items() if k is not None} for row in csv.DictReader(file)]
        except csv.Error:  # no table
            return []


def _step(row: dict[str, str]) -> float:
    """Return the step of a row; infinity for a row that a killed run has written by half."""
    step = row.get("step", "")
    return int(step) if step.isdecimal() else float("inf")


def _written(rows: list[dict[str, str]]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
