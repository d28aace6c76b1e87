"""Dicts of later configs and options are laid over earlier ones key by key, and null is null everywhere."""

from copy import deepcopy

import pytest
import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch.callbacks import Callback

from orthotrain.cli.config_files import resolve_config_arguments
from orthotrain.cli.overlay import merged, overlaid_values
from orthotrain.cli.parser import OneLineParser
from orthotrain.cli.trainer_cli import OrthotrainCLI
from orthotrain.errors import ConfigurationError
from orthotrain.modules import BaseModule, OftModule

SIZES = {"vocab_size": 96, "hidden_size": 32, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
BASE = {
    "class_path": "OftModule",
    "init_args": {
        "layers": {"block_size": 8, "storage": "int8", "overrides": {"*mlp*": {"block_size": 4}}},
        "optimization": {
            "lr_overrides": {"*norm*": 0.5},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"eps": 1e-5, "betas": [0.9, 0.95]}},
        },
        "model": {"class_path": "CausalLM", "init_args": {"config": SIZES}},
    },
}


@pytest.fixture(scope="module")
def parse():
    assert OftModule
    parser = OneLineParser()
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_subclass_arguments(BaseModule, "model")

    def parse(*arguments, lines=None):
        with overlaid_values({}) as found:
            config = parser.parse_args([f"--config={yaml.safe_dump({'model': BASE})}", *arguments])
        if lines is not None:
            lines += found
        return yaml.safe_load(parser.dump(config, skip_none=False))["model"]["init_args"]

    return parse


def config_of(**model):
    return f"--config={yaml.safe_dump({'model': {'init_args': model}})}"


CONFIGS = [
    ({"hidden_size": 64}, {**SIZES, "hidden_size": 64}),
    ({"rope_scaling": {"factor": 4.0}}, {**SIZES, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ({"rope_scaling": None}, {**SIZES, "rope_scaling": None}),
    ({"_replace_": True, "hidden_size": 64}, {"hidden_size": 64}),
    ({"rope_scaling": {"_replace_": True, "factor": 4.0}}, {**SIZES, "rope_scaling": {"factor": 4.0}}),
    ({"_replace_": False, "hidden_size": 64}, {**SIZES, "hidden_size": 64}),
    ({"rope_scaling": {"class_path": "x"}}, {**SIZES, "rope_scaling": {"class_path": "x"}}),
]


def test_a_dict_is_merged_key_by_key():
    before = deepcopy(SIZES)
    for given, expected in CONFIGS:
        kept = deepcopy(given)
        assert merged(before, given) == expected
        assert before == SIZES and given == kept, "merging changes neither dict"


@pytest.mark.parametrize("number", [0, 4])
def test_a_config_and_an_option_merge(parse, number):
    given, expected = CONFIGS[number]
    option = f"--model.model.config={yaml.safe_dump(given, default_flow_style=True)}"
    for argument in (config_of(model={"init_args": {"config": given}}), option):
        found = parse(argument)
        assert found["model"]["init_args"]["config"] == expected
        assert found["layers"]["storage"] == "int8" and found["layers"]["block_size"] == 8


def test_one_key_of_a_dict_is_an_option(parse):
    name = "--model.model.config.rope_scaling.factor"
    found = parse(name, "3.0", "--model.init_args.model.init_args.config.hidden_size", "64")["model"]["init_args"]
    rope = {"rope_type": "linear", "factor": 3.0}
    assert found["config"] == {**SIZES, "hidden_size": 64, "rope_scaling": rope}
    found = parse("--model.layers.overrides.*mlp*.sides", "in", "--model.optimization.lr_overrides", "{'*bias*': 1.0}")
    assert found["layers"]["overrides"] == {"*mlp*": {"block_size": 4, "sides": "in"}}
    assert found["optimization"]["lr_overrides"] == {"*norm*": 0.5, "*bias*": 1.0}
    emptied = parse("--model.model.config", "null", "--model.model.config", "{hidden_size: 8}")
    assert emptied["model"]["init_args"]["config"] == {"hidden_size": 8}


def test_null_is_null_in_a_dataclass_inside_a_class(parse):
    options = [
        option
        for name in ("layers.storage", "layers.overrides", "optimization.optimizer", "optimization.lr_overrides")
        for option in (f"--model.{name}", "null")
    ]
    found = parse(*options, "--model.init_args.layers.group_size", "~")
    assert [found["layers"][name] for name in ("storage", "overrides", "group_size")] == [None] * 3
    assert found["optimization"]["optimizer"] is found["optimization"]["lr_overrides"] is None
    with pytest.raises(ConfigurationError, match=r"got 'None'; none is written null"):
        parse("--model.layers.storage", "None")
    with pytest.raises(ConfigurationError, match=r"expected int, got null; leave the option out for its default"):
        parse("--model.layers.block_size", "null")


def test_a_text_option_keeps_its_text(parse):
    for text in ("007", "{a} ###"):
        assert parse("--model.model.model_type", text)["model"]["init_args"]["model_type"] == text


def test_a_list_is_replaced_as_a_whole(parse):
    found = parse("--model.layers.include", "['*q*', '*k*']", "--model.layers.include", "['*v*', '*o*']")
    assert found["layers"]["include"] == ["*v*", "*o*"]
    parser = OneLineParser()
    parser.add_argument("--callbacks", type=list[Callback])
    first, second = (
        f"[{{class_path: EarlyStopping, init_args: {{monitor: {given}}}}}]" for given in ("a, patience: 9", "b")
    )
    with overlaid_values({}):
        stopping = parser.parse_args(["--callbacks", first, "--callbacks", second]).callbacks[0].init_args
    assert stopping.monitor == "b" and stopping.patience == 3


def test_what_a_change_of_class_drops_is_said(parse):
    lines = []
    found = parse("--model.optimization.optimizer", "torch.optim.SGD", lines=lines)
    assert found["optimization"]["optimizer"]["class_path"] == "torch.optim.SGD"
    assert lines == ["class SGD takes the place of AdamW, without its betas, eps"]
    lines.clear()
    parse(config_of(model={"class_path": "PretrainedModel", "init_args": {"name": "x"}}), lines=lines)
    assert lines == ["class PretrainedModel takes the place of CausalLM, without its config"]
    lines.clear()
    parse(config_of(optimization={"optimizer": {"init_args": {"amsgrad": True}}}), lines=lines)
    assert not lines


def test_the_command_line_merges_and_says_what_changes(small_config, tmp_path, caplog):
    small = {"model": {"init_args": {"model": {"init_args": {"config": {"hidden_size": 16}}}}}}
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(small))
    command = ["-c", "pretrain/poet_quickstart.yaml", "-c", str(small_config), "-c", str(tmp_path / "b.yaml")]
    options = ["--model.model.config.vocab_size", "640", "--model.optimization.optimizer", "torch.optim.SGD"]
    with caplog.at_level("INFO"):
        cli = OrthotrainCLI(resolve_config_arguments([*command, *options]), run=False)
    config = cli.model._builder.config
    assert config["hidden_size"] == 16 and config["intermediate_size"] == 48 and config["vocab_size"] == 640
    assert "class SGD takes the place of AdamW, without its betas" in caplog.messages
    assert "the data has 320 tokens: 320 of the model's 640 are never used" in caplog.messages
