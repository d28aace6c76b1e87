"""The README's Python snippets run as they stand."""

import re
from pathlib import Path

import pytest

from orthotrain.plugins import create, registry

README = Path(__file__).parent.parent / "README.md"


def snippets():
    """Return the fenced Python blocks."""
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_snippets_are_found():
    assert len(snippets()) == 2


@pytest.mark.parametrize("index", range(2))
def test_a_snippet_runs(index, monkeypatch):
    namespace = {}
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    exec(compile(snippets()[index], f"README snippet {index}", "exec"), namespace)
    if "module" in namespace:
        namespace["module"].configure_model()
        assert namespace["module"].wrapped_names == ["0"]
    else:
        assert create("second_order").orthogonality_error(0.1) == pytest.approx(4e-4)
