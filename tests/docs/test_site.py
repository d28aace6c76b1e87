"""The site builds without a warning, and holds every part."""

import re
import subprocess
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs/pages"


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


def test_every_page_of_the_manual_is_in_the_site(site):
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS).with_suffix(".html")).exists()


def test_every_derivation_example_and_config_is_on_a_page(site):
    for folder, room in (("design", "kernels"), ("examples", "examples")):
        listed = text_of(site / folder / "index.html")
        for readme in ROOT.glob(f"{room}/*/README.md"):
            title = readme.read_text().split("\n", 1)[0].removeprefix("# ").replace("`", "")
            assert title in text_of(site / folder / f"{readme.parent.name}.html")
            assert readme.parent.name in listed
    listed = text_of(site / "configs.html")
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert str(path.relative_to(ROOT / "configs")) in listed


def test_the_site_needs_no_network(site):
    """Formulas, fonts and search come from the site itself."""
    for page in site.rglob("*.html"):
        for source in re.findall(r"<(?:script|link|img)[^>]*?(?:src|href)=\"?([^\" >]+)", page.read_text()):
            assert not re.match(r"(?:https?:)?//", source), f"{page.name}: {source}"
    assert "arithmatex" in (site / "index.html").read_text()
    assert (site / "assets/katex/katex.min.js").exists()


def test_every_formula_is_marked_for_katex(site):
    """A dollar that stays in the text of a page is a formula that Markdown has not seen."""
    for page in site.rglob("*.html"):
        html = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        text = unescape(re.sub(r"<[^>]+>", " ", html))
        assert not re.search(r"\$[^\s$][^$\n]*\$", text), page.name


def test_the_readme_is_short_and_its_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.encode()) <= 10_000
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"):
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_environment_variable_is_on_its_page():
    """Those of the package and of its tests."""
    page = (DOCS / "configuration.md").read_text(encoding="utf-8")
    files = [path for room in ("framework", "kernels", "plugins", "tests") for path in (ROOT / room).rglob("*")]
    used = {name for path in files if path.suffix in (".py", ".sh") and path.is_file()
            for name in re.findall(r"ORTHOTRAIN_[A-Z_]+\b", path.read_text(encoding="utf-8"))}  # fmt: skip
    assert used - {"ORTHOTRAIN_"} == set(re.findall(r"`(ORTHOTRAIN_[A-Z_]+)`", page))


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("orthotrain.layers.poet.poet_linear", ["PoetLinear", "settings", "R_out^T W R_in^T"]),
        ("orthotrain.plugins.cayley_neumann", ["CayleyNeumann", "order"]),
        ("orthotrain.kernels.block_rotate.op", ["block_rotate", "Raises"]),
        ("orthotrain.callbacks.merge_rotations", ["MergeRotations", "every_n_steps"]),
    ],
)
def test_a_module_has_a_page_made_of_its_docstrings(site, page, words):
    text = text_of(site / "reference" / f"{page}.html")
    assert all(word in text for word in words) and ":func:" not in text
