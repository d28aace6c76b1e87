"""Good files, mutated as parsed values: read or refused in one line, and no module is looked for that no run needs."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from hostile.harness import faults, listing
from hostile.mutations import mutated
from hostile.rows import Call, Place, use
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

EXAMPLES = settings(max_examples=20, derandomize=True, deadline=None, database=None, phases=(Phase.generate,),
                    suppress_health_check=list(HealthCheck))  # fmt: skip
KNOWN = {
    "accelerate", "bitsandbytes", "encodings", "galore_torch", "huggingface_hub", "jsonargparse", "lightning",
    "numpy", "orthotrain", "safetensors", "tokenizers", "torch", "torchvision", "transformers", "triton", "yaml",
    "google", "sentencepiece", "tiktoken",
}  # fmt: skip
"""What any run may look for; the last three are what transformers tries for a tokenizer of an old form."""


@pytest.fixture(scope="session")
def needed(server, good, tmp_path_factory):
    """Every module that good runs look for."""
    folder, needed = tmp_path_factory.mktemp("safety_imports"), set(KNOWN)
    for number, command in enumerate(("export", "validate", "plan-from", "load_from_checkpoint", "tokenizer")):
        place = Place(folder / str(number), good)
        call = use(command, place, good.checkpoint)
        needed |= server.run(place.folder, call.arguments, call.entry).imports
    for entry, path in (("pretrained", {}), ("load_adapter", str(good.adapter)), ("import_peft", str(good.peft))):
        place = Place(folder / entry, good)
        needed |= server.run(place.folder, [str(good.model), path], entry).imports
    return needed


@pytest.fixture
def judge(server, good, needed):
    """Makes a place, lets ``make`` put a mutant there and say what to run, and judges how that ended."""

    def judged(make, mutant):
        folder = Path(tempfile.mkdtemp(prefix="safety"))
        try:
            place = Place(folder / "row", good)
            call = make(place)
            canary = listing(place.canary)
            outcome = server.run(place.folder, call.arguments, call.entry)
            wrong = faults(outcome, (0, 1, 2) if "fit" in call.arguments else (0, 2))
            wrong += [f"it looked for {outcome.imports - needed}"] if outcome.imports - needed else []
            wrong += ["it changed the canary"] if listing(place.canary) != canary else []
            wrong += ["it ran code"] if place.sprung.exists() else []
            assert not wrong, f"{wrong}\n{outcome.stderr[-2000:]}\n{mutant!r}"
        finally:
            shutil.rmtree(folder)

    return judged


def plain(value):
    """Whether a value of a checkpoint is to be mutated: all but the weights."""
    return {key: inner for key, inner in value.items() if key not in ("state_dict", "optimizer_states")}


@pytest.mark.parametrize("command", ["load_network", "checkpoint_model"])
@EXAMPLES
@given(data=st.data())
def test_descriptions(judge, good, command, data):
    contents = good.contents()
    contents["hyper_parameters"] = data.draw(mutated(contents["hyper_parameters"]))
    judge(lambda place: use(command, place, place.save(contents)), contents["hyper_parameters"])


@pytest.mark.parametrize("command", ["export", "validate", "fit"])
@settings(EXAMPLES, max_examples=6)
@given(data=st.data())
def test_plain_values_of_checkpoints(judge, good, command, data):
    contents = good.contents()
    mutant = data.draw(mutated(plain(contents)))
    kept = {key: value for key, value in contents.items() if key in ("state_dict", "optimizer_states")}
    judge(
        lambda place: use(command, place, place.save({**mutant, **kept} if isinstance(mutant, dict) else mutant)),
        mutant,
    )


def in_folder(copied, name, entry):
    """Return what makes a mutant of one JSON file of a good folder and loads the folder."""

    def make(place, mutant):
        folder = place.copy(copied, "bad")
        (folder / name).write_text(json.dumps(mutant))
        if entry == "consolidate":
            return Call(["consolidate", folder, "one.ckpt"])
        arguments = {
            "import_peft": [str(place.good.model), str(folder)],
            "pretrained": [str(folder), {}],
            "tokenizer": [str(folder)],
        }
        return Call(arguments[entry], entry=entry)

    return make


FILES = {
    "adapter_config.json": ("peft", "import_peft"),
    "config.json": ("model", "pretrained"),
    "generation_config.json": ("model", "pretrained"),
    "tokenizer_config.json": ("model", "tokenizer"),
    "tokenizer.json": ("model", "tokenizer"),
    "checksums.json": ("shards", "consolidate"),
}


@pytest.mark.parametrize("name", FILES)
@settings(EXAMPLES, max_examples=10)
@given(data=st.data())
def test_json_files(judge, good, name, data):
    copied, entry = FILES[name]
    mutant = data.draw(mutated(json.loads((getattr(good, copied) / name).read_text())))
    judge(lambda place: in_folder(copied, name, entry)(place, mutant), mutant)


@settings(EXAMPLES, max_examples=8)
@given(data=st.data())
def test_configs(judge, good, data):
    """A config is the user's own and names classes: only what is no code is changed."""
    config = good.config()
    mutant = {**config, **{part: data.draw(mutated(config[part])) for part in ("trainer", "data")}}
    texts = json.dumps(mutant, default=str)
    if any(trap in texts for trap in ("antigravity", "this.d", "trap_module", "os.", "canary", "http", "/dev")):
        return
    judge(lambda place: Call(["plan", "-c", place.write("bad.yaml", yaml.safe_dump(mutant))]), mutant)
