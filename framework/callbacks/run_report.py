"""The report at the end of a run: a summary of a few lines and a picture of the loss."""

import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer

from orthotrain.callbacks.step_callback import StepCallback, logged_step
from orthotrain.callbacks.throughput import Throughput, count_inputs, logs_at
from orthotrain.checkpoints.run_folder import run_folder
from orthotrain.checkpoints.stored_values import stored_curves, stored_numbers, stored_tensors
from orthotrain.console.run_summary import References, sample_lines, summary_lines
from orthotrain.devices.accelerators import describe_peak, forget_peak, peak_bytes
from orthotrain.errors import ConfigurationError, check_count
from orthotrain.files.atomic_writes import write_text
from orthotrain.files.pictures import draw_curves
from orthotrain.kernels.dispatch import describe, forget_ran
from orthotrain.layers.protocols import count_numbers, mergeable_layers
from orthotrain.layers.sharding import is_sharded
from orthotrain.layers.spectrum import affordable_layers, spectra, spectrum_drift, spread
from orthotrain.models.network_checks import evaluating, generated_tokens


class RunReport(StepCallback):
    """Print a summary and draw the curves when fitting ends; the run folder keeps both.

    ``summary.json`` has the same values, null where a run has none (``merges`` of a run that never merges), and the
    points of the curves, with digests of the data and of the ``config.yaml`` of the run. Their steps and values are
    those of the loggers: the tenth step has number 9. The loss before training is the loss of the trainer's sanity
    check, at step 0: ``num_sanity_val_steps: -1`` takes the whole validation split. Kernels are the implementations
    that have run in training. The peak of memory is that of the first rank's device and includes the building of the
    network; the planned bytes are shown beside the peak if the run was planned.
    The wall time begins when the network is built. Curves, tokens and time are part of the checkpoint, so a resumed run
    reports from its first step on.

    Args:
        prompt: Text to continue in the sample; None for the beginning of a held-out document, as the data module's
            ``sample_prompt()`` gives it; empty for no sample.
        sample_tokens: Tokens of the sample.
        spectrum_layers: How many mergeable layers, spread over depth and roles, are watched for spectrum drift; 0 for
            none. None for all layers; of a large network, for as many as can be decomposed in minutes, at least 8. The
            summary says how many of how many, and ``summary.json`` names them. A resumed run watches the layers of its
            checkpoint.
        references: Results of other methods, which the summary shows beside the bits per byte of this run. They are
            left out if this run has another number of tokens or another ``source`` of data, or evaluates only a part
            of the validation split.

    Raises:
        ConfigurationError: If ``spectrum_layers`` is below 0, or a checkpoint has spectra of other layers.
    """

    def __init__(
        self,
        prompt: str | None = None,
        sample_tokens: int = 64,
        spectrum_layers: int | None = None,
        references: References | None = None,
    ) -> None:
        if spectrum_layers is not None:
            check_count("RunReport: spectrum_layers", spectrum_layers, least=0)
        self.prompt = prompt
        self.sample_tokens = sample_tokens
        self.spectrum_layers = spectrum_layers
        self.references = references
        self.before: dict[str, float] = {}
        self.curves: dict[str, list[tuple[int, float]]] = {"train_loss": [], "val_loss": []}
        self.spectra: dict[str, torch.Tensor] = {}
        self.spent: dict[str, float] = {"tokens": 0, "seconds": 0.0}
        self._since = perf_counter()
        self._counted: tuple[int, float] = (0, 0.0)
        self._trained = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Measure time and the peak of memory from here on: the network is built next."""
        forget_peak(trainer.strategy.root_device)
        self._since = perf_counter()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record which kernels run from here on."""
        forget_ran()
        self._counted = (0, 0.0)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the spectrum at the start; a resumed run has it from its checkpoint."""
        layers = dict(mergeable_layers(pl_module))
        if not layers.keys() >= self.spectra.keys():
            raise ConfigurationError("RunReport: the checkpoint has spectra of other layers; take an earlier one")
        if not self.spectra:
            count = affordable_layers(pl_module) if self.spectrum_layers is None else self.spectrum_layers
            self.spectra = spectra(pl_module, spread(list(layers), count))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the validation loss; that of the sanity check is the loss before training."""
        metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val_")}
        if trainer.sanity_checking:
            self.before = self.before or metrics
        elif "val_loss" in metrics:
            self._add("val_loss", logged_step(trainer), metrics["val_loss"])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Record the learning rates of a step that the trainer logs; after the step they are those of the next one."""
        if logs_at(trainer, trainer.global_step + 1):
            for name, rate in learning_rates(optimizer).items():
                self._add(f"lr/{name}", logged_step(trainer), rate)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        """Count tokens; record the loss and the speed of each step that the trainer logs."""
        self._trained = True
        self.spent["tokens"] += count_inputs(batch) * trainer.world_size
        if trainer.global_step == self.step_before or not logs_at(trainer, trainer.global_step):
            return
        # not outputs["loss"], which is divided by the number of accumulated batches
        if "train_loss" in trainer.callback_metrics:
            self._add("train_loss", logged_step(trainer), float(trainer.callback_metrics["train_loss"]))
        clock = _throughput(trainer)
        if clock is not None:
            (tokens, seconds), self._counted = self._counted, clock.counted
            if clock.counted[0] > tokens:
                rate = (clock.counted[0] - tokens) / (clock.counted[1] - seconds)
                self._add("tokens_per_second", logged_step(trainer), rate)

    def _add(self, curve: str, step: int, value: float) -> None:
        self.curves.setdefault(curve, []).append((step, value))

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
        values["spectrum_layers"] = list(self.spectra)
        values["mergeable_layers"] = len(list(mergeable_layers(pl_module)))
        write_text(folder / "summary.json", json.dumps(values, indent=1))
        draw_curves(self._drawn(), folder / "curves.png", _unit(pl_module))
        text = "\n".join([*summary_lines(values, folder), *self._sample(trainer, pl_module)])
        write_text(folder / "summary.txt", text + "\n")
        print("\n" + text, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Save spectra, curves, tokens, time and the loss before training, as plain values and tensors."""
        spent = {**self.spent, "seconds": self._seconds}
        return {"before": self.before, "curves": self.curves, "spectra": self.spectra, "spent": spent}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` has saved."""
        self.before = stored_numbers(state_dict, "before")
        self.curves = {**self.curves, **stored_curves(state_dict, "curves")}
        self.spectra = stored_tensors(state_dict, "spectra")
        self.spent = {**self.spent, **stored_numbers({"spent": self.spent, **state_dict}, "spent")}

    @property
    def _seconds(self) -> float:
        return self.spent["seconds"] + perf_counter() - self._since

    def _drawn(self) -> dict[str, list[tuple[int, float]]]:
        """Return the curves with the value before training as the first point."""
        before = [(0, self.before["val_loss"])] if "val_loss" in self.before else []
        return {**self.curves, "val_loss": [*before, *self.curves["val_loss"]]}

    def _values(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        clock, data = _throughput(trainer), _data(trainer)
        saving, planned = trainer.checkpoint_callback, getattr(pl_module, "planned_bytes", None)
        checkpoint = getattr(saving, "last_model_path", "") or getattr(saving, "best_model_path", "")
        if checkpoint and Path(checkpoint).is_relative_to(Path.cwd()):  # Lightning makes its folder absolute
            checkpoint = str(Path(checkpoint).relative_to(Path.cwd()))
        return {
            "steps": trainer.global_step,
            "before": self.before,
            "after": {name: value for name, value in logged.items() if name.startswith("val_")},
            "references": self._comparable(trainer),
            "data": data.amounts() if hasattr(data, "amounts") else {},
            "data_digests": data.digests() if hasattr(data, "digests") else {},
            "config_sha256": next(filter(None, (getattr(c, "config_sha256", None) for c in _callbacks(trainer))), None),
            "tokens": int(self.spent["tokens"]) or None,
            "tokens_per_second": (clock.mean if clock else 0.0) or None,
            "wall_seconds": round(self._seconds, 3),
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

    def _comparable(self, trainer: L.Trainer) -> dict[str, float] | None:
        """Return the results of other methods; None if their runs and this run differ in length, text or evaluation."""
        found, limit = self.references, trainer.limit_val_batches
        if found is None or not isinstance(limit, float) or limit < 1:  # the integer 1 is one batch
            return None
        source = getattr(_data(trainer), "hparams", {}).get("source")
        return found.bits_per_byte if (self.spent["tokens"], source) == (found.tokens, found.source) else None

    def _sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
        data, network = _data(trainer), _network(pl_module)
        tokenizer = getattr(data, "tokenizer", None)
        if self.prompt == "" or tokenizer is None or not hasattr(network, "generate"):
            return []
        if is_sharded(network):  # one rank alone cannot compute
            return []
        prompt = tokenizer.encode(self.prompt) if self.prompt else getattr(data, "sample_prompt", list)()
        if not prompt:
            return []
        ids = torch.tensor([prompt], device=pl_module.device)
        positions = getattr(getattr(network, "config", None), "max_position_embeddings", None)
        new_tokens = min(self.sample_tokens, (positions or sys.maxsize) - len(prompt))
        if new_tokens < 1:
            return []
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
            out = network.generate(ids, attention_mask=mask, max_new_tokens=new_tokens, **sampling)
        new = generated_tokens(network, out[0], len(prompt))
        return sample_lines(tokenizer.decode(prompt), tokenizer.decode(new))


def _throughput(trainer: L.Trainer) -> Throughput | None:
    return next((callback for callback in _callbacks(trainer) if isinstance(callback, Throughput)), None)


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def _data(trainer: L.Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _network(pl_module: L.LightningModule) -> Any:
    return getattr(pl_module, "model", None)


def _unit(pl_module: L.LightningModule) -> str:
    return "nats per token" if getattr(pl_module, "logs_perplexity", False) else "loss"


def learning_rates(optimizer: Optimizer) -> dict[str, float]:
    """Return the learning rates of an optimizer by the names of its groups; a name that comes again gets a number."""
    rates: dict[str, float] = {}
    for group in optimizer.param_groups:
        name = str(group.get("name", "parameters"))
        same = sum(known == name or known.startswith(f"{name} ") for known in rates)
        rates[f"{name} {same + 1}" if same else name] = float(group["lr"])
    return rates
