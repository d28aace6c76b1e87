"""The figures of README, manual and examples are those of the committed results."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import yaml

from orthotrain.data import TextData

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("figures", ROOT / "tests/benchmarks/figures.py")
figures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(figures)
tables, training = sys.modules["tables"], sys.modules["training_tables"]


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_the_committed_results(page):
    """After new results: figures.py --write. A number that is no result belongs into figures.yaml."""
    assert figures.faults(page) == []


def test_every_table_is_on_a_page():
    named = [name for page in figures.PAGES for name in re.findall("<!-- table: (.+?) -->", page.read_text())]
    assert sorted(named) == sorted([*figures.TABLES, "lightning"])  # a test of the modules makes that one


def test_the_registry_names_what_pages_say():
    pages = {str(page.relative_to(ROOT)): page.read_text() for page in figures.PAGES}
    for name, constants in figures.REGISTRY["constants"].items():
        texts = " ".join(pages.values() if name == "everywhere" else [pages[name]]).split()
        stale = [number for number in constants if number not in " ".join(texts)]
        assert not stale, f"{name} does not have {stale} any more"
    assert set(figures.REGISTRY["sentences"]) <= set(pages)


def test_the_quickstart_shows_the_committed_results_of_other_methods():
    run = yaml.safe_load((ROOT / "configs/pretrain/quickstart.yaml").read_text())
    best = training.chosen(tables.results("quickstart"))
    others = {method: round(row["val_bits_per_byte"], 3) for method, row in best.items() if method != "step-wise"}
    data = run["data"]["init_args"]
    tokens = run["trainer"]["max_steps"] * data["batch_size"] * TextData(**data).sequence_length
    found = {"tokens": tokens, "source": data["source"], "bits_per_byte": others}
    assert run["report"]["references"] == found, "report.references of configs/pretrain/quickstart.yaml"
    for row in best.values():
        config = yaml.safe_load((ROOT / "configs" / row["arguments"][1]).read_text())
        given = config["model"]["init_args"]["optimization"]
        shipped = {"rotation": given.get("rotation_lr"), "rest": given["lr"], "hidden": None}
        shipped["hidden"] = given.get("lr_overrides", {}).get("*layers*proj*")
        assert row["rates"] == {name: shipped[name] for name in row["rates"]}, "a shipped config has the best rates"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It ends at 1.649 after 400 steps.", ["1.649"]),
        (
            "It is 1.3 times as fast and takes 40% less, 9 MB, or\nseven minutes.",
            ["1.3 times as", "40%", "9 MB", "seven minutes"],
        ),
        (
            "A drift of 2.0e-06, 4,770 tokens and 9.7M parameters, 0.1 ± 0.02",
            ["2.0e-06", "4,770", "9.7M", "0.1", "0.02"],
        ),
        ("```text\nloss 3.2\n```\n", ["3.2"]),
        ("Python 3.11", ["3.11"]),
        ("`lr: 4.0e-3`, $x^{2.5}$, [a page](a_1.5.md), arXiv:2506.08001, 0.1.0, 8 x 256 tokens, 78 batches", []),
        ("```bash\nfit --lr 0.5\n```\n<!-- table: best -->\n|0.5|\n<!-- end of table -->\n", []),
    ],
)
def test_what_looks_measured_is_found(text, found):
    assert figures.unexplained("no page", text) == found


def test_sentences_get_the_figures_of_the_results(monkeypatch):
    sentence = "ends at {run[AdamW][loss]:.3f} after {run[steps]} steps,"
    monkeypatch.setitem(figures.REGISTRY["sentences"], "page", [sentence])
    results = {"run": {"AdamW": {"loss": 1.6491}, "steps": 400}}
    page = "The run of 9.9 ends\nat 1.7 after\n30 steps, and 2.5 later."
    written = figures.with_figures(page, sentence, results)
    assert written == "The run of 9.9 ends\nat 1.649 after\n400 steps, and 2.5 later."
    assert figures.unexplained("page", written) == ["9.9", "2.5"]
    with pytest.raises(LookupError, match="0 times"):
        figures.with_figures("The run ends at 1.7.", sentence, results)


def test_a_kept_run_is_a_table(monkeypatch, tmp_path):
    """What the command keeps of a summary is enough for the tables; a table without results says so."""
    for module in (tables, sys.modules["table_parts"]):
        monkeypatch.setattr(module, "HERE", tmp_path)
    assert figures.built("make fit") == figures.built("make finetune") == figures.built("conv_oft") == figures.PENDING
    metrics = {"val_loss": 2.5, "val_token_accuracy": 0.25, "val_rouge_l": 0.125}
    summary = dict.fromkeys(("memory", "next_token_loss", "kernels", "references", "merges", "early_folds"))
    summary |= {"steps": 400, "before": metrics, "after": metrics, "data": {}, "tokens": 9, "tokens_per_second": 4770.4}
    summary |= {
        "wall_seconds": 90.0,
        "trainable_parameters": 1,
        "total_parameters": 2,
        "checkpoint": None,
        "curves": {},
    }
    summary |= {"spectrum_drift": 1.9e-6, "spectrum_layers": ["a", "b"], "mergeable_layers": 2}
    (tmp_path / "results").mkdir()
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    keep = runpy.run_path(str(ROOT / "tests/benchmarks/keep_run.py"))["main"]
    monkeypatch.setitem(keep.__globals__, "RUNS", tmp_path / "results/runs.json")
    for name in ("make fit", "make finetune"):
        monkeypatch.setattr(sys, "argv", ["keep_run.py", name, str(tmp_path)])
        keep()
    text = figures.built("make fit")
    assert "tokens per second         4,770\n" in text and "1.9e-06 of the largest singular value (all 2 " in text
    assert text.splitlines()[-1].startswith("Measured on ")
    rows = ["| before | 2.500 | 0.250 | 0.125 |", "| 400 steps | 2.500 | 0.250 | 0.125 |"]
    assert figures.built("make finetune").splitlines()[2:] == rows
    given = {"lr": 2e-3, "trained": 460000, "val_token_accuracy": 0.5}
    runs = [("OFT", 40, 9.0), ("OFT", 100, 2.0), ("OFT", 100, 3.0), ("LoRA", 100, 4.0)]
    found = [{"method": method, "steps": steps, "val_loss": loss, **given} for method, steps, loss in runs]
    (tmp_path / "results/finetuning.json").write_text(json.dumps({"results": found}))
    oft, lora = figures.built("finetuning").splitlines()[2:]
    assert oft == "| OFT | 0.002 | 0.46M | 2 | 2.5000 ± 0.7071 | 0.5000 ± 0.0000 |"
    assert lora == "| LoRA | 0.002 | 0.46M | 1 | 4.0000 | 0.5000 |"
