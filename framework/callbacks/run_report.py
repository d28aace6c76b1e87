"""The report at the end of a run: a summary of a few lines and a picture of the loss."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from orthotrain.callbacks.spectrum_monitor import spectrum
from orthotrain.callbacks.step_callback import StepCallback
from orthotrain.callbacks.throughput import Throughput, logs_at
from orthotrain.checkpoints.run_folder import run_folder
from orthotrain.checkpoints.stored_values import stored_count, stored_curves, stored_numbers, stored_tensors
from orthotrain.devices.accelerators import describe_peak, forget_peak, peak_bytes
from orthotrain.errors import ConfigurationError, escaped
from orthotrain.files.atomic_writes import write_text
from orthotrain.files.paths import read_json
from orthotrain.files.pictures import draw_lines, panels, save
from orthotrain.kernels.dispatch import describe, forget_ran
from orthotrain.layers.protocols import count_numbers, mergeable_layers
from orthotrain.layers.sharding import is_sharded
from orthotrain.layers.spectrum import spectral_drift
from orthotrain.models.network_checks import evaluating


class RunReport(StepCallback):
    """Print a summary and draw the curves when fitting ends; the run folder keeps both.

    ``summary.json`` has the same values, null where a run has none (``merges`` of a run that never merges). The loss
    before training is the loss of the trainer's sanity check: ``num_sanity_val_steps: -1`` takes the whole validation
    split. Kernels are the implementations that have run in training. The peak of memory is that of the first rank's
    device and includes the building of the network; the planned bytes are shown beside the peak if the run was planned.
    The curves are part of the checkpoint, so a resumed run reports from its first step on.

    Args:
        prompt: Text to continue in the sample; empty for no sample.
        sample_tokens: Tokens of the sample.
        spectrum_layers: How many mergeable layers, from the first one, are watched for spectrum drift; 0 for none.
        compared_with: Config of a run to compare with, such as ``pretrain/adamw_quickstart.yaml``. The summary shows
            the validation of that run if its folder lies beside this run's folder, else the command that trains it.
    """

    def __init__(
        self,
        prompt: str = "def __init__(self, ",
        sample_tokens: int = 64,
        spectrum_layers: int = 8,
        compared_with: str | None = None,
    ) -> None:
        self.prompt = prompt
        self.sample_tokens = sample_tokens
        self.spectrum_layers = spectrum_layers
        self.compared_with = compared_with
        self.before: dict[str, float] = {}
        self.curves: dict[str, list[tuple[int, float]]] = {"train_loss": [], "val_loss": []}
        self.spectra: dict[str, torch.Tensor] = {}
        self._trained = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Measure the peak of memory from here on: the network is built next."""
        forget_peak(trainer.strategy.root_device)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record which kernels run from here on."""
        forget_ran()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the spectrum at the start; a resumed run has it from its checkpoint."""
        names = [name for name, _ in mergeable_layers(pl_module)][: self.spectrum_layers]
        if self.spectra and set(self.spectra) != set(names):
            raise ConfigurationError("RunReport: the checkpoint has spectra of other layers; take an earlier one")
        if not self.spectra:
            self.spectra = singular_values(pl_module, self.spectrum_layers)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the validation loss; that of the sanity check is the loss before training."""
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        if trainer.sanity_checking:
            self.before = self.before or metrics
        elif "val_loss" in metrics:
            self.curves["val_loss"].append((trainer.global_step, metrics["val_loss"]))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any) -> None:
        """Record the training loss of the last batch of each step that the trainer logs."""
        self._trained = True
        step = trainer.global_step
        if step != self.step_before and logs_at(trainer, step) and isinstance(outputs, dict):
            self.curves["train_loss"].append((step, float(outputs["loss"])))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print and draw on the first rank; a run that had no step left keeps its earlier report."""
        if not self._trained:
            rank_zero_info(f"no step was taken: the run is at step {trainer.global_step} of {trainer.max_steps}")
            return
        folder = run_folder(trainer)
        if folder is None:
            return
        kernels = describe()  # before the drift, which itself runs kernels
        drift = spectrum_drift(pl_module, self.spectra) if self.spectra else None  # on all ranks: layers may be sharded
        if not trainer.is_global_zero:
            return
        values = self._values(trainer, pl_module) | {"spectrum_drift": drift, "kernels": kernels}
        values["compared_with"] = self._compared(folder)
        write_text(folder / "summary.json", json.dumps(values, indent=1))
        text = "\n".join([*self._lines(values, folder), *self._sample(trainer, pl_module)])
        write_text(folder / "summary.txt", text + "\n")
        print("\n" + text, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Save spectra, curves and the loss before training, as plain values and tensors."""
        return {"before": self.before, "curves": self.curves, "spectra": self.spectra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` has saved."""
        self.before = stored_numbers(state_dict, "before")
        self.curves = {**self.curves, **stored_curves(state_dict, "curves")}
        self.spectra = stored_tensors(state_dict, "spectra")

    def _values(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        throughput = next((c.mean for c in trainer.callbacks if isinstance(c, Throughput)), 0.0)  # type: ignore
        saving, planned = trainer.checkpoint_callback, getattr(pl_module, "planned_bytes", None)
        checkpoint = getattr(saving, "last_model_path", "") or getattr(saving, "best_model_path", "")
        if checkpoint and Path(checkpoint).is_relative_to(Path.cwd()):  # Lightning makes its folder absolute
            checkpoint = str(Path(checkpoint).relative_to(Path.cwd()))
        return {
            "steps": trainer.global_step,
            "before": self.before,
            "after": {name: value for name, value in logged.items() if name.startswith("val_")},
            "tokens_per_second": throughput or None,
            "peak_memory_bytes": peak_bytes(trainer.strategy.root_device),
            "planned_bytes": planned,
            "memory": describe_peak(trainer.strategy.root_device, planned),
            "next_token_loss": getattr(pl_module, "loss_described", None),
            "trainable_parameters": count_numbers(pl_module, trained=True),
            "total_parameters": count_numbers(pl_module),
            "merges": int(logged["merges"]) if "merges" in logged else None,
            "early_folds": int(logged["early_folds"]) if "early_folds" in logged else None,
            "checkpoint": checkpoint or None,
            "curves": self.curves,
        }

    def _lines(self, values: dict[str, Any], folder: Path) -> list[str]:
        rows = [("optimizer steps", str(values["steps"]))]
        for key, after in values["after"].items():
            before = f"{self.before[key]:.3f} -> " if key in self.before else ""
            rows.append((f"validation {_metric(key)}", f"{before}{after:.3f}"))
        if values["tokens_per_second"] is not None:
            rows.append(("tokens per second", f"{values['tokens_per_second']:,.0f}"))
        names = {"memory": "peak memory", "next_token_loss": "next-token loss"}
        for key in ("memory", "next_token_loss", "kernels", "compared_with"):
            if values[key] is not None:
                rows.append((names.get(key, key.replace("_", " ")), values[key]))
        rows.append(("parameters", f"{values['trainable_parameters']:,} trained of {values['total_parameters']:,}"))
        early = values["early_folds"]
        if values["merges"] is not None or early is not None:
            # a run shorter than a period may have folded single layers only
            folds = "" if early is None else f", and {early} early folds of single layers"
            rows.append(("merges", f"{values['merges'] or 0}{folds}"))
        if values["spectrum_drift"] is not None:
            rows.append(("spectrum drift", f"{values['spectrum_drift']:.1e} (largest, relative)"))
        rows.append(("curves", str(draw_curves(self.curves, folder / "curves.png"))))
        rows.append(("checkpoint", values["checkpoint"] or "none was written"))
        rows.append(("run folder", str(folder)))
        return [f"{name:<26}{value}" for name, value in rows]

    def _compared(self, folder: Path) -> str | None:
        """Return the validation of the run to compare with, or the command that trains it."""
        if self.compared_with is None:
            return None
        command = f"orthotrain fit -c {self.compared_with}"
        summary = folder.parent / Path(self.compared_with).stem / "summary.json"
        try:
            values = read_json(summary, "summary")
            steps, after = stored_count(values, "steps"), stored_numbers(values, "after")
        except (ConfigurationError, AttributeError):  # no such run yet, or no summary of a run
            return f"{command} (not run yet)"
        figures = ", ".join(f"{_metric(name)} {value:.3f}" for name, value in after.items())
        return f"{summary.parent}: {figures} after {steps} steps"

    def _sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        network = getattr(pl_module, "model", None)
        if not self.prompt or tokenizer is None or network is None or not hasattr(network, "generate"):
            return []
        if is_sharded(network):  # one rank alone cannot compute
            return []
        ids = torch.tensor([tokenizer.encode(self.prompt)], device=pl_module.device)
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with (
            torch.random.fork_rng(devices),
            torch.no_grad(),
            trainer.precision_plugin.forward_context(),
            evaluating(network),
        ):
            torch.manual_seed(0)
            sampling = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "pad_token_id": tokenizer.eos_token_id}
            mask = torch.ones_like(ids)
            out = network.generate(ids, attention_mask=mask, max_new_tokens=self.sample_tokens, **sampling)
        return ["sample", *("  " + escaped(line) for line in tokenizer.decode(out[0]).splitlines())]


def _metric(name: str) -> str:
    return name.removeprefix("val_").replace("_", " ")


@torch.no_grad()
def singular_values(model: nn.Module, layers: int) -> dict[str, torch.Tensor]:
    """Return name -> singular values (fp32, descending) of the merged weights of the first mergeable layers."""
    return {name: spectrum(layer) for name, layer in list(mergeable_layers(model))[:layers]}


def spectrum_drift(model: nn.Module, start: dict[str, torch.Tensor]) -> float:
    """Return the largest :func:`spectral_drift` of the watched layers."""
    now = singular_values(model, len(start))
    return max(spectral_drift(now[name], values) for name, values in start.items())


def draw_curves(curves: dict[str, list[tuple[int, float]]], path: Path) -> Path:
    """Draw loss over optimizer steps as a PNG and return its path."""
    figure, (axes,) = panels(["loss"])
    lines = {name.replace("_", " "): points for name, points in curves.items()}
    draw_lines(axes, lines, xlabel="optimizer step", ylabel="nats per token")
    return save(figure, path)
