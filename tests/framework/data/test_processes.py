"""What needs more than one real process: building at the same time, and several ranks."""

import json
import subprocess
import sys

BUILD = """
import sys, orthotrain.data.corpus.cache_folder as store
from orthotrain.data import TextData
build, builds = store.build_caches, []
store.build_caches = lambda *given: builds.append(1) or build(*given)
data = TextData(source=sys.argv[1], cache_dir=sys.argv[2], vocab_size=300, sequence_length=64, batch_size=4,
                val_fraction=0.15, test_fraction=0.15)
data.setup()
print(len(builds), data._cache("train").metadata.tokens, data.tokenizer_fingerprint)
"""

TRAIN = """
import json, sys, lightning as L, torch, torch.distributed as dist
from orthotrain.data import TextData

class Recorder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen, self.val = [], []
    def training_step(self, batch, index):
        self.seen.append([self.global_step, [hash(tuple(row)) for row in batch["input_ids"].tolist()]])
        return self.weight.sum()
    def validation_step(self, batch, index):
        self.val += [hash(tuple(row)) for row in batch["input_ids"].tolist()]
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

if __name__ == "__main__":
    devices, accumulate, streaming = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "stream"
    data = TextData(source=sys.argv[1], cache_dir=sys.argv[2], vocab_size=300, sequence_length=64, batch_size=4,
                    val_fraction=0.15, test_fraction=0.15, streaming=streaming)
    module = Recorder()
    trainer = L.Trainer(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=5,
                        accumulate_grad_batches=accumulate, logger=False, enable_checkpointing=False,
                        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
                        val_check_interval=4, check_val_every_n_epoch=None)
    trainer.fit(module, data)
    result = {"seen": module.seen, "val": module.val}
    if devices > 1:
        results = [None] * devices
        dist.all_gather_object(results, result)
    else:
        results = [result]
    if trainer.is_global_zero:
        print("RESULT" + json.dumps(results))
"""


def test_two_processes_that_start_at_once_build_one_cache(corpus, tmp_path):
    command = [sys.executable, "-c", BUILD, str(corpus), str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    lines = [stdout.split() for stdout, _ in outputs]
    assert sorted(line[0] for line in lines) == ["0", "1"], "one builds, the other finds it done"
    assert lines[0][1:] == lines[1][1:]
    assert not list(tmp_path.rglob("*.tmp"))


def train(script, corpus, cache, devices, accumulate, kind):
    command = [sys.executable, str(script), str(corpus), str(cache), str(devices), str(accumulate), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("RESULT")[1])


def steps(results):
    """The windows of each optimizer step, over all ranks."""
    windows = {}
    for result in results:
        for step, rows in result["seen"]:
            windows.setdefault(step, []).extend(rows)
    return {step: sorted(rows) for step, rows in windows.items()}


def test_two_ranks_see_what_one_rank_accumulates(corpus, session_cache, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    one = train(script, corpus, session_cache, 1, 2, "cache")
    two = train(script, corpus, session_cache, 2, 1, "cache")
    assert steps(one) == steps(two) and len(steps(one)) == 5
    whole = set(one[0]["val"])
    shared = [window for result in two for window in result["val"]]
    assert len(shared) == len(whole) and set(shared) == whole, "every window once"
