"""The pages of the site, made while it is built: nothing is written twice."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"framework": "orthotrain", "plugins": "orthotrain.plugins", "kernels": "orthotrain.kernels"}

# path -> title and sections of the README; a section that no page names makes the build fail
GUIDE = {
    "index.md": ("orthotrain", ["Two commands", "Commands", "What is where"]),
    "install.md": ("Install", ["Install"]),
    "pretrain.md": ("Pretrain", ["Pretrain on your data", "POET, its variants and its baselines"]),
    "finetune.md": ("Finetune", ["Finetune"]),
    "devices.md": ("GPUs, hosts and faults", ["Several GPUs and hosts", "When a run dies"]),
    "extend.md": ("Extend", ["In Python", "Extend it"]),
    "measured.md": ("What is measured", ["What is measured", "Limits"]),
}


def readme_sections() -> dict[str, str]:
    """Return the README's text by heading; what comes before the first one is under the empty string."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("tests/docs/static/", "")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def guide() -> Iterator[tuple[str, str]]:
    """Yield path and text of the pages made of the README.

    Raises:
        ValueError: If a section is on no page, or a page asks for one that is not there.
    """
    sections = readme_sections()
    placed = [name for _, names in GUIDE.values() for name in names]
    if set(placed) != set(sections) - {""}:
        raise ValueError(f"sections of the README and of GUIDE differ: {sorted(set(placed) ^ (set(sections) - {''}))}")
    for path, (title, names) in GUIDE.items():
        head = sections[""] if path == "index.md" else f"# {title}\n"
        yield path, head + "".join(f"\n## {name}\n{sections[name]}" for name in names)


def readmes(room: str) -> Iterator[tuple[str, str]]:
    """Yield path and text of the pages of a room's READMEs, in the order of their names."""
    for path in sorted((ROOT / room).glob("*/README.md")):
        yield f"{room}/{path.parent.name}.md", path.read_text(encoding="utf-8")


def configs() -> str:
    """Return a page that lists every shipped config under its folder with its first line."""
    rows = ["# Configs", "`orthotrain fit -c NAME` finds these by name; `--print_config` prints what they come to."]
    for folder in sorted({path.parent for path in (ROOT / "configs").rglob("*.yaml")}):
        rows += [f"\n## {folder.relative_to(ROOT / 'configs')}\n", "| config | |", "|-|-|"]
        for path in sorted(folder.glob("*.yaml")):
            first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
            rows.append(f"| `{path.relative_to(ROOT / 'configs')}` | {first} |")
    return "\n".join(rows) + "\n"


def modules() -> Iterator[str]:
    """Yield the names of all public modules and packages."""
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = list(path.relative_to(ROOT / folder).with_suffix("").parts)
            if not any(part.startswith("_") and part != "__init__" for part in parts):
                yield ".".join([package, *(part for part in parts if part != "__init__")])


def reference(name: str) -> str:
    """Return the page of one module: mkdocstrings fills it with its docstrings."""
    return f"# {name}\n\n::: {name}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and the navigation; mkdocs calls this when it has listed ``docs_dir``."""

    def add(path: str, text: str) -> str:
        files.append(File.generated(config, path, content=text))
        return path

    def titled(path: str, text: str) -> dict[str, str]:
        return {text.split("\n", 1)[0].removeprefix("# "): add(path, text)}

    pages: list[Any] = [{GUIDE[path][0]: add(path, text)} for path, text in guide()]
    pages.append({"Configs": add("configs.md", configs())})
    pages.append({"Examples": [titled(path, text) for path, text in readmes("examples")]})
    pages.append({"Derivations": [titled(path, text) for path, text in readmes("kernels")]})
    by_package: dict[str, list[Any]] = {}
    for name in modules():
        page = add(f"api/{name}.md", reference(name))
        by_package.setdefault(".".join(name.split(".")[:2]), []).append({name: page})
    single = [page for pages_of in by_package.values() if len(pages_of) == 1 for page in pages_of]
    packages = [{package: found} for package, found in by_package.items() if len(found) > 1]
    pages.append({"Reference": [*packages, *single]})
    config.nav = pages
    logging.getLogger("mkdocs.hooks").info("%d pages of modules", sum(map(len, by_package.values())))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Drop the roles of cross references, which Markdown does not know, and keep the names."""
    return re.sub(r":(?:func|class|meth|attr|mod):(?=<code>)", "", html)
