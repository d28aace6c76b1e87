"""The site builds without a warning, and holds every part."""

import re
import subprocess
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site():
    """What `make docs` writes; what it installs before is there."""
    command = ["make", "-o", ".venv/.installed-test", "docs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return ROOT / "build/docs"


def text_of(page):
    """Return what a reader sees."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8"))).split())


def test_every_section_of_the_readme_is_on_a_page(site):
    pages = " ".join(text_of(page) for page in site.glob("*.html"))
    for heading in re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE):
        assert heading in pages
    assert (site / "method.svg").exists() and 'src="method.svg"' in (site / "index.html").read_text()


def test_every_derivation_example_and_config_is_on_a_page(site):
    for readme in [*ROOT.glob("kernels/*/README.md"), *ROOT.glob("examples/*/README.md")]:
        title = readme.read_text().split("\n", 1)[0].removeprefix("# ").replace("`", "")
        assert title in text_of(site / readme.parent.parent.name / f"{readme.parent.name}.html")
    listed = text_of(site / "configs.html")
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert str(path.relative_to(ROOT / "configs")) in listed


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("orthotrain.layers.poet.poet_linear", ["PoetLinear", "activation_mode", "R_out^T W R_in^T"]),
        ("orthotrain.plugins.cayley_neumann", ["CayleyNeumann", "order"]),
        ("orthotrain.kernels.block_rotate.op", ["block_rotate", "Raises"]),
        ("orthotrain.callbacks.merge_rotations", ["MergeRotations", "every_n_steps"]),
    ],
)
def test_a_module_has_a_page_made_of_its_docstrings(site, page, words):
    text = text_of(site / "api" / f"{page}.html")
    assert all(word in text for word in words) and ":func:" not in text
