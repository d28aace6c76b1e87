"""Modules beside a config and in the working folder are found behind installed packages, if they are named."""

import sys

import pytest
import yaml

from orthotrain.cli.main import main
from orthotrain.cli.own_modules import add_own_folders, import_modules
from orthotrain.errors import ConfigurationError
from orthotrain.plugins import registry

OWN = """
import orthotrain.plugins as plugins

@plugins.register("own_second_order")
class SecondOrder(plugins.CayleyNeumann):
    def __init__(self):
        super().__init__(order=2)
"""


@pytest.fixture
def path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    yield sys.path
    for name in ("own_parts", "own_helper", "own_cwd"):
        sys.modules.pop(name, None)


def config(folder, **content):
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(content or {"trainer": {"max_steps": 1}}))
    return f"--config={folder / 'run.yaml'}"


def test_only_named_modules_that_are_not_installed_add_a_folder(path, tmp_path, monkeypatch):
    before = list(path)
    for folder, names in (("conf", ["own_parts", "torch", "own_quiet"]), ("work", ["own_cwd"])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / f"{name}.py").write_text("")
    monkeypatch.chdir(tmp_path / "work")
    conf = tmp_path / "conf"
    add_own_folders([config(conf, data={"class_path": "torch.optim.Adam", "text": "see own_quiet.py. No"})])
    assert path == before
    add_own_folders([config(conf), "--data.source", "own_quiet", "--data.source=/a/own_quiet.txt", "--x=~/own_parts.y"])
    assert path == before
    add_own_folders([config(conf, model={"init_args": [{"class_path": "own_parts.Network"}]})])
    assert path == [*before, str(conf)]
    add_own_folders([config(conf), "--model.model", "{class_path: own_cwd.sub.Network}"])
    assert path == [*before, str(conf), str(tmp_path / "work")]
    for options in (["--imports", "own_quiet"], ["--imports=[own_quiet]"]):
        path[:] = before
        add_own_folders([config(conf), *options])
        assert path == [*before, str(conf)]
    path[:] = before
    add_own_folders([config(conf, imports=["own_quiet", "../x", ""])])
    assert path == [*before, str(conf)]


def test_a_class_and_a_registered_name_beside_the_config(path, small_config, tmp_path, capsys):
    (tmp_path / "own_parts.py").write_text(OWN)
    command = ["plan", "-c", "pretrain/poet_quickstart.yaml", "-c", str(small_config)]
    main([*command, "--model.layers.parameterization", "own_second_order", "--imports", "[own_parts]"])
    assert "trainable, rotations" in capsys.readouterr().out
    assert sys.path[-1] == str(tmp_path) and sys.path.count(str(tmp_path)) == 1
    assert type(registry.create("own_parts.SecondOrder")).__name__ == "SecondOrder"


def test_a_module_with_an_error_is_named(path, tmp_path):
    (tmp_path / "own_helper.py").write_text("1 / 0")
    path.append(str(tmp_path))
    with pytest.raises(ConfigurationError, match="own_helper: cannot be imported .ZeroDivisionError: division by zero"):
        import_modules(["own_helper"])
