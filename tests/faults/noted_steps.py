"""A callback for the configs of runs of the real command: it writes every optimizer step to a file."""

import lightning as L


class NotedSteps(L.Callback):
    def __init__(self, path: str) -> None:
        self.path, self._before = path, 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self._before = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step != self._before:
            with open(self.path, "a") as file:
                file.write(f"{trainer.global_step}\n")
