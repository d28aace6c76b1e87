"""The plugin of examples/parameterization_plugin, installed into an environment of its own, trains by its name."""

import csv
import json
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import yaml

PLUGIN = Path(__file__).parents[2] / "examples" / "parameterization_plugin"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """The interpreter of an environment that sees this one's packages, with the plugin installed from a copy."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, system_site_packages=True, symlinks=True)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    # this environment may itself be a virtual one, with editable installs: addsitedir reads their .pth files
    (site / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
    source = tmp_path_factory.mktemp("source") / "plugin"
    source.mkdir()
    (source / "pyproject.toml").write_bytes((PLUGIN / "pyproject.toml").read_bytes())
    (source / "orthotrain_givens").mkdir()
    for file in (PLUGIN / "orthotrain_givens").glob("*.py"):
        (source / "orthotrain_givens" / file.name).write_bytes(file.read_bytes())
    pip = [python, "-P", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", source], check=True, cwd=folder)
    assert (site / "orthotrain_givens" / "givens.py").is_file()
    return python


@pytest.fixture
def small(tmp_path):
    """A configuration laid over pretrain/poet_quickstart.yaml that makes it tiny."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.glob("[a-d]*.py")):
        (corpus / f"{path.stem}.txt").write_text(path.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    network = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {"config": {**network, "vocab_size": 320, "max_position_embeddings": 64}}
    data = {"source": str(corpus), "vocab_size": 320, "sequence_length": 32, "batch_size": 4}
    path = tmp_path / "small.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "trainer": {"accelerator": "cpu", "precision": "32-true", "log_every_n_steps": 1},
                "model": {"init_args": {"model": {"init_args": config}}},
                "data": {"init_args": {**data, "val_fraction": 0.2, "cache_dir": str(tmp_path / "cache")}},
            }
        )
    )
    return path


def test_it_trains_by_name_from_yaml(python, small, tmp_path):
    options = ["--names", "givens", "--steps", "24", "--out", tmp_path / "runs"]
    command = [python, PLUGIN / "compare.py", *options, "--base", "pretrain/poet_quickstart.yaml", small]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "givens"
    assert "parameterization: givens" in (run / "parameterization.yaml").read_text()
    losses = [loss for _, loss in json.loads((run / "summary.json").read_text())["curves"]["train_loss"]]
    assert losses[-1] < losses[0]
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert max(float(row["generator_norm"]) for row in rows if row["generator_norm"]) > 1e-3
    assert max(float(row["orthogonality_error"]) for row in rows if row["orthogonality_error"]) < 1e-6
    assert done.stdout.splitlines()[-1].startswith("givens ")


def test_its_own_tests_pass(python):
    """The grid of properties, without the largest blocks and without compiling, which take half a minute."""
    options = ["-p", "no:cacheprovider", "--import-mode=importlib", "-k", "not 128 and not 256 and not compiled"]
    command = [python, "-P", "-m", "pytest", "-c", "/dev/null", *options, PLUGIN / "tests"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 90


def test_outside_that_environment_the_name_is_unknown():
    check = "from orthotrain.plugins import create; create('givens')"
    done = subprocess.run([sys.executable, "-P", "-c", check], capture_output=True, text=True)
    assert "unknown parameterization 'givens'" in done.stderr
