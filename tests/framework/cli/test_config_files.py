"""Configs: what is read, and what is refused before it can take time or memory or run anything."""

import os
import socket

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from orthotrain.cli.config_files import check_yaml, resolve_config_arguments, shipped_configs
from orthotrain.cli.main import main
from orthotrain.cli.parser import OneLineParser
from orthotrain.cli.trainer_options import TRAINER, check_trainer_numbers
from orthotrain.errors import ConfigurationError

QUICK = ["-c", "pretrain/quickstart.yaml"]

HOSTILE = {
    "a: &a [*a]": r"the alias \*a inside the value",
    "a: &a {b: {c: [*a]}}": r"the alias \*a inside the value",
    "a: &a {<<: *a}": r"the alias \*a inside the value",
    "".join(f"k{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 10)}]\n" for n in range(12)): "50,000 values",
    "a: &a {x: 1}\n" + "b: [" + "*a, " * 30_000 + "]": "50,000 values",
    "a: " + "[" * 100_000: "more than 60 levels",
    "a: " + "{b: " * 100 + "1" + "}" * 100: "more than 60 levels",
    "".join(" " * n + "a:\n" for n in range(100)): "more than 60 levels",
    "a: !!python/object/apply:os.system [id]": "the tag 'tag:yaml.org,2002:python/object/apply:os.system'",
    "a: !mine 3": "the tag '!mine'",
    "a: " + "x" * 600_000: "at most 524,288",
    "a: " + "9" * 5000: "line 1: the value '9{40}'... is a number of 5,000 characters",
    "b: 1\na: -0x" + "F" * 5000: "line 2: .* is a number of 5,003 characters",
    "a: 0b" + "1" * 20_000: "is a number of 20,002 characters",
    "a: 0" + "7" * 6000: "is a number of 6,001 characters",
    "a: 1" + ":10" * 3000: "is a number of 9,001 characters",
    "a: {b: [!!int 0x" + "F" * 5000 + "]}": "is a number of 5,002 characters",
    "a: !!float '1" + "0" * 200 + "'": "is a number of 201 characters",
    "1" * 101 + ": a": "is a number of 101 characters",
    "a: !!int ''": "line 1: the value '' does not fit its tag !!int; correct it",
    "a: !!int 0x": "the value '0x' does not fit its tag !!int",
    "a: !!int 1:x": "the value '1:x' does not fit its tag !!int",
    "a: !!bool maybe": "the value 'maybe' does not fit its tag !!bool",
    "a: !!float x": "the value 'x' does not fit its tag !!float",
    "a: !!seq x": "the value 'x' does not fit its tag !!seq",
    "a: !!binary é": "the value 'é' does not fit its tag !!binary",
    "a: !!timestamp x": "the tag 'tag:yaml.org,2002:timestamp'",
    "a: 0001-01-01T00:00:00+99:99": "is not valid YAML",
    "a: !!int [1]": "is not valid YAML",
    "a: 2001-99-99": "is not valid YAML",
    "a: [1": "is not valid YAML",
    "- 1": "it must have keys",
    "trainer: {a: 1}\nmodel: {}\ntrainer: {b: 2}": "line 3: 'trainer' stands in line 1 already",
    "a: {b: 1, b: 2}": "line 1: 'b' stands in line 1 already",
    "a:\n- b: 1\n  c: 2\n  b: 3": "line 4: 'b' stands in line 2 already",
}


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_yaml_is_one_line(tmp_path, number):
    content, said = list(HOSTILE.items())[number]
    (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(ConfigurationError, match=said):
        resolve_config_arguments(["-c", str(tmp_path / "x.yaml")])


def test_a_key_may_stand_in_several_places(tmp_path):
    (tmp_path / "x.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: [{x: 1}, {x: 1}, *a, *a]")
    assert resolve_config_arguments(["-c", str(tmp_path / "x.yaml")])


def test_what_people_write_passes():
    check_yaml("a: &a {x: [1, 2.5, true, null, 'b']}\nb: {<<: *a, y: !!str 3}\nc: |\n  *a !!python\n", "x")
    check_yaml("prompt: {x} & [y", "x")
    check_yaml(f"a: !!int 0x1F\nb: !!bool no\nc: '{'9' * 500}'\nd: |\n  {'9' * 500}\ne: {'a1' * 200}\nf: ! 5", "x")


def test_values_of_options_are_bounded_too(capsys):
    for value, said in (("{a: &a [*a]}", "the alias *a"), ("{a: !!python/name:os.system x}", "has the tag")):
        with pytest.raises(SystemExit):
            main(["fit", "-c", "pretrain/quickstart.yaml", "--model", value])
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--seed_everything", "--model.layers.block_size", "--trainer.max_steps"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("0x" + "F" * 5000, "is a number of 5,002 characters"),
        ("1" + ":10" * 3000, "is a number of 9,001 characters"),
        ("9" * 5000, "is a number of 5,000 characters"),
        ("!!int ''", "does not fit its tag !!int"),
        ("!!bool maybe", "does not fit its tag !!bool"),
    ],
)
def test_options_without_a_value_are_one_line(capsys, option, value, said):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", "pretrain/quickstart.yaml", option, value])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and said in line and line.count("\n") == 1 and "set_int_max" not in line


@pytest.mark.parametrize("kind", ["fifo", "device", "socket"])
def test_what_is_no_regular_file_is_never_opened(tmp_path, kind):
    path = tmp_path / "x.yaml"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        socket.socket(socket.AF_UNIX).bind(str(path))
    for arguments in (["-c", str(path)], [f"--config={path}"], ["--model", str(path)], [f"--data={path}"]):
        with pytest.raises(ConfigurationError, match=f"is a {kind}, not a regular file"):
            resolve_config_arguments(arguments)


@pytest.mark.parametrize("name", ["a\0.yaml", "x" * 300, "~nobody-of-this-name/a.yaml", "a\udce9.yaml", "\n"])
def test_names_that_no_config_has_are_one_line(name):
    with pytest.raises(ConfigurationError):
        resolve_config_arguments(["-c", name])


def test_an_option_overrides_a_config_wherever_it_stands(tmp_path, capsys):
    path = tmp_path / "x=1.yaml"
    path.write_text("trainer: {max_steps: 3}")
    shipped = str(shipped_configs()["pretrain/quickstart.yaml"])
    for config in (["-c", str(path)], [f"-c{path}"], [f"-c={path}"], ["--config", str(path)], [f"--config={path}"]):
        found = resolve_config_arguments(["--trainer.max_steps", "7", *config, "--a", "-cpretrain/quickstart.yaml"])
        assert found == [f"--config={path}", f"--config={shipped}", "--trainer.max_steps", "7", "--a"]
    for incomplete in (["-c"], ["--config"], ["--config="], ["--a", "1", "-c"]):
        with pytest.raises(ConfigurationError, match="needs the name of a config"):
            resolve_config_arguments(incomplete)
    with pytest.raises(ConfigurationError, match="did you mean pretrain/quickstart.yaml"):
        resolve_config_arguments(["-cpretrain/quickstar.yaml"])
    with pytest.raises(SystemExit):
        main(["fit", "--print_config", "--trainer.max_steps", "7", *QUICK, "-c", str(path)])
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_steps"] == 7


BAD_NUMBERS = [
    *(("accumulate_grad_batches", n) for n in (0, -1)),
    *(("max_steps", -5), ("max_epochs", -2), ("min_steps", -3), ("min_epochs", -1), ("fast_dev_run", -1)),
    *(("val_check_interval", n) for n in (0, -1, 0.0, 1.7, float("nan"))),
    *(("limit_train_batches", n) for n in (-1, -0.5, 1.5, float("nan"), float("inf"))),
    *(("gradient_clip_val", n) for n in (-1, float("nan"), float("inf"))),
    *(("check_val_every_n_epoch", 0), ("log_every_n_steps", -1), ("num_sanity_val_steps", -7), ("num_nodes", 0)),
    *(("devices", n) for n in (100_000, 10**12, "50000", "50_000", "9" * 40)),
    *(("num_nodes", n) for n in (100_001, 10**9)),
]


@pytest.mark.parametrize(("name", "value"), BAD_NUMBERS)
def test_numbers_that_no_trainer_can_have(name, value):
    with pytest.raises(ConfigurationError, match=rf"^trainer.{name} {value}: must be "):
        check_trainer_numbers({name: value}, 0)


@pytest.mark.parametrize("devices", [[0] * 50_000, ",".join(["0"] * 50_000), "9" * 5000])
def test_lists_of_more_devices_than_processes_get_on(devices):
    with pytest.raises(ConfigurationError, match=r"^trainer.devices .{40}: must be at most \d+ on this machine"):
        check_trainer_numbers({"devices": devices}, 0)


@pytest.mark.parametrize("devices", [1, "1", "0,1", [0, 1], "auto", -1, "-1", "0,", None])
def test_devices_that_a_trainer_can_have(devices):
    check_trainer_numbers({"devices": devices, "num_nodes": 100_000}, 0)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70])
def test_seeds_out_of_range(seed):
    with pytest.raises(ConfigurationError, match=rf"^seed_everything {seed}: must be from 0 to"):
        check_trainer_numbers({}, seed)


def test_numbers_that_a_trainer_can_have():
    good = {
        "max_steps": -1,
        "limit_val_batches": 1.0,
        "val_check_interval": 0.25,
        "gradient_clip_val": 0,
        "log_every_n_steps": 0,
    }
    check_trainer_numbers({**good, "limit_train_batches": 7, "max_epochs": None, "fast_dev_run": True}, True)


def test_the_command_line_says_so_before_anything_is_seeded(capsys):
    for option, value in (("--seed_everything", "-1"), ("--trainer.accumulate_grad_batches", "0")):
        with pytest.raises(SystemExit) as stop:
            main(["fit", "-c", "pretrain/quickstart.yaml", option, value])
        assert stop.value.code == 2
        assert "must be " in capsys.readouterr().err


@pytest.mark.parametrize("order", [float | int | None, int | float | None, None | float | int | str], ids=str)
@pytest.mark.parametrize(("given", "number"), [("1", 1), ("1.0", 1.0), ("0.25", 0.25), ("null", None)])
def test_a_whole_number_of_batches_stays_one_in_whatever_order_its_types_are_listed(order, given, number):
    parser = OneLineParser()
    parser.add_argument("--limit", type=order)
    parser.prefer_whole_numbers()
    limit = parser.parse_args(["--limit", given]).limit
    assert limit == number and type(limit) is type(number)


def settings_of(name):
    return yaml.safe_load(shipped_configs()[name].read_text())


@pytest.mark.parametrize("size", ["60m", "130m", "350m", "1.3b", "3b", "8b", "13b"])
def test_the_recommended_recipe_is_one_for_20_tokens_a_parameter(size):
    run, paper = settings_of(f"pretrain/llama_{size}.yaml"), settings_of(f"pretrain/paper/poet_llama_{size}.yaml")
    module, usual = (found["model"]["init_args"] for found in (run, settings_of("pretrain/llama_60m.yaml")))
    assert (run["data"], module["model"]) == (paper["data"], paper["model"]["init_args"]["model"])
    assert module["layers"] == usual["layers"] and module["stepwise"] is True
    trainer, rates, data = run["trainer"], module["optimization"], run["data"]["init_args"]
    schedule, optimizer = rates["scheduler"]["init_args"], rates["optimizer"]["init_args"]
    assert {"lr": 5e-3, "rotation_lr": 0.025, "weight_decay": 0.01}.items() <= rates.items()
    assert optimizer == {"betas": [0.9, 0.95]} and schedule["final_ratio"] == 0.01
    assert schedule["warmup_steps"] == trainer["max_steps"] // 100
    with torch.device("meta"):
        network = LlamaForCausalLM(LlamaConfig(**module["model"]["init_args"]["config"]))
    step = 4 * data["batch_size"] * trainer["accumulate_grad_batches"] * data.get("sequence_length", 256)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert 20 <= trainer["max_steps"] * step / parameters < 20.1
    assert f"20 * {parameters:,} parameters" in shipped_configs()[f"pretrain/llama_{size}.yaml"].read_text()


RUNS = {name: path for name, path in shipped_configs().items() if name.startswith(("pretrain/", "finetune/"))}


@pytest.mark.parametrize("name", [name for name in RUNS if "/options/" not in name])
def test_a_shipped_config_holds_only_the_ideas_of_its_run(name):
    lines = RUNS[name].read_text().splitlines()
    config = yaml.safe_load("\n".join(lines))
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    assert "logger" not in config["trainer"] and config.get("seed_everything") is None
    repeated = [key for key, value in TRAINER.items() if config["trainer"].get(key, "-") == value]
    assert not repeated, f"these are defaults of the command line: {repeated}"


def test_two_shipped_configs_never_share_a_run_folder():
    folders = [yaml.safe_load(RUNS[name].read_text())["trainer"].get("default_root_dir", f"runs/{RUNS[name].stem}")
               for name in RUNS if "/options/" not in name]  # fmt: skip
    assert len(set(folders)) == len(folders)
