"""What needs more than one real process: building at the same time, and several ranks."""

import json
import os

import lightning as L
import torch

from orthotrain.data.corpus import cache_folder


def in_processes(function, count):
    """Return what the function returns in each of some forked processes that run at once."""
    children = []
    for _ in range(count):
        reading, writing = os.pipe()
        if not (child := os.fork()):
            try:
                os.write(writing, json.dumps(function()).encode())
            finally:
                os._exit(0)
        os.close(writing)
        children.append((child, reading))
    results = []
    for child, reading in children:
        with os.fdopen(reading) as pipe:
            results.append(json.loads(pipe.read()))
        os.waitpid(child, 0)
    return results


def test_two_processes_that_start_at_once_build_one_cache(make_data, tmp_path, monkeypatch):
    build, builds = cache_folder.build_caches, []
    monkeypatch.setattr(cache_folder, "build_caches", lambda *given: builds.append(1) or build(*given))

    def set_up():
        data = make_data(cache_dir=str(tmp_path))
        data.setup()
        return len(builds), data._cache("train").metadata.tokens, data.tokenizer_fingerprint

    results = in_processes(set_up, 2)
    assert sorted(result[0] for result in results) == [0, 1], "one builds, the other finds it done"
    assert results[0][1:] == results[1][1:]
    assert not list(tmp_path.rglob("*.tmp"))


class Recorder(L.LightningModule):
    """Learns nothing and writes down the windows that its rank sees."""

    def __init__(self, folder):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.folder, self.seen, self.val = folder, [], []

    def training_step(self, batch, index):
        self.seen.append([self.global_step, [hash(tuple(row)) for row in batch["input_ids"].tolist()]])
        return self.weight.sum()

    def validation_step(self, batch, index):
        self.val += [hash(tuple(row)) for row in batch["input_ids"].tolist()]

    def on_fit_end(self):
        (self.folder / f"{self.global_rank}.json").write_text(json.dumps({"seen": self.seen, "val": self.val}))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(data, folder, **options):
    """Return what each rank saw."""
    folder.mkdir()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    intervals = {"max_steps": 5, "val_check_interval": 4, "check_val_every_n_epoch": None}
    trainer = L.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **intervals, **options)
    trainer.fit(Recorder(folder), data)
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


def steps(results):
    """The windows of each optimizer step, over all ranks."""
    windows = {}
    for result in results:
        for step, rows in result["seen"]:
            windows.setdefault(step, []).extend(rows)
    return {step: sorted(rows) for step, rows in windows.items()}


def test_two_ranks_see_what_one_rank_accumulates(make_data, tmp_path):
    one = train(make_data(), tmp_path / "one", devices=1, accumulate_grad_batches=2)
    two = train(make_data(), tmp_path / "two", devices=2, strategy="ddp_fork")
    assert steps(one) == steps(two) and len(steps(one)) == 5 and len(two) == 2
    whole = set(one[0]["val"])
    shared = [window for result in two for window in result["val"]]
    assert len(shared) == len(whole) and set(shared) == whole, "every window once"
