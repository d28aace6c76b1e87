"""The house: import directions, what the wheel holds, and that every shipped config builds."""

import ast
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from transformers import BartConfig, BartForConditionalGeneration

from orthotrain.cli.trainer_cli import OrthotrainCLI, PlanCLI

ROOT = Path(__file__).parent.parent
FOLDERS = ("plugins", "kernels")
"""Rooms beside framework."""

# room -> what of orthotrain it may import beside itself. The rooms stand from the lowest to the highest: a row names
# only rooms of the rows before it. A room is a folder of framework, a module of framework, kernels, or plugins.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "seeding": set(),
    "metrics": set(),
    "schedules": {"errors"},
    "console": {"errors"},
    "files": {"console", "errors"},
    "devices": {"errors"},
    "kernels": set(),
    "plugins": {"kernels"},
    "layers": {"console", "devices", "errors", "kernels", "plugins", "seeding"},
    "optimizers": {"errors", "kernels.skew", "layers.rotation.generator_marks"},
    "models": {"console", "devices", "errors", "files"},
    "data": {"console", "devices", "errors", "files", "models.folder"},
    "checkpoints": {"console", "errors", "files", "models", "plugins"},
    "distributed": {"checkpoints", "console", "devices", "errors", "files", "layers.sharding"},
    "callbacks": {
        *("checkpoints", "console", "devices", "distributed.agreement", "errors", "files", "seeding"),
        *("kernels.dispatch", "models.network_checks"),
        # layers by their protocols alone
        *(f"layers.{part}" for part in ("finite_checks", "folding", "protocols", "sharding", "spectrum")),
    },
    "modules": {
        *("callbacks", "checkpoints", "console", "devices", "distributed", "errors", "files", "layers", "metrics"),
        *("models", "optimizers", "plugins", "seeding"),
    },
    "adapters": {"checkpoints", "console", "errors", "files", "kernels.skew", "layers", "models.folder", "plugins"},
    "export": {"adapters", "checkpoints", "console", "data", "errors", "layers", "models", "modules"},
    "cli": {
        *("callbacks", "checkpoints", "configs", "console", "data", "devices", "distributed", "errors", "export"),
        *("files", "kernels", "layers", "models", "modules", "optimizers", "plugins", "schedules"),
    },
}
FLAT_MODULES = {"framework": 5, "kernels": 6}
"""Modules that a folder may hold beside its rooms, without ``__init__.py``."""


def imports_of(path):
    """Yield the orthotrain modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name.removeprefix("orthotrain.") for name in names if name.startswith("orthotrain."))


def test_every_room_has_a_row():
    found = {
        path.stem for path in (ROOT / "framework").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} | {"kernels", "plugins"} == set(MAY_IMPORT)
    for folder, most in FLAT_MODULES.items():
        assert len(list((ROOT / folder).glob("*.py"))) <= most + 1, folder


def test_tests_mirror_the_source():
    for folder in [path for path in (ROOT / "tests" / "framework").rglob("*") if list(path.glob("test_*.py"))]:
        assert (ROOT / folder.relative_to(ROOT / "tests")).is_dir(), f"no source beside {folder.relative_to(ROOT)}"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_run_one_way(room):
    base = ROOT / room if room in FOLDERS else ROOT / "framework" / room
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    lower = [*MAY_IMPORT][: [*MAY_IMPORT].index(room)]
    assert files and {name.split(".")[0] for name in MAY_IMPORT[room]} <= {*lower, "configs"}
    for path in files:
        for name in imports_of(path):
            allowed = any(name == other or name.startswith(f"{other}.") for other in (room, *MAY_IMPORT[room]))
            assert allowed, f"{path.relative_to(ROOT)} imports orthotrain.{name}"


def test_the_oldest_versions_are_those_that_pyproject_allows():
    """Packages without a line are of any version that these take."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = [Requirement(text) for text in (*project["dependencies"], *extras["baselines"], *extras["test"])]
    least = {r.name: Version(str(r.specifier).removeprefix(">=")) for r in required if str(r.specifier)}
    lines = (ROOT / "tests" / "constraints-oldest.txt").read_text().splitlines()
    oldest = [Requirement(line) for line in lines if not line.startswith("#")]
    for requirement in oldest:
        assert Version(str(requirement.specifier).removeprefix("==")) == least[requirement.name], requirement.name
    assert {Requirement(text).name for text in project["dependencies"]} <= {r.name for r in oldest}


def test_the_wheel_holds_one_package_with_all_sources_and_configs(tmp_path):
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)  # setuptools packs what an earlier build has left there
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = {"framework": "", "plugins": "plugins/", "kernels": "kernels/", "configs": "configs/"}
    kinds = {".py", ".yaml", ".json", ".typed"}
    expected = {
        f"orthotrain/{prefix}{path.relative_to(ROOT / folder)}"
        for folder, prefix in sources.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in kinds or path.name == "py.typed"
    }
    assert names == expected


CONFIGS = sorted([*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "examples").rglob("*.yaml")])
RUNS = [path for path in CONFIGS if path.parent.name not in ("trainer", "options", "logger")]
OPTIONS = [path for path in CONFIGS if path.parent.name == "options"]


def test_the_number_of_configs_is_known():
    """A config that is added is added here too, so that none escapes the test below."""
    assert len(CONFIGS) == 43


def small_network(path, folder):
    """Options that put a small network in the place of a config's pretrained one: a Llama, or a BART from a folder."""
    if path.parent.name != "finetune":
        return []
    if yaml.safe_load(path.read_text())["data"]["init_args"].get("layout") != "seq2seq":
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 1}
        return ["--model.model", "CausalLM", "--model.model.config", json.dumps(shape)]
    sizes = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 1), ("ffn_dim", 128))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    BartForConditionalGeneration(BartConfig(d_model=64, vocab_size=64, **sizes, **heads)).save_pretrained(folder)
    return ["--model.model.name", str(folder)]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_config_builds_its_network(path, tmp_path):
    """Builds trainer, module and data, and the wrapped network on fake tensors; pretrained ones as small networks."""
    overrides = small_network(path, tmp_path / "pretrained")
    command = ["-c", str(path), *overrides, "--data.batch_size", "1"]
    cli = OrthotrainCLI([*command, "--trainer.accelerator", "cpu", "--trainer.devices", "1"], run=False)
    assert cli.trainer.max_steps > 0 or cli.trainer.max_epochs > 0
    assert PlanCLI(command, run=False).plan.total_bytes > 0
    document = yaml.safe_load(path.read_text())
    assert path.read_text().startswith("# "), "say in a first line what the run is"
    assert {"trainer", "model", "data"} <= set(document)


def plan_of(*paths):
    command = [part for path in paths for part in ("-c", str(path))]
    cli = PlanCLI([*command, "--data.batch_size", "1"], run=False)
    return cli.plan, cli.config["data"]["init_args"]["source"]


@pytest.mark.parametrize("path", OPTIONS, ids=lambda path: path.stem)
def test_every_option_lays_over_a_pretraining_config(path):
    name = "adamw_quickstart" if path.stem in ("muon", "galore") else "paper/poet_llama_60m"
    base = ROOT / f"configs/pretrain/{name}.yaml"
    (before, _), (after, source) = plan_of(base), plan_of(base, path)
    match path.stem:
        case "int8" | "nf4":
            assert after["frozen"].bytes < before["frozen"].bytes / 3
        case "fs":
            attention, mlp = 4 * 256 * 255, 3 * (256 * 255 // 2 + 640 * 639 // 2)
            assert after["trainable, rotations"].count == 8 * (attention + mlp)
        case "muon":
            # one moment in place of two, for the matrices of the decoder
            hidden = 4 * (4 * 256 * 256 + 3 * 256 * 640)
            assert before["optimizer state"].bytes - after["optimizer state"].bytes == 4 * hidden
        case "galore":
            assert after["optimizer state"].bytes < before["optimizer state"].bytes
        case "c4" | "stdlib":
            assert source == {"c4": "allenai/c4:en", "stdlib": "python-stdlib"}[path.stem]
        case _:
            raise AssertionError(f"say here what {path.stem} does")
    assert path.read_text().startswith("# "), "say in a first line what the option is"
