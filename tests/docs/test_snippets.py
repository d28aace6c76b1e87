"""The commands and programs of README, manual, examples and docstrings run, with small networks in place of big ones.

A page is read from top to bottom, as a reader would: a command finds what the commands before it have left. Every page
has a copy of one folder, in which `make fit`, `make smollm2` and a first finetuning have been run.
"""

import doctest
import gzip
import importlib
import json
import re
import runpy
import shlex
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer

from orthotrain.cli.config_files import resolve_config_arguments
from orthotrain.cli.main import main
from orthotrain.cli.trainer_cli import OrthotrainCLI
from orthotrain.layers import OftConv2d
from orthotrain.modules import Optimization, PoetLayers
from orthotrain.plugins import create, registry

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs/pages"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")), *sorted(ROOT.glob("*/*/README.md"))]
SMOLLM2 = ROOT / "examples/finetune_smollm2/README.md"
READ_THROUGH = [page for page in PAGES if page == SMOLLM2 or page.parent in (ROOT, DOCS, DOCS / "reference")]
STARTS = ("orthotrain ", "make ", "torchrun ", "python", ".venv/bin/", "ORTHOTRAIN_", "bash ", ". ")
# what a line of a page does that is done elsewhere; the test that does it
ELSEWHERE = {
    "python3 -m venv": "the Makefile, in every fresh clone",
    ".venv/bin/pip install": "the Makefile, and tests/examples/test_parameterization_plugin.py",
    ".venv/bin/pip uninstall": "tests/examples/test_parameterization_plugin.py",
    ". .venv/bin/activate": "the shell",
    "bash tests/benchmarks/gpu.sh": "tests/benchmarks/test_gpu_script.py",
    "parameterization givens": "tests/examples/test_parameterization_plugin.py",
    "orthotrain consolidate": "tests/framework/distributed/test_distributed.py",
    "qoft_llama2_7b": "tests/test_house.py, with a small network",
    "finetune/classification.yaml": "tests/framework/modules/test_labeled.py",
    "orthotrain-givens": "tests/examples/test_parameterization_plugin.py",
}


def blocks(page):
    """Yield the blocks of a page in their order.

    Yields:
        ``("python", text)``, ``("yaml", text)`` or ``("shell", command, the line that is printed below it or None)``.
    """
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        if language in ("python", "yaml"):
            yield language, block
        elif language in ("bash", "console"):
            lines = [line.strip() for line in block.replace("\\\n", " ").splitlines()]
            for number, line in enumerate(lines):
                command = line.removeprefix("$ ")
                if command and not command.startswith("#") and (language == "bash" or line.startswith("$ ")):
                    assert command.startswith(STARTS), f"{page}: no test runs {command!r}"
                    after = lines[number + 1] if language == "console" else None
                    yield "shell", re.sub(r"\s+#.*$", "", command), after


def commands():
    """Yield page and command of all shell lines."""
    for page in PAGES:
        yield from ((page, block[1]) for block in blocks(page) if block[0] == "shell")


def excerpts():
    """Yield page and text of the Python of pages that are not read through."""
    for page in PAGES:
        if page.parts[-3] == "examples" and page not in READ_THROUGH:
            yield from ((page, block[1]) for block in blocks(page) if block[0] == "python")


def test_the_snippets_are_found():
    assert len(list(commands())) >= 70 and len(list(excerpts())) >= 3
    for key in ELSEWHERE:
        assert any(key in command for _, command in commands()), f"no page says {key!r} any more"


def test_excerpts_of_examples_run_among_their_programs(tmp_path, monkeypatch):
    """A page shows its program's extension point without the options around it."""
    monkeypatch.chdir(tmp_path)
    rows = DataLoader(TensorDataset(torch.rand(64, 1, 8, 8), torch.randint(0, 5, (64,))), batch_size=32)
    pages = {page.parent.name: excerpt for page, excerpt in excerpts()}
    assert set(pages) == {"conv_oft", "custom_network", "prior_fitted_network"}

    def after(example, program, **names):
        monkeypatch.syspath_prepend(str(ROOT / "examples" / example))
        names = {**runpy.run_path(str(ROOT / "examples" / example / program)), **names}
        exec(compile(pages[example].replace("max_steps=360", "max_steps=4"), f"{example}/README.md", "exec"), names)
        return names

    names = after("conv_oft", "adapt.py")
    module = names["Finetuning"](names["Network"](), Optimization(lr=1e-3))
    L.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False).fit(module, rows)
    assert sum(isinstance(layer, OftConv2d) for layer in module.model.body) == 2

    networks = runpy.run_path(str(ROOT / "examples/custom_network/networks.py"))
    names = after("custom_network", "train.py", network=networks["Perceptron"](), loader=rows)
    assert names["module"].trainer.global_step == 4

    names = after("prior_fitted_network", "train.py")
    batch = next(iter(names["CausalPrior"](4, 8, 4, seed=0)))
    module = names["PoetCausal"](
        names["CausalNetwork"](width=16, depth=1), PoetLayers(block_size=4, exclude=["head", "embed_*"]), 2
    )
    module.configure_model()
    assert module.loss(batch).isfinite()


def test_settings_that_pages_quote_are_those_of_the_example():
    (page,) = (page for page in PAGES if page.parent.name == "parameterization_plugin")
    text = page.read_text()
    (quoted,) = re.findall(r"^```toml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert quoted in (page.parent / "pyproject.toml").read_text()
    (quoted,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(quoted)["model"]["init_args"]["layers"] == {"parameterization": "givens"}


@pytest.mark.parametrize(
    "command", sorted({c for _, c in commands() if c.startswith(("make", "python", ".venv/bin/py"))})
)
def test_a_program_and_its_options_exist(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    if any(key in command for key in ELSEWHERE):
        return
    if words[0].endswith("pytest"):
        assert any((ROOT / word).is_dir() for word in words[1:])
        return
    source = (ROOT / next(word for word in words if word.endswith(".py"))).read_text()
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in source, f"{command}: no {option}"


def documented():
    """Return the modules whose docstrings hold an example."""
    rooms = {"framework": "orthotrain", "plugins": "orthotrain.plugins", "kernels": "orthotrain.kernels"}
    for room, package in rooms.items():
        for path in sorted((ROOT / room).rglob("*.py")):
            if re.search(r"^\s+>>> ", path.read_text(encoding="utf-8"), re.MULTILINE):
                parts = path.relative_to(ROOT / room).with_suffix("").parts
                yield ".".join([package, *(part for part in parts if part != "__init__")])


@pytest.mark.parametrize("name", documented())
def test_examples_in_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed


def write(name, config):
    Path("trainer").mkdir(exist_ok=True)  # a config in a folder of that name is left out of the name of the run folder
    Path(f"trainer/small_{name}.yaml").write_text(yaml.safe_dump(config))


def small_configs(corpus, cache):
    """Write the configs that are laid over those of the pages: small networks, few steps, data of this machine."""
    short = {"accelerator": "cpu", "precision": "32-true", "max_steps": 2, "val_check_interval": 2}
    short |= {"limit_val_batches": 1, "num_sanity_val_steps": 0, "accumulate_grad_batches": 1}
    short |= {"enable_progress_bar": False}
    small_network = {"num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 320, "max_position_embeddings": 64}
    data = {"source": str(corpus), "vocab_size": 320, "sequence_length": 32, "batch_size": 4, "val_fraction": 0.2}
    data |= {"cache_dir": str(cache), "tokenizer": None, "streaming": False}
    # the blocks of the quickstart and of the papers are 256 wide
    for kind, width in (("pretrain", 64), ("wide", 256)):
        sizes = {"_replace_": True, **small_network, "hidden_size": width, "intermediate_size": width}
        network = {"init_args": {"config": sizes}}
        write(kind, {"trainer": short, "model": {"init_args": {"model": network}}, "data": {"init_args": data}})
    rows_of = {"source": "rows.jsonl", "max_length": 64, "val_fraction": 0.2, "generation_samples": 2}
    write("finetune", {"trainer": short, "model": {"init_args": {"max_new_tokens": 4}}, "data": {"init_args": rows_of}})


@pytest.fixture(scope="module")
def library(tmp_path_factory, corpus):
    """A folder with what a reader of any page has: data, the run of ``make fit``, and a finetuned pretrained model."""
    folder = tmp_path_factory.mktemp("library")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("corpus").mkdir()
        with gzip.open("corpus/a.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": path.read_text()}) + "\n" for path in sorted(corpus.iterdir()))
        rows = [{"prompt": f"repeat {i}", "response": f"{i} {i}"} for i in range(60)]
        Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        small_configs(corpus, folder.parent / "cache")
        main(shrunk(["fit", "-c", "pretrain/quickstart.yaml"]))
        model = "models/smollm2-135m-instruct"
        main(["export", "--ckpt", "runs/quickstart/checkpoints/last.ckpt", "--out", model])
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
        tokenizer.save_pretrained(model)
        main(shrunk(["fit", "-c", "finetune/oft_smollm2.yaml"]))
    return folder


@pytest.fixture
def folder(tmp_path, library, monkeypatch):
    """A copy of the library for one page."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    copy = tmp_path / "page"
    shutil.copytree(library, copy)
    monkeypatch.chdir(copy)
    return copy


def shrunk(words):
    """Return the arguments of a run with a small network and few steps laid over its configs."""
    words = words.copy()
    for place, word in enumerate(words):
        if word in ("--trainer.max_steps", "--trainer.val_check_interval"):
            words[place + 1] = str(max(1, int(words[place + 1]) // 20))
    last = max(place for place, word in enumerate(words) if word == "-c") + 2
    name = words[words.index("-c") + 1]
    wide = name.startswith("pretrain/") and "_quickstart" not in name
    kind = "finetune" if name.startswith("finetune/") else "wide" if wide else "pretrain"
    return [*words[:last], "-c", f"trainer/small_{kind}.yaml", *words[last:]]


def ends(words, capsys):
    """Run a command that exits, and return its code and what it printed."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    printed = capsys.readouterr()
    return ended.value.code or 0, printed.out + printed.err


def run(command, after, capsys):
    """Run a command of a page."""
    command = command.replace("-c CONFIG", "-c pretrain/quickstart.yaml")
    if any(key in command for key in ELSEWHERE) or not command.startswith(("orthotrain", "torchrun", "make finetune")):
        return
    words = shlex.split(command.replace("make finetune", "orthotrain fit -c finetune/quickstart.yaml"))
    words = words[words.index("orthotrain") + 1 :]
    if words[0] == "plan":
        main([*words, "--model.model.config.num_hidden_layers", "1"])
        assert "GiB" in capsys.readouterr().out
    elif after is not None:
        code, printed = ends(words, capsys)
        assert code == 2 and after in printed
    elif any(word.endswith("help") or word == "--print_config" for word in words):
        code, printed = ends(words, capsys)
        assert code == 0 and len(printed) > 200
    elif any("trainer/" in word for word in words):
        # with real processes: tests/framework/distributed
        words = words[1 : words.index("--ckpt_path")] if "--ckpt_path" in words else words[1:]
        one = ["--trainer.devices", "1", "--trainer.num_nodes", "1"]
        OrthotrainCLI([*resolve_config_arguments(shrunk(words)), *one], run=False)
    else:
        main(shrunk(words) if "-c" in words else words)


@pytest.mark.parametrize("page", READ_THROUGH, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_a_page_is_read_through(page, folder, capsys):
    done = []
    for kind, text, *after in blocks(page):
        try:
            if kind == "shell":
                if text not in SAME_EVERYWHERE:
                    run(text, after[0], capsys)
                if text.startswith(("orthotrain plan", "orthotrain plugins")) or "help" in text:
                    SAME_EVERYWHERE.add(text)
            elif kind == "yaml":
                assert yaml.safe_load(text)
                if name := re.match(r"# (\w+\.yaml)\n", text):
                    Path(name[1]).write_text(text)
            else:
                namespace = {"__name__": "page"}
                exec(compile(text, str(page), "exec"), namespace)
                check(namespace)
        except BaseException as error:
            error.add_note(f"in {page.relative_to(ROOT)}: {text}\nafter {done}")
            raise
        done.append(text)


SAME_EVERYWHERE: set[str] = set()
"""Commands of other pages that have been run, leave no files, and read nothing of the page's folder."""


def check(namespace):
    """Look closer at what a program of a page has made."""
    if "Classifier" in namespace:
        namespace["module"].configure_model()
        assert namespace["module"].wrapped_names == ["0"]
    if "SecondOrder" in namespace:
        displacement = create("second_order").displacement(torch.full((1, 1), 0.1), 2)[0]  # ||Q|| = 0.1
        error = displacement + displacement.T + displacement.T @ displacement
        assert error.abs().max().item() == pytest.approx(4e-4, rel=1e-3)
