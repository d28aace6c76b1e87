"""What a run has done, in a few lines and one picture."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from orthotrain.callbacks.throughput import Throughput
from orthotrain.layers.mergeable import mergeable_layers


class RunReport(L.Callback):
    """Print a summary and draw the curves when fitting ends; both lie in the run folder.

    The values lie in ``summary.json`` too. The loss before training is that of the trainer's sanity check: set
    ``num_sanity_val_steps: -1`` for the whole validation split. What was seen is
    part of the checkpoint, so a resumed run reports from the first step on.

    Args:
        prompt: Text to continue in the sample; empty for no sample.
        sample_tokens: Tokens of the sample.
        spectrum_layers: How many mergeable layers are watched for spectrum drift, the first ones; 0 for none.
    """

    def __init__(self, prompt: str = "def __init__(self, ", sample_tokens: int = 64, spectrum_layers: int = 8) -> None:
        self.prompt = prompt
        self.sample_tokens = sample_tokens
        self.spectrum_layers = spectrum_layers
        self.before: dict[str, float] = {}
        self.curves: dict[str, list[tuple[int, float]]] = {"train_loss": [], "val_loss": []}
        self.spectra: dict[str, torch.Tensor] = {}
        self._throughput: Throughput | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember the spectrum at the start; a resumed run has it from its checkpoint."""
        self._throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore
        if not self.spectra:
            self.spectra = singular_values(pl_module, self.spectrum_layers)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the validation loss; the first one, before any step, is the ``before`` of the summary."""
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        if trainer.sanity_checking:
            self.before = self.before or metrics
        elif "val_loss" in metrics:
            self.curves["val_loss"].append((trainer.global_step, metrics["val_loss"]))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the training loss at the trainer's cadence."""
        if trainer.global_step % trainer.log_every_n_steps == 0 and isinstance(outputs, dict):  # type: ignore
            self.curves["train_loss"].append((trainer.global_step, float(outputs["loss"])))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and print on the first rank."""
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        text = "\n".join(self._lines(trainer, pl_module, folder))
        (folder / "summary.txt").write_text(text + "\n", encoding="utf-8")
        after = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        values = {"steps": trainer.global_step, "before": self.before, "after": after, "curves": self.curves}
        (folder / "summary.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        print("\n" + text, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Save what was seen, as plain values and tensors."""
        return {"before": self.before, "curves": self.curves, "spectra": self.spectra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what was seen before."""
        self.before, self.curves, self.spectra = state_dict["before"], state_dict["curves"], state_dict["spectra"]

    def _lines(self, trainer: L.Trainer, pl_module: L.LightningModule, folder: Path) -> list[str]:
        after = {k: float(v) for k, v in trainer.callback_metrics.items()}
        rows = [("optimizer steps", f"{trainer.global_step}")]
        for key in (key for key in after if key.startswith("val_")):
            before = f"{self.before[key]:.3f} -> " if key in self.before else ""
            rows.append((f"validation {key.removeprefix('val_').replace('_', ' ')}", f"{before}{after[key]:.3f}"))
        if self._throughput is not None:
            rows.append(("tokens per second", f"{self._throughput.mean:,.0f}"))
        trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in pl_module.parameters())
        rows.append(("parameters", f"{trainable:,} trained of {total:,}"))
        if self.spectra:
            rows.append(("spectrum drift", f"{spectrum_drift(pl_module, self.spectra):.1e} (largest, relative)"))
        rows.append(("curves", str(draw_curves(self.curves, folder / "curves.png"))))
        checkpoint = getattr(trainer.checkpoint_callback, "last_model_path", "") or getattr(
            trainer.checkpoint_callback, "best_model_path", ""
        )
        rows.append(("checkpoint", checkpoint or "none was written"))
        rows.append(("run folder", str(folder)))
        lines = [f"{name:<26}{value}" for name, value in rows]
        return lines + self._sample(trainer, pl_module)

    def _sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        network = getattr(pl_module, "model", None)
        if not self.prompt or tokenizer is None or network is None or not hasattr(network, "generate"):
            return []
        ids = torch.tensor([tokenizer.encode(self.prompt)], device=pl_module.device)
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), trainer.precision_plugin.forward_context():
            torch.manual_seed(0)
            out = network.eval().generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.sample_tokens,
                do_sample=True,
                temperature=0.8,
                top_p=0.95,
                pad_token_id=tokenizer.eos_token_id,
            )
        return ["sample", *("  " + line for line in tokenizer.decode(out[0]).splitlines())]


@torch.no_grad()
def singular_values(model: nn.Module, layers: int) -> dict[str, torch.Tensor]:
    """Return name -> singular values (fp32, descending) of the merged weights of the first mergeable layers."""
    chosen = list(mergeable_layers(model))[:layers]
    return {name: torch.linalg.svdvals(layer.merged_weight().float()).cpu() for name, layer in chosen}


def spectrum_drift(model: nn.Module, start: dict[str, torch.Tensor]) -> float:
    """Return ``max |s_i - s_i(start)| / s_1(start)`` over the watched layers."""
    now = singular_values(model, len(start))
    return max(float((now[name] - values).abs().max() / values.max()) for name, values in start.items())


def draw_curves(curves: dict[str, list[tuple[int, float]]], path: Path) -> Path:
    """Draw loss over optimizer steps as a PNG and return its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, points in curves.items():
        if points:
            axes.plot(
                *zip(*points, strict=True), label=name.replace("_", " "), marker="o" if len(points) < 20 else None
            )
    axes.set(xlabel="optimizer step", ylabel="nats per token")
    axes.grid(alpha=0.3)
    if any(curves.values()):
        axes.legend()
    figure.savefig(path, dpi=120)
    return path
