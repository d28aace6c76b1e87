"""Keys in the description of a checkpoint that other libraries act upon, and descriptions that lead to other files."""

import copy
import json
from collections.abc import Iterator
from itertools import cycle
from typing import Any

from hostile.descriptions import FORMS, KIND, MODULE, shell, with_description
from hostile.rows import Call, Place, Row, put, use


def _special(name: str, command: str, change: Any, codes: tuple[int, ...] = (2,)) -> Row:
    def make(place: Place) -> Call:
        contents = copy.deepcopy(place.contents())
        for key, value in change(place).items():
            put(contents, key, value)
        return use(command, place, place.save(contents))

    return Row(KIND, name, command, make, codes)


def rows() -> Iterator[Row]:
    """Keys that Lightning or jsonargparse give a meaning, chains of checkpoints, code of models."""
    for key in ("_instantiator", "_class_path", "__class__", "__path__", "__default_config__", "cls", "config"):
        for target in ("os.system", "trap_module.Network"):

            def hidden(place, key=key, target=target):
                return {f"hyper_parameters.{key}": target, "hparams_name": "kwargs", f"{MODULE}.{key}": target}

            yield _special(f"key {key} {target}", "load_from_checkpoint", hidden, (0, 2))
            yield _special(f"key {key} {target}", "export", hidden, (0, 2))
    yield from chain_rows()
    yield from remote_code_rows()


def chain_rows() -> Iterator[Row]:
    """Checkpoints that start from another checkpoint, and widen what that one may name."""
    own = "orthotrain.export.CheckpointModel"
    for name, allow in {
        "allows": ["os.system"],
        "allows all": ["*"],
        "allows by text": "os.system",
        "allows one": [shell],
    }.items():

        def widened(place, allow=allow):
            allow = [shell(place)] if allow == [shell] else allow
            inner = with_description(place, "optimizer", shell(place))
            path = str(place.save(inner, "inner.ckpt"))
            return {f"{MODULE}.model": {"class_path": own, "init_args": {"path": path, "allow": allow}}}

        for command in ("export", "fit-from", "checkpoint_model"):
            yield _special(f"a checkpoint that {name}", command, widened)
    for command in ("export", "checkpoint_model", "plan-from"):

        def itself(place):
            return {f"{MODULE}.model": {"class_path": own, "init_args": {"path": str(place.work / "bad.ckpt")}}}

        yield _special("names itself", command, itself)

        def chain(place):
            small = {"state_dict": {}, "hyper_parameters": place.contents()["hyper_parameters"]}
            for number in range(40):
                model = {"class_path": own, "init_args": {"path": str(place.work / f"{number + 1}.ckpt")}}
                small["hyper_parameters"]["init_args"]["model"] = model
                place.save(small, f"{number}.ckpt")
            return {f"{MODULE}.model": {"class_path": own, "init_args": {"path": str(place.work / "0.ckpt")}}}

        yield _special("names a chain of 40", command, chain)


def remote_code_rows() -> Iterator[Row]:
    """A model folder with code, which the description asks to run."""
    asked = {
        "plain": {"trust_remote_code": True}, "number": {"trust_remote_code": 1},
        "text": {"trust_remote_code": "true"}, "yes": {"trust_remote_code": "yes"},
        "options": {"options": {"trust_remote_code": True}},
        "json options": {"options": '{"trust_remote_code": true}'}, "list": {"trust_remote_code": [True]},
        "kernels": {"options": {"use_kernels": True}},
        "attention": {"options": {"attn_implementation": "a/kernel"}},
        "pickles": {"options": {"weights_only": False}}, "nothing": {},
    }  # fmt: skip
    for (name, more), command in zip(asked.items(), cycle(("export", "checkpoint_model", "fit-from"))):

        def remote(place, more=more):
            arguments = {"name": str(model_with_code(place)), **more}
            return {f"{MODULE}.model": {"class_path": "orthotrain.models.PretrainedModel", "init_args": arguments}}

        yield _special(f"remote code {name}", command, remote)
    for form in ("dotted", "json", "yaml", "keywords", "json arguments"):

        def spelt(place, form=form):
            arguments = {"name": str(model_with_code(place)), "trust_remote_code": True}
            value = {"class_path": "orthotrain.models.PretrainedModel", "init_args": arguments}
            return {f"{MODULE}.model": FORMS[form](place, value)}

        yield _special(f"remote code as {form}", "export", spelt)


def model_with_code(place: Place) -> Any:
    """Copy the good model folder and let its config name a module of its own, which makes ``sprung``."""
    folder = place.copy("model", "model_with_code")
    place.write("model_with_code/modeling_own.py", (place.work / "trap_module.py").read_text())
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
