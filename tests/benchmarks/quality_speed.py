"""Tokens per second of the best setting of each method in quality.py, on an idle machine.

    .venv/bin/python tests/benchmarks/quality_speed.py [--rounds 3] [--steps 30]

All methods are trained in one process, in turns; the figure is the median over the rounds. The command line's clock
measures it (:class:`Throughput`): whole steps with data, folds, merges and the optimizer, without the first step.
"""

import argparse
import json
import statistics

import lightning as L
import torch
from quality import FOLDER, OUT, SOURCES, run_of
from quality_corpus import write
from quality_methods import VOCABULARY, Setting, module_of

from orthotrain.callbacks.throughput import Throughput
from orthotrain.data import TextData


def chosen() -> list[Setting]:
    """Return the settings that were run at the full length."""
    runs = [run_of(row) for row in json.loads(OUT.read_text())["results"]]
    return list(dict.fromkeys(setting for network, setting, share, _ in runs if (network, share) == ("0.4M", 1)))


def speed(setting: Setting, steps: int) -> float:
    """Return tokens per second over some steps of a fresh run."""
    clock = Throughput()
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = L.Trainer(accelerator="cpu", precision="bf16-mixed", max_steps=steps, gradient_clip_val=1.0,
                        limit_val_batches=0, callbacks=[clock], **off)  # fmt: skip
    texts = {name: str(FOLDER / f"corpus/{split}.jsonl") for split, name in SOURCES.items()}
    trainer.fit(module_of(setting, "0.4M", steps, 0), datamodule=TextData(**texts, vocab_size=VOCABULARY))
    return clock.mean


def main() -> None:
    """Measure, print and write the speeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    write(FOLDER / "corpus")
    found: dict[str, list[float]] = {setting.name: [] for setting in chosen()}
    for _ in range(options.rounds):
        for setting in chosen():
            found[setting.name].append(speed(setting, options.steps))
    medians = {name: {"tokens_per_second": statistics.median(each)} for name, each in found.items()}
    for name, row in medians.items():
        print(f"{row['tokens_per_second']:8,.0f}  {name}")
    document = {"versions": {"torch": torch.__version__}, "threads": 1, "results": medians}
    OUT.with_name("quality_speed.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
