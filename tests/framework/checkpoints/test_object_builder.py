"""What a checkpoint describes is built from plain values: annotations decide, no string is parsed again."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch.optim import Optimizer

from orthotrain.checkpoints.object_builder import ObjectBuilder, missing_arguments, parameters_of
from orthotrain.checkpoints.trusted_classes import TrustedClasses
from orthotrain.errors import ConfigurationError
from orthotrain.models import CausalLM, ModelBuilder
from orthotrain.modules import PoetLayers, PoetModule
from orthotrain.plugins import Cayley, CayleyNeumann, Parameterization


@dataclass(frozen=True)
class Settings:
    width: int = 4
    rates: list[float] = field(default_factory=list)
    pair: tuple[float, float] = (0.0, 1.0)
    mode: Literal["fast", "slow"] = "fast"
    by_name: dict[str, dict[str, Any]] | None = None


class Takes:
    def __init__(self, settings: Settings, plugin: Parameterization | str = "cayley", free=None, **more: Any) -> None:
        self.settings, self.plugin, self.free, self.more = settings, plugin, free, more


class Passes(Takes):
    def __init__(self, *arguments: Any, own: bool = False, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.own = own


def builder(*allow):
    return ObjectBuilder(TrustedClasses("file.ckpt", allow))


def build(value, kind, *allow):
    return builder(*allow).build(value, kind, "here")


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3, int, 3),
        (3, float, 3),
        (None, float | None, None),
        ("x", str, "x"),
        ([1, 2.5], list[float], [1, 2.5]),
        ([0.9, 0.95], tuple[float | torch.Tensor, float | torch.Tensor], (0.9, 0.95)),
        ({"a": 1}, dict[str, int], {"a": 1}),
        ({"width": 8, "pair": [1, 2]}, Settings, Settings(8, pair=(1, 2))),
        ("cayley", Parameterization | str, Cayley()),
        ({"class_path": "CayleyNeumann", "init_args": {"order": 2}}, Parameterization | str, CayleyNeumann(2)),
        ({"class_path": "orthotrain.plugins.cayley.Cayley"}, Parameterization, Cayley()),
        ({"class_path": "orthotrain.plugins.Cayley"}, Parameterization | str, Cayley()),
        ("slow", Literal["fast", "slow"], "slow"),
        ('{"class_path": "os.system"}', str, '{"class_path": "os.system"}'),
        ({"x": [1, {"y": "file:///z"}]}, Any, {"x": [1, {"y": "file:///z"}]}),
    ],
    ids=str,
)
def test_plain_values_become_what_the_annotation_says(value, kind, expected):
    assert build(value, kind) == expected


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ("3", int, "here: expected int, got '3'"),
        (True, int, "here: expected int, got True"),
        (1, bool, "here: expected bool, got 1"),
        (3.0, int, "here: expected int, got 3.0"),
        ("1e-3", float, "here: expected float, got '1e-3'"),
        ("[1]", list[int], r"here: expected list\[int\], got '\[1\]'"),
        (["a"], list[int], r"here\[0\]: expected int, got 'a'"),
        ([1], tuple[int, int], "here: expected 2 values"),
        ({"wide": 8}, Settings, "here: Settings has no argument 'wide'; known: width, rates"),
        ({"rates": {"x": 1}}, Settings, "here.rates: expected list"),
        ('{"width": 8}', Settings, "names .*, which is not a known class"),
        ({"mode": "FAST"}, Settings, "here.mode: expected Literal"),
        (torch.zeros(2), Any, "here: expected a plain value"),
        (b"x", Any, "here: expected a plain value"),
        ({"class_path": "orthotrain.models.CausalLM", "args": 1}, ModelBuilder, "unexpected 'args' beside"),
        ({"class_path": "torch.optim.AdamW"}, ModelBuilder, "torch.optim.AdamW, which is not a ModelBuilder"),
        ({"class_path": ["os.system"]}, ModelBuilder, "names .*os.system.*, which is not a known class"),
        ({"class_path": "torch.optim.AdamW", "init_args": [1]}, Callable[[Iterable], Optimizer], "a dictionary of arg"),
        ({"a": {"class_path": "antigravity.geohash"}}, dict[str, Any], "names antigravity.geohash"),
        ({"a": {"b": [{"parameterization": "this.d"}]}}, Any, "names this.d"),
        ({"a": {"trust_remote_code": 1}}, Any, "asks to run code that comes with"),
        ({"allow": ["os.abort"]}, Any, "names os.abort"),
        ({"allow": "os.abort"}, Any, "names os.abort"),
        ({"options": {"offload_folder": "/home"}}, Any, "asks to load a model with offload_folder='/home'"),
        ({"options": {"cache_dir": "x"}}, Any, "asks to load a model with cache_dir='x'"),
        ({"options": {"device_map": {"": "disk"}}}, Any, "asks to load a model with device_map="),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_its_place(value, kind, message):
    with pytest.raises(ConfigurationError, match=message):
        build(value, kind)


def test_what_is_built_later_gets_its_first_arguments_later():
    kind = Callable[[Iterable], Optimizer] | None
    made = build({"class_path": "torch.optim.AdamW", "init_args": {"betas": [0.9, 0.95]}}, kind)
    assert isinstance(made, partial) and made.func is torch.optim.AdamW and made.keywords == {"betas": (0.9, 0.95)}
    assert build("torch.optim.SGD", kind)([torch.nn.Parameter(torch.zeros(1))]).defaults["momentum"] == 0
    with pytest.raises(ConfigurationError, match="AdamW has no argument 'params'"):
        build({"class_path": "torch.optim.AdamW", "init_args": {"params": [1]}}, kind)


STRANGE_NAMES = [
    *(
        "orthotrain.models.CausalLM ",
        "orthotrain.models.builders",
        "orthotrain.models.builders.torch",
        "orthotrain.cli.main.main",
        "",
        ".",
    ),
    *(
        "orthotrain.distributed.consolidate.consolidate",
        "orthotrain.modules.poet.PoetModule.wrap",
        "torch.optim.swa_utils",
    ),
    *("torch.optim.Adam.step", "torch.nn.Linear", "torch.hub.load", "bitsandbytes.optim.torch", "a..b", "TAKES"),
    *("orthotrain.models.builders.Causal\u217cM", f"{__name__}.Passes"),
]


def test_names_are_whole_and_exact():
    trusted = TrustedClasses("file.ckpt", [f"{__name__}.Takes", CausalLM])
    assert trusted.find("orthotrain.models.CausalLM") is CausalLM
    for name in STRANGE_NAMES:
        with pytest.raises(ConfigurationError, match="which is not a known class"):
            trusted.find(name)


def test_folders_of_a_download_are_allowed_by_name():
    model = {
        "class_path": "orthotrain.models.PretrainedModel",
        "init_args": {"name": "x", "options": {"cache_dir": "y"}},
    }
    with pytest.raises(ConfigurationError, match="asks to load a model with cache_dir='y'.*export --allow cache_dir"):
        build(model, ModelBuilder)
    assert build(model, ModelBuilder, "cache_dir").options == {"cache_dir": "y"}


def test_a_pattern_may_have_the_name_of_an_option():
    assert build({"token": {"sides": "in"}}, dict[str, dict[str, Any]]) == {"token": {"sides": "in"}}


def test_advice_to_allow_names_no_part_of_python_itself():
    with pytest.raises(ConfigurationError, match="allow it: allow=.'mine.Network'., export --allow mine.Network"):
        TrustedClasses("file.ckpt").find("mine.Network")
    for name in ("os.system", "subprocess.Popen", '{"class_path": "mine.Network"}', "file:///mine.yaml", 3, None):
        with pytest.raises(ConfigurationError, match="do not use the file$"):
            TrustedClasses("file.ckpt").find(name)


def test_arguments_behind_stars_are_those_of_the_parents():
    assert set(parameters_of(Passes)) == {"own", "settings", "plugin", "free"}
    assert missing_arguments(Passes, ["own"]) == ["settings"]
    assert missing_arguments(Takes, ["free"]) == ["settings"]
    name = f"{__name__}.Passes"
    spec = {
        "class_path": name,
        "init_args": {"settings": {"width": 2}, "own": True, "free": [1]},
        "dict_kwargs": {"z": 1},
    }
    made = build(spec, Takes, Passes)
    assert made.settings == Settings(2) and made.own and made.free == [1] and made.more == {"z": 1}
    for wrong in (["z"], "z", {1: 2}):
        with pytest.raises((ConfigurationError, TypeError), match="dict_kwargs: expected|keywords must be strings"):
            build({**spec, "dict_kwargs": wrong}, Takes, Passes)
    spec["dict_kwargs"] = {"z": {"class_path": "os.system"}}
    with pytest.raises(ConfigurationError, match="names os.system"):
        build(spec, Takes, Passes)


def test_settings_of_overrides_are_checked_where_nobody_else_does():
    layers = build({"overrides": {"*mlp*": {"sides": "in", "parameterization": "cayley"}}}, PoetLayers)
    assert layers.overrides == {"*mlp*": {"sides": "in", "parameterization": "cayley"}}
    for value in ("webbrowser.open", {"class_path": "webbrowser.open"}):
        with pytest.raises(ConfigurationError, match=r"names webbrowser.open"):
            build({"overrides": {"*mlp*": {"parameterization": value}}}, PoetLayers)


def test_every_argument_of_our_modules_has_an_annotation_that_is_read():
    for cls in (PoetModule, PoetLayers, CausalLM):
        assert Any not in [parameter.annotation for parameter in parameters_of(cls).values()]
