"""Stage 7: `orthotrain fit` of a 60M LLaMA by the command line: 300 steps with merges, interrupted once."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gpu.device import Gpu
from gpu.record import Case

STEPS, FIRST, MERGE_EVERY = 300, 200, 50
PROGRAM = "from orthotrain.cli.main import main; main()"  # the console script may not be installed


def cases(machine: Gpu) -> Iterator[Case]:
    """Yield the two parts of the run; the second goes on in the folder of the first."""
    folder = Path(os.environ["ORTHOTRAIN_GPU_SCRATCH"]) / "fit"
    first, steps = machine.pick((FIRST, STEPS), (4, 6))
    yield Case("fit", partial(fitted, machine, folder, first, []), machine.pick(15.0, 0.0))
    yield Case("resumed", partial(fitted, machine, folder, steps, ["--ckpt_path", "last"]), machine.pick(15.0, 0.0))


def arguments(machine: Gpu, folder: Path, steps: int) -> list[str]:
    """Return the command line of a run: a shipped config, and the source files of this package as its text."""
    text = Path(__file__).parents[3] / "framework" / "*" / "*.py"
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    small = {f"model.model.init_args.config.{name}": value for name, value in sizes.items()}
    small |= {"model.layers.block_size": 8, "data.source": text, "data.batch_size": 1, "data.sequence_length": 32}
    options = {
        "trainer.accelerator": machine.accelerator,
        "trainer.devices": 1,
        "trainer.max_steps": steps,
        "trainer.accumulate_grad_batches": 1,
        "trainer.val_check_interval": machine.pick(100, 2),
        "trainer.limit_val_batches": machine.pick(8, 1),
        "trainer.num_sanity_val_steps": machine.pick(8, 1),
        "trainer.log_every_n_steps": machine.pick(10, 1),
        "model.merge_every": machine.pick(MERGE_EVERY, 2),
        "model.model.init_args.config.vocab_size": machine.pick(4096, 300),
        "data.vocab_size": machine.pick(4096, 300),
        **machine.pick({}, small),
    }
    command = ["fit", "-c", "pretrain/paper/poet_llama_60m.yaml", "-c", "pretrain/options/stdlib.yaml"]
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [*command, *given, "--run_folder", str(folder)]


def fitted(machine: Gpu, folder: Path, steps: int, resume: list[str]) -> dict[str, Any]:
    """Return what the summary of a run says, and the seconds of the whole command.

    Raises:
        RuntimeError: The command failed, with the end of what it printed; or its summary is not that of this run.
    """
    start = time.perf_counter()
    command = [sys.executable, "-P", "-c", PROGRAM, *arguments(machine, folder, steps), *resume]
    done = subprocess.run(command, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if summary["steps"] != steps:
        raise RuntimeError(f"the summary tells of {summary['steps']} steps, not of {steps}")
    curves = summary.pop("curves", {})
    told = {name: points[-1][1] for name, points in curves.items() if points}
    return {"command_s": taken, "curve_ends": told, "summary": summary}
