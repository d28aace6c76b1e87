"""Class names and values in the description of a checkpoint: none chooses code, another file or another host."""

import copy
import json
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import yaml

from hostile.rows import Call, Place, Row, use

KIND = "description"
MODULE = "hyper_parameters.init_args"
POSITIONS = {
    "model": f"{MODULE}.model",
    "optimizer": f"{MODULE}.optimization.optimizer",
    "scheduler": f"{MODULE}.optimization.scheduler",
    "rotation_optimizer": f"{MODULE}.optimization.rotation_optimizer",
    "optimizer_overrides": f"{MODULE}.optimization.optimizer_overrides.*proj*",
    "parameterization": f"{MODULE}.layers.parameterization",
    "override": f"{MODULE}.layers.overrides.*mlp*.parameterization",
    "layers": f"{MODULE}.layers",
    "optimization": f"{MODULE}.optimization",
    "clip_ramp": f"{MODULE}.optimization.clip_ramp",
    "arguments": MODULE,
    "module": "hyper_parameters",
}


TURNS = (
    "export", "checkpoint_model", "load_network", "fit-from", "load_from_checkpoint", "export", "checkpoint_model",
    "load_network", "export-peft", "plan-from", "load_network",
)  # fmt: skip
"""The commands in turn; those that parse a config take longest."""


def shell(place: Place) -> dict[str, Any]:
    """A description that runs a command."""
    return {"class_path": "os.system", "init_args": {"command": f"mkdir {place.sprung}"}}


def _yaml_file(place: Place, value: Any) -> str:
    return str(place.write("evil.yaml", yaml.safe_dump(value)))


FORMS = {
    "dict": lambda place, value: value, "json": lambda place, value: json.dumps(value),
    "json in json": lambda place, value: json.dumps(json.dumps(value)),
    "json arguments": lambda place, value: {**value, "init_args": json.dumps(value["init_args"])},
    "json with spaces": lambda place, value: f" \n\t{json.dumps(value, indent=1)}\n",
    "yaml": lambda place, value: yaml.safe_dump(value),
    "yaml flow": lambda place, value: f"{{class_path: {value['class_path']}, init_args: {value['init_args']}}}",
    "dotted": lambda place, value: {"class_path": value["class_path"],
                                    **{f"init_args.{name}": inner for name, inner in value["init_args"].items()}},
    "keywords": lambda place, value: {"class_path": value["class_path"], "dict_kwargs": value["init_args"]},
    "yaml file": _yaml_file,
    "relative file": lambda place, value: _yaml_file(place, value) and "evil.yaml",
    "file url": lambda place, value: f"file://{_yaml_file(place, value)}",
    "local url": lambda place, value: f"local://{_yaml_file(place, value)}",
    "https": lambda place, value: "https://127.0.0.1:9/evil.yaml",
    "in a list": lambda place, value: [json.dumps(value)], "class only": lambda place, value: value["class_path"],
}  # fmt: skip
"""The ways to write a description down."""

CALLABLES = {
    "os.system": {"command": "mkdir SPRUNG"}, "posix.system": {"command": "mkdir SPRUNG"},
    "os.mkdir": {"path": "SPRUNG"}, "subprocess.Popen": {"args": ["mkdir", "SPRUNG"]},
    "subprocess.run": {"args": ["mkdir", "SPRUNG"]},
    "builtins.eval": {"source": "__import__('os').mkdir('SPRUNG')"},
    "builtins.exec": {"source": "1"}, "shutil.rmtree": {"path": "CANARY"}, "os.remove": {"path": "CANARY/a.txt"},
    "pathlib.Path.touch": {"self": "SPRUNG"}, "importlib.import_module": {"name": "antigravity"},
    "torch.hub.load": {"repo_or_dir": "a/b", "model": "c"}, "torch.load": {"f": "x"},
    "torch.hub.download_url_to_file": {"url": "http://127.0.0.1:9/", "dst": "SPRUNG"},
    "functools.partial": {"func": "os.mkdir", "args": ["SPRUNG"]},
    "pickle.loads": {"data": "cos\nabort\n(tR."}, "runpy.run_path": {"path_name": "trap_module.py"},
    "runpy.run_module": {"mod_name": "trap_module"}, "code.interact": {},
    "webbrowser.open": {"url": "http://127.0.0.1:9/"}, "antigravity.fly": {}, "this.d": {}, "trap_module.Network": {},
    "trap_module.Network.inner": {}, "turtle.Turtle": {}, "os.abort": {},
    "yaml.unsafe_load": {"stream": "!!python/object/apply:os.mkdir ['SPRUNG']"},
    "urllib.request.urlopen": {"url": "x"}, "orthotrain.cli.main.main": {"argv": ["calibrate"]},
    "orthotrain.export.export_checkpoint": {"checkpoint": "x",
    "out": "y"},
    "orthotrain.checkpoints.writing.remove_folder": {"folder": "CANARY"},
    "torch.nn.Module.load_state_dict": {},
    "torch.utils.cpp_extension.load": {"name": "x", "sources": ["x"]},
    "torch.nn.Sequential": {"args": ["os.abort"]},
    "lightning.pytorch.callbacks.LambdaCallback": {"setup": "os.abort"},
    "lightning.pytorch.Trainer": {}, "torch.nn.modules.module.Module": {}, "torch.optim.optimizer.Optimizer": {},
    "bitsandbytes.optim.nothing": {},
}  # fmt: skip
"""Names that are no network, optimizer, schedule or parameterization -> their arguments."""

NAMES = {
    "relative": ".os.system", "two dots": "os..system", "ends in a dot": "os.", "empty": "", "space": " ",
    "no module": "x.Y", "look-alike letter": "\u043es.system", "full width": "\uff4f\uff53.system",
    "padded": " os.system ", "newline": "os.system\n", "no-break space": "os.system\u00a0",
    "zero width": "os\u200b.system", "walk": "os.__class__", "globals": "os.system.__init__.__globals__",
    "call": "os.system()", "colon": "os:system", "path": "/bin/sh", "long": "a." * 5000 + "b", "nul": "os\0.system",
    "number": 3, "none": None, "list": ["os.system"], "dict": {"class_path": "os.system"},
    "escape": "\x1b]0;owned\x07os.system", "override": "\u202emetsys.so", "bytes": b"os.system",
    "our module of functions": "orthotrain.export.folder", "private": "orthotrain.export.folder._rebuilt",
    "case": "OS.System",
}  # fmt: skip
"""Other things in the place of a class name."""


def with_description(place: Place, position: str, value: Any) -> dict[str, Any]:
    """Return the contents of a checkpoint with a value in a position of its description."""
    contents = copy.deepcopy(place.contents())
    *path, last = POSITIONS[position].split(".")
    inner = contents
    for part in path:
        if inner.get(part) is None:
            inner[part] = {}
        inner = inner[part]
    inner[last] = value
    return contents


def filled(value: Any, place: Place) -> Any:
    """Put the paths of a place into the arguments of a callable."""
    text = json.dumps(value).replace("SPRUNG", str(place.sprung)).replace("CANARY", str(place.canary))
    return json.loads(text)


def _row(name: str, command: str, position: str, value: Any) -> Row:
    def make(place: Place) -> Call:
        return use(command, place, place.save(with_description(place, position, value(place))))

    return Row(KIND, name, command, make)


def rows() -> Iterator[Row]:
    """Every form in every position, every callable, every odd name, by the commands in turn."""
    commands, positions = cycle(TURNS), cycle(POSITIONS)
    for form, write in FORMS.items():
        for position in POSITIONS:

            def hostile(place, write=write):
                return write(place, shell(place))

            yield _row(f"{position} as {form}", next(commands), position, hostile)
    for target, arguments in CALLABLES.items():
        for form in ("dict", "json"):

            def called(place, target=target, arguments=arguments, form=form):
                return FORMS[form](place, {"class_path": target, "init_args": filled(arguments, place)})

            yield _row(f"{target} as {form}", next(commands), next(positions), called)
    for name, odd in NAMES.items():

        def named(place, odd=odd):
            return {"class_path": odd, "init_args": {}}

        yield _row(f"name {name}", next(commands), next(positions), named)
