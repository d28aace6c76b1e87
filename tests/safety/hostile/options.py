"""Options of the user's own that cannot be, names with escapes, and output that is closed or full."""

from collections.abc import Iterator

from hostile.rows import EITHER, Call, Row

KIND = "option"

OPTIONS = {
    "negative seed": ["--seed_everything", "-1"], "huge seed": ["--seed_everything", str(1 << 70)],
    "seed of the model": ["--model.seed", "-1"], "seed of the data": ["--data.seed", "-5"],
    "accumulate 0": ["--trainer.accumulate_grad_batches", "0"],
    "accumulate -3": ["--trainer.accumulate_grad_batches", "-3"], "batch size 0": ["--data.batch_size", "0"],
    "batch size 2^62": ["--data.batch_size", str(1 << 62)], "sequence 0": ["--data.sequence_length", "0"],
    "sequence 2^62": ["--data.sequence_length", str(1 << 62)], "vocabulary 2^62": ["--data.vocab_size", str(1 << 62)],
    "vocabulary -1": ["--data.vocab_size", "-1"], "block size 0": ["--model.layers.block_size", "0"],
    "block size -8": ["--model.layers.block_size", "-8"],
    "block size 2^62": ["--model.layers.block_size", str(1 << 62)],
    "merge every 0": ["--model.merge_every", "0"], "merge every -1": ["--model.merge_every", "-1"],
    "rate NaN": ["--model.optimization.lr", ".nan"], "rate infinite": ["--model.optimization.lr", ".inf"],
    "fraction NaN": ["--data.val_fraction", ".nan"], "workers -1": ["--data.num_workers", "-1"],
    "clip NaN": ["--trainer.gradient_clip_val", ".nan"], "clip -1": ["--trainer.gradient_clip_val", "-1"],
    "devices -5": ["--trainer.devices", "-5"], "devices 0": ["--trainer.devices", "0"],
    "log every -1": ["--trainer.log_every_n_steps", "-1"], "precision": ["--trainer.precision", "3"],
    "max steps -7": ["--trainer.max_steps", "-7"], "max time": ["--trainer.max_time", "soon"],
    "strategy": ["--trainer.strategy", "\x1b[2Jx"], "unknown with escape": ["--trainer.\x1b]0;owned\x07", "1"],
    "value with escape": ["--model.merge_every", "\x1b[2J1"], "surrogate": ["--trainer.max_steps", "\udcff"],
    "callback with escape": ["--trainer.callbacks+", "\x1b[2JRunReport"],
    "limit 2": ["--trainer.limit_val_batches", "-2"], "overfit -1": ["--trainer.overfit_batches", "-1"],
}  # fmt: skip
FINE_TOO = ("seed of the model", "seed of the data", "log every -1", "huge seed")


def rows() -> Iterator[Row]:
    """Options of the user's own that cannot be, and closed output."""
    for name, options in OPTIONS.items():
        words = (
            options[0].strip("-").split(".")[-1].replace("\x1b]0;owned\x07", "owned").rstrip("+"),
            options[1],
            "trainer",
            "callback",
        )
        yield Row(KIND, name, "fit", lambda place, options=options: Call(["fit", "-c", place.config(), *options]),
                  EITHER if name in FINE_TOO else (2,), words)  # fmt: skip
    yield Row(KIND, "command with escape", "main", lambda place: Call(["f\x1b]0;owned\x07it"]), names=("f",))
    yield Row(KIND, "command of bytes", "main", lambda place: Call(["\udcfffit"]), names=("fit",))
    yield Row(KIND, "allow with escape", "export", lambda place: Call(
        ["export", "--ckpt", place.good.checkpoint, "--out", "out", "--allow", "\x1b[2Jx.y"]), EITHER, ("allow",
        "x.y"))  # fmt: skip
    calls = {
        "plan": lambda place: ["plan", "-c", place.config()],
        "export": lambda place: ["export", "--ckpt", place.good.checkpoint, "--out", "out"],
        "fit": lambda place: ["fit", "-c", place.config()],
        "validate": lambda place: ["validate", "-c", place.config(), "--ckpt_path", place.good.checkpoint],
        "consolidate": lambda place: ["consolidate", place.good.shards, "one.ckpt"],
        "main": lambda place: ["plugins"],
    }
    for command, arguments in calls.items():
        for name, closed in {"stdout": (1,), "stderr": (2,), "both": (1, 2)}.items():
            yield Row(KIND, f"{name} closed", command, lambda place, arguments=arguments, closed=closed: Call(
                arguments(place), closed=closed), EITHER if name != "stderr" else (0,), ("stdout",
                "output"))  # fmt: skip
        yield Row(KIND, "full device", command, lambda place, arguments=arguments: Call(arguments(place),
        closed=(-1,)),
                  EITHER, ("output", "No space", "stdout"))  # fmt: skip
