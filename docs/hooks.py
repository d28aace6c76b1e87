"""Adds to the site what is written elsewhere: derivations, examples, the list of configs, the reference of docstrings.

mkdocs calls the functions whose names begin with ``on_``. The other pages of the site lie in ``docs/pages``.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"framework": "orthotrain", "plugins": "orthotrain.plugins", "kernels": "orthotrain.kernels"}

GUIDE = {
    "Start": "index.md",
    "Pretraining": "pretraining.md",
    "Finetuning": "finetuning.md",
    "Devices and hosts": "devices.md",
    "Configuration": "configuration.md",
    "Extending": "extending.md",
    "Lightning": "lightning.md",
    "Export": "export.md",
    "Model types": "models.md",
    "Results": "results.md",
    "Faults": "faults.md",
}
"""Title in the navigation -> page of ``docs/pages``, in the order of the navigation."""


def readmes(room: str) -> list[Path]:
    """Return the READMEs of the folders of a room, in the order of their names."""
    return sorted((ROOT / room).glob("*/README.md"))


def title(text: str) -> str:
    """Return the first line of a page without the mark of a heading."""
    return text.split("\n", 1)[0].removeprefix("# ")


def configs() -> str:
    """Return a page that lists every shipped config under its folder with its first line."""
    rows = ["# Configs", "`orthotrain fit -c NAME` finds these configs by name. `--print_config` prints the whole run."]
    for folder in sorted({path.parent for path in (ROOT / "configs").rglob("*.yaml")}):
        rows += [f"\n## {folder.relative_to(ROOT / 'configs')}\n", "| config | what it is |", "|-|-|"]
        for path in sorted(folder.glob("*.yaml")):
            first = title(path.read_text(encoding="utf-8"))
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
    """Return the page of one module, which mkdocstrings fills with the docstrings."""
    return f"# {name}\n\n::: {name}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages and the navigation. mkdocs calls this function when ``docs_dir`` has been listed."""

    def add(path: str, text: str) -> str:
        files.append(File.generated(config, path, content=text))
        return path

    def section(room: str, folder: str, first: str) -> list[Any]:
        pages: list[Any] = [first]
        for path in readmes(room):
            text = path.read_text(encoding="utf-8")
            pages.append({title(text): add(f"{folder}/{path.parent.name}.md", text)})
        return pages

    nav: list[Any] = [{name: page} for name, page in GUIDE.items()]
    nav.append({"Configs": add("configs.md", configs())})
    nav.append({"Design": section("kernels", "design", "design/index.md")})
    nav.append({"Examples": section("examples", "examples", "examples/index.md")})
    rooms: dict[str, list[Any]] = {}
    for name in modules():
        page = add(f"reference/{name}.md", reference(name))
        room, label = ".".join(name.split(".")[:2]), ".".join(name.split(".")[2:])
        rooms.setdefault(room, []).append({label or room: page})
    flat = [page for pages in rooms.values() if len(pages) == 1 for page in pages]
    folders = [{room.removeprefix("orthotrain."): pages} for room, pages in rooms.items() if len(pages) > 1]
    nav.append({"Reference": ["reference/index.md", *folders, *flat]})
    config.nav = nav
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Lead links to READMEs of the repository, which GitHub follows as they are, to the pages that are made of them."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)+kernels/(\w+)/README\.md\)", rf"]({up}design/\1.md)", markdown)
    return re.sub(r"\]\((?:\.\./)+examples/(\w+)/README\.md\)", rf"]({up}examples/\1.md)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Drop the roles of cross references, which Markdown does not know. The names stay."""
    return re.sub(r":(?:func|class|meth|attr|mod):(?=<code>)", "", html)
