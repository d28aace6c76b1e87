"""SECURITY.md says what is so: options, files and numbers that it names exist, and its own YAML does what it says."""

import re
from pathlib import Path

import pytest
from hostile.harness import ERROR, SECONDS
from hostile.rows import Call, Place
from hostile.table import ALL, ROWS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_what_it_names_is_there(server, tmp_path):
    for folder in re.findall(r"`(tests/[\w/]+)`", PAGE):
        assert (ROOT / folder).is_dir()
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make (\w+)`", PAGE)) <= set(targets)
    said = server.run(tmp_path, ["export", "--help"]).stdout
    for option in set(re.findall(r"`(--\w+)", PAGE)):
        assert option in said


def test_its_numbers_are_those_of_the_harness():
    assert f"({SECONDS} s)" in PAGE or SECONDS != 60
    assert "(3 GB)" in PAGE and "max(3 * GIB" in (Path(__file__).parent / "hostile" / "server.py").read_text()
    assert "more than 500" in PAGE and 500 < len(ROWS) <= len(ALL)


@pytest.mark.parametrize("command", ["fit", "plan"])
def test_a_config_is_code(server, good, tmp_path, command):
    place = Place(tmp_path / "row", good)
    evil = {"data": {"class_path": "trap_module.Network"}}
    call = Call([command, "-c", place.config("pretrain", evil)])
    assert server.run(place.folder, call.arguments).code == 2
    assert place.sprung.exists(), "the page says that a config can import any module"


def test_the_exceptions_are_asked_for_by_the_user_alone(server, good, tmp_path):
    place = Place(tmp_path / "row", good)
    contents = place.contents()
    contents["hyper_parameters"]["class_path"] = "trap_module.Network"
    arguments = ["export", "--ckpt", place.save(contents), "--out", "out"]
    refused = server.run(place.folder, arguments)
    assert refused.code == 2 and ERROR in refused.stderr and not place.sprung.exists()
    allowed = server.run(place.folder, [*arguments, "--allow", "trap_module.Network"])
    assert allowed.code == 2 and place.sprung.exists(), "it is imported, and then it is no network"
