"""The comparison of runs: figures, curves, and a warning for each difference that makes the losses not comparable."""

import copy
import hashlib
import json

import pytest
import yaml

from orthotrain.cli.compare import Run, warnings_of
from orthotrain.cli.main import main
from orthotrain.errors import ConfigurationError

SUMMARY = {
    "steps": 40,
    "tokens": 4000,
    "after": {"val_loss": 2.5, "val_bits_per_byte": 1.25},
    "tokens_per_second": 1234.5,
    "wall_seconds": 61.0,
    "peak_memory_bytes": 1 << 30,
    "trainable_parameters": 1000,
    "total_parameters": 20000,
    "curves": {"train_loss": [[n, 3.0 - n / 100] for n in range(40)], "val_loss": [[19, 2.75], [39, 2.5]]},
}
CONFIG = {
    "seed_everything": 0,
    "trainer": {"limit_val_batches": None, "precision": "32-true", "max_steps": 40},
    "data": {"class_path": "TextData", "init_args": {"source": "a.txt", "batch_size": 4, "vocab_size": 320}},
}


@pytest.fixture
def run(tmp_path):
    """Write the folder of a run with other values; return its path."""

    def write(name, summary=None, **changes):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps({**SUMMARY, **(summary or {})}))
        config = copy.deepcopy(CONFIG)
        for path, value in changes.items():
            *outer, last = path.split("__")
            inner = config
            for key in outer:
                inner = inner[key]
            inner[last] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return str(folder)

    return write


def warned(*folders):
    return warnings_of([Run.read(folder) for folder in folders])


def test_two_comparable_runs(run, tmp_path, capsys):
    one = run("one", trainer__max_steps=80, data__init_args__num_workers=2)
    two = run("two", {"after": {"val_loss": 2.25}, "tokens": 4010, "peak_memory_bytes": None})
    out = tmp_path / "both.png"
    main(["compare", one, f"{two}/", "--out", str(out)])
    printed = capsys.readouterr().out
    lines = {line[:24].strip(): line[24:].split() for line in printed.splitlines()}
    assert lines["validation loss"] == ["2.5000", "2.2500"] and lines["validation bits per byte"] == ["1.2500", "-"]
    assert lines["tokens trained"] == ["4,000", "4,010"] and lines["peak memory, GiB"] == ["1.00", "-"]
    assert lines[""] == [one, two] and "warning" not in printed and f"wrote {out}" in printed
    assert out.read_bytes().startswith(b"\x89PNG")


def test_what_is_not_comparable_is_said(run, tmp_path):
    base = run("base")
    assert warned(base, run("tokens", {"tokens": 8000})) == [
        f"the runs were trained on different numbers of tokens: {base} 4000, {tmp_path / 'tokens'} 8000"
    ]
    assert "a run has no count of tokens" in warned(base, run("none", {"tokens": None}))[0]
    (line,) = warned(base, run("data", data__init_args__source="b.txt"))
    assert line == f"the runs differ in data.source: {base} a.txt, {tmp_path / 'data'} b.txt"
    assert not warned(base, run("batch", data__init_args__batch_size=8))
    limited = run("limited", trainer__limit_val_batches=16)
    assert [line.split(":")[0] for line in warned(base, limited)] == [
        "the runs differ in limit_val_batches",
        "the runs differ in data.batch_size",
    ]
    other = run("other", trainer__limit_val_batches=16, data__init_args__batch_size=8)
    assert [line.split(":")[0] for line in warned(limited, other)] == ["the runs differ in data.batch_size"]
    (tmp_path / "other" / "config.yaml").unlink()
    assert "cannot be compared" in warned(base, str(tmp_path / "other"))[-1]


def test_data_that_differ_under_one_name_and_a_config_of_another_run_are_said(run, tmp_path):
    one, two = (run(name, {"data_digests": {"train": "a", "val": name}}) for name in "ab")
    old = run("old")
    assert warned(one, two) == [f"the runs differ in the content of the val data: {one} a, {two} b"]
    assert not warned(one, old), "a summary without digests"
    digest = hashlib.sha256((tmp_path / "old" / "config.yaml").read_bytes()).hexdigest()
    assert not warned(old, run("same", {"config_sha256": digest}))
    for name, sha in (("changed", digest), ("python", None)):
        changed = run(name, {"config_sha256": sha}, data__init_args__source="b.txt")
        assert warned(old, changed)[-1].startswith(f"no config.yaml, or another than that of the summary, in {changed}")


def test_folders_without_a_summary_are_refused(run, tmp_path):
    with pytest.raises(ConfigurationError, match="has no summary.json: give the folder of a run"):
        Run.read(str(tmp_path))
    for wrong in ({"curves": {"val_loss": [3]}}, {"after": "x"}, {"steps": -1}):
        with pytest.raises(ConfigurationError):
            Run.read(run(next(iter(wrong)), wrong))
    (tmp_path / "summary.json").write_text("[]")
    with pytest.raises(ConfigurationError, match="is no summary of a run"):
        Run.read(str(tmp_path))
