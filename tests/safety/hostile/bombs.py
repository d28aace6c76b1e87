"""Small checkpoints and configs that ask for memory or time without bound."""

import _codecs
import struct
from collections import Counter, OrderedDict
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v2
from torch.storage import TypedStorage

from hostile import pickles
from hostile.descriptions import MODULE, with_description
from hostile.rows import EITHER, Call, Place, Row, put, use

KIND = "bomb"
WEIGHT = "model.model.layers.0.self_attn.q_proj.weight.values"


def _cycle_list() -> list:
    value: list = []
    value.append(value)
    return value


def _cycle_dict() -> dict:
    value: dict = {}
    value["a"] = {"b": [value]}
    return value


def _claimed(size: int) -> pickles.Call:
    data = TypedStorage(wrap_storage=torch.zeros(1).untyped_storage(), dtype=torch.float32, _internal=True)
    return pickles.Call(_rebuild_tensor_v2, data, 0, (size,), (0,), False, OrderedDict())


def _shared_dict(depth: int) -> dict:
    value: dict = {}
    for _ in range(depth):
        value = {"a": value, "b": value}
    return value


VALUES = {
    "stride 0": lambda: pickles.expanded(1 << 40),
    "stride 0 square": lambda: pickles.expanded(1 << 20, 1 << 20),
    "stride 0 integers": lambda: pickles.expanded(1 << 36, dtype=torch.int64),
    "one stride 0": lambda: torch.zeros(64)[None].expand(1 << 34, 64),
    "shared lists": lambda: pickles.doubling(64), "shared dictionaries": lambda: _shared_dict(64),
    "list in itself": _cycle_list, "dictionary in itself": _cycle_dict,
    "tensor type": lambda: pickles.Call(torch.FloatTensor, 10**10),
    "storage": lambda: pickles.Call(torch.UntypedStorage, 10**11),
    "bytearray": lambda: pickles.Call(bytearray, 10**11),
    "bytearrays": lambda: [pickles.Call(bytearray, 1 << 30) for _ in range(9)],
    "claimed size": lambda: _claimed(1 << 40),
    "meta tensor": lambda: torch.empty(1 << 40, device="meta"),
    "sparse tensor": lambda: torch.sparse_coo_tensor(torch.zeros(2, 0), torch.zeros(0), (1 << 31, 1 << 31),
    check_invariants=False),
    "host name": lambda: pickles.Call(_codecs.encode, "a" * (1 << 18), "idna"),
    "number of 600 digits": lambda: 10**600, "long text": lambda: "x" * (1 << 25),
    "many keys": lambda: dict.fromkeys(range(200_000)), "counter": lambda: Counter({"a": 10**600}),
    "infinite": lambda: float("inf"),
}  # fmt: skip
PLACES = {
    "extra": "extra", "weight": "state_dict", "callback": "callbacks.MergeRotations", "optimizer": "optimizer_states",
    "loops": "loops", "argument": f"{MODULE}.merge_every", "network": f"{MODULE}.model.init_args.config",
    "tokenizer": "TextData.tokenizer",
}  # fmt: skip
READ_BY = {
    "extra": ("export", "validate", "fit"), "weight": ("export", "validate", "checkpoint_model"),
    "callback": ("fit",), "optimizer": ("fit",), "loops": ("fit",), "argument": ("export", "load_network"),
    "network": ("load_network", "export"), "tokenizer": ("export", "tokenizer"),
}  # fmt: skip


def rows() -> Iterator[Row]:
    """All of them."""
    turns = cycle(PLACES)
    for name, value in VALUES.items():
        for place in dict.fromkeys(("weight", "extra", next(turns), next(turns))):
            command = READ_BY[place][len(name) % len(READ_BY[place])]
            yield _valued(name, command, place, value)
    yield from archive_rows()
    yield from size_rows()


def _valued(name: str, command: str, where: str, value: Any) -> Row:
    def make(place: Place) -> Call:
        contents = place.contents()
        made = value()
        if where == "weight":
            contents["state_dict"][WEIGHT] = made
        else:
            put(contents, PLACES[where], made)
        return use(command, place, place.save(contents))

    return Row(KIND, f"{name} as {where}", command, make, EITHER if where in ("extra", "callback") else (2,))


def _zip_bomb(place: Place, entry: str) -> Any:
    return pickles.deflated_entry(place.work / "bad.ckpt", place.good.checkpoint, entry, 4000 * pickles.MIB)


def _patched(place: Place, data: bytes) -> Any:
    return place.write("bad.ckpt", data)


ARCHIVES = {
    "pickle of 4 GB of zeros": lambda place: _zip_bomb(place, "data.pkl"),
    "tensor of 4 GB of zeros": lambda place: _zip_bomb(place, "data/0"),
    "version of 4 GB of zeros": lambda place: _zip_bomb(place, "version"),
    "overlapping entries": lambda place: pickles.overlapping(place.work / "bad.ckpt", place.good.checkpoint, 20_000),
    "lists in lists": lambda place: pickles.archive(place.work / "bad.ckpt", pickles.nested(100_000)),
    "lists in a dictionary": lambda place: pickles.archive(
        place.work / "bad.ckpt", pickles.pickled({"state_dict": {}, "hyper_parameters": pickles.nested(100_000)})),
    "number of an object": lambda place: pickles.archive(place.work / "bad.ckpt", b"}r" + struct.pack("<I",
    (1 << 31) - 1)),
    "length of a text": lambda place: pickles.archive(place.work / "bad.ckpt", b"X" + struct.pack("<I",
    (1 << 32) - 1) + b"a"),
    "length of a number": lambda place: pickles.archive(place.work / "bad.ckpt", b"\x8b" + struct.pack("<i",
    (1 << 31) - 1)),
    "many marks": lambda place: pickles.archive(place.work / "bad.ckpt", b"(" * 1_000_000),
    "compressed archive": lambda place: pickles.archive(place.work / "bad.ckpt", pickles.pickled({"a": "b" * 9999}),
    compressed=True),
    "sparse file": lambda place: _sparse(place, 8 << 30),
    "sparse file after an archive": lambda place: _sparse(place, 8 << 30, place.good.checkpoint.read_bytes()),
    "cut in half": lambda place: _patched(place, place.good.checkpoint.read_bytes()[: 1 << 17]),
    "archive twice": lambda place: _patched(place, 2 * place.good.checkpoint.read_bytes()),
    "gzip": lambda place: _patched(place, pickles.zeros(4000 * pickles.MIB, raw=False)),
}  # fmt: skip


def _sparse(place: Place, size: int, head: bytes = b"") -> Any:
    path = place.write("bad.ckpt", head)
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def archive_rows() -> Iterator[Row]:
    """Archives that inflate, overlap, nest or claim."""
    commands = cycle((("export", "validate"), ("fit", "checkpoint_model"), ("tokenizer", "load_network")))
    for name, write in ARCHIVES.items():
        for command in next(commands):

            def make(place, write=write, command=command):
                return use(command, place, write(place))

            # two archives in one file are the second: zip readers look from the end
            yield Row(KIND, name, command, make, EITHER if name == "archive twice" else (2,))

    def last(place):
        for number in range(3):
            path = pickles.deflated_entry(place.work / "b.ckpt", place.good.checkpoint, "data/1", 4000 * pickles.MIB)
            target = place.run / "checkpoints" / f"bad{number}.ckpt"
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        return Call(["fit", "-c", place.config(), "--ckpt_path", "last"])

    yield Row(KIND, "newest checkpoints of 4 GB of zeros", "fit", last)


SIZES = {
    "num_hidden_layers": 10**8, "hidden_size": 1 << 40, "intermediate_size": 1 << 40, "vocab_size": 1 << 40,
    "num_attention_heads": 10**9, "max_position_embeddings": 1 << 60, "head_dim": 1 << 40, "rope_theta": 1e400,
    "layers of text": "x", "num_key_value_heads": 0,
}  # fmt: skip


def size_rows() -> Iterator[Row]:
    """Networks of any size, from the user's config, from a checkpoint and from a model folder."""
    import json

    for name, size in SIZES.items():
        key = "num_hidden_layers" if name == "layers of text" else name

        def own(place, key=key, size=size, command="fit"):
            config = place.config("pretrain", {f"model.init_args.model.init_args.config.{key}": size})
            return Call([command, "-c", config])

        def described(place, key=key, size=size):
            config = place.contents()["hyper_parameters"]["init_args"]["model"]["init_args"]["config"]
            value = {
                "class_path": "orthotrain.models.CausalLM",
                "init_args": {"config": {**config, key: size}},
            }
            return use("load_network", place, place.save(with_description(place, "model", value)))

        def folder(place, key=key, size=size):
            model = place.copy("model", "bad")
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps({**config, key: size}))
            return Call([str(model), {}], entry="pretrained")

        words = (name, key, "model", "config", "values", "layers", "memory")
        odd = EITHER if key in ("max_position_embeddings", "rope_theta", "num_key_value_heads", "head_dim") else (2,)
        if key != "max_position_embeddings":
            yield Row(KIND, f"{name} {size}", "fit", own, odd, words)
            if size in (10**8, 1 << 40):
                yield Row(
                    KIND, f"{name} {size}", "plan", lambda place, own=own: own(place, command="plan"), EITHER, words
                )
        yield Row(KIND, f"{name} {size}", "load_network", described, odd)
        yield Row(KIND, f"{name} {size}", "pretrained", folder, odd)
