"""Adapters, PEFT folders, model folders and tokenizers with values that lie."""

import json
import struct
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from hostile import pickles
from hostile.rows import EITHER, Call, Place, Row
from hostile.text_bombs import DEEP

KIND = "folder"
ODD = {
    "none": None, "-1": -1, "2^70": 1 << 70, "text": "x", "list": [], "dictionary": {}, "true": True,
    "nan": float("nan"), "nested": [[[1], {}]], "escape": "\x1b]0;owned\x07\x1b[2J\u202e",
    "path": "../../canary/a.txt", "class": "os.system",
}  # fmt: skip
PEFT_KEYS = (
    "peft_type", "oft_block_size", "r", "target_modules", "modules_to_save", "bias", "eps",
    "num_cayley_neumann_terms", "module_dropout", "base_model_name_or_path", "coft", "block_share", "auto_mapping",
    "peft_version", "task_type", "unknown",
)  # fmt: skip
MODEL_KEYS = (
    "model_type", "architectures", "auto_map", "dtype", "quantization_config", "rope_parameters", "hidden_act",
    "num_attention_heads", "vocab_size", "tie_word_embeddings", "transformers_version", "_name_or_path",
    "pad_token_id", "rms_norm_eps", "attn_implementation", "layer_types",
)  # fmt: skip


WORDS = ("bad", "adapter", "generators")


def _json(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)))


def _keyed(
    copied: str, name: str, key: str, value: Any, call: Callable[[Place, Path], Call]
) -> Callable[[Place], Call]:
    def make(place: Place) -> Call:
        folder = place.copy(copied, "bad")
        _json(folder / name, lambda content: {**content, key: value})
        return call(place, folder)

    return make


def peft(place: Place, folder: Path) -> Call:
    """Load a PEFT folder."""
    return Call([str(place.good.model), str(folder)], entry="import_peft")


def model(place: Place, folder: Path) -> Call:
    """Load a model folder."""
    return Call([str(folder), {}], entry="pretrained")


def tokenizer(place: Place, folder: Path) -> Call:
    """Finetune with the tokenizer of a folder."""
    return Call(["fit", "-c", place.config("finetune", {"data.init_args.tokenizer": str(folder)})])


def rows() -> Iterator[Row]:
    """Single values, then whole files."""
    some = cycle(ODD)
    for key in PEFT_KEYS:
        for name in (next(some), next(some)):
            make = _keyed("peft", "adapter_config.json", key, ODD[name], peft)
            yield Row(KIND, f"peft {key} is {name}", "import_peft", make, EITHER, WORDS)
    for key in MODEL_KEYS:
        for name in (next(some), next(some)):
            make = _keyed("model", "config.json", key, ODD[name], model)
            yield Row(KIND, f"model {key} is {name}", "pretrained", make, EITHER)
    for key in (
        "tokenizer_class",
        "eos_token",
        "chat_template",
        "added_tokens_decoder",
        "auto_map",
        "model_max_length",
        "extra_special_tokens",
    ):
        name = next(some)
        yield Row(
            KIND,
            f"tokenizer {key} is {name}",
            "tokenizer",
            _keyed("model", "tokenizer_config.json", key, ODD[name], tokenizer),
            EITHER,
        )
    for key in ("model", "pre_tokenizer", "decoder", "added_tokens", "normalizer", "post_processor", "version"):
        name = next(some)
        yield Row(
            KIND,
            f"tokenizer.json {key} is {name}",
            "tokenizer",
            _keyed("model", "tokenizer.json", key, ODD[name], tokenizer),
            EITHER,
        )
    yield from file_rows()
    yield from index_rows()
    yield from tensor_rows()


def file_rows() -> Iterator[Row]:
    """JSON files of which nothing is right."""
    files = {
        "adapter_config.json": ("peft", peft), "config.json": ("model", model),
        "tokenizer.json": ("model", tokenizer), "tokenizer_config.json": ("model", tokenizer),
        "model.safetensors.index.json": ("model", model),
    }  # fmt: skip
    texts = {
        "lists in lists": "[" * DEEP, "dictionaries": '{"a":' * DEEP, "a list": "[1]", "text": '"x"',
        "a number": "9" * 5000, "nothing": "", "NUL": "\0" * 64, "not UTF-8": b'{"a": "\xff"}', "null": "null",
        "twice": "{}{}", "surrogates": '{"\\ud800": 1}', "NaN": "NaN",
    }  # fmt: skip
    for file, (copied, call) in files.items():
        for name, text in texts.items():

            def whole(place, copied=copied, call=call, file=file, text=text):
                folder = place.copy(copied, "bad")
                (folder / file).write_bytes(text.encode() if isinstance(text, str) else text)
                return call(place, folder)

            if (len(name) + len(file)) % 2 or name == "lists in lists":
                command = {peft: "import_peft", model: "pretrained", tokenizer: "tokenizer"}[call]
                yield Row(
                    KIND,
                    f"{file} is {name}",
                    command,
                    whole,
                    EITHER if file == "tokenizer_config.json" else (2,),
                    WORDS,
                )


def index_rows() -> Iterator[Row]:
    """Indexes of weight files that name files elsewhere."""
    names = {
        "upwards": "../canary/a.txt", "absolute": "/etc/passwd", "zeros": "zeros", "pickle": "pytorch_model.bin",
        "url": "https://127.0.0.1:9/x.safetensors", "number": 3, "itself": "model.safetensors.index.json",
        "fifo": "fifo", "escape": "\x1b[2Jx.safetensors",
    }  # fmt: skip
    for name, target in names.items():

        def indexed(place, target=target):
            folder = place.copy("model", "bad")
            tensors = load_file(folder / "model.safetensors")
            (folder / "model.safetensors").unlink()
            (folder / "zeros").symlink_to("/dev/zero")
            torch.save({"x": pickles.Call(__import__("os").mkdir, str(place.sprung))}, folder / "pytorch_model.bin")
            index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, target)}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            return model(place, folder)

        yield Row(KIND, f"index names {name}", "pretrained", indexed)


HEADERS = {
    "length 2^63": struct.pack("<Q", 1 << 63) + b"{}", "length 2^40": struct.pack("<Q", 1 << 40) + b"{}",
    "deep": struct.pack("<Q", 20_000) + b'{"a":' * 4000, "no dictionary": struct.pack("<Q", 2) + b"[]",
    "a tensor of 2^40": b"HUGE", "overlap": b"OVERLAP", "NaN": b"NAN", "other shapes": b"SHAPE",
    "more tensors": b"MORE", "no tensors": b"NONE", "text": b"TEXT", "escapes": b"ESCAPE",
}  # fmt: skip


def _weights(path: Path, what: bytes) -> None:
    tensors = load_file(path)
    first = next(iter(tensors))
    changed = {
        b"NAN": {name: tensor * float("nan") for name, tensor in tensors.items()},
        b"SHAPE": {name: tensor[:1].clone() for name, tensor in tensors.items()},
        b"MORE": {**tensors, "more": torch.zeros(1)}, b"NONE": {"none": torch.zeros(0)},
        b"ESCAPE": {"\x1b]0;owned\x07\x1b[2J": torch.zeros(1)},
    }  # fmt: skip
    if what in changed:
        save_file(changed[what], path)
        return
    size = 1 << 40
    entry = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
    lies = {
        b"HUGE": {first: entry},
        b"OVERLAP": {name: {"dtype": "F32", "shape": [1],
    "data_offsets": [0, 4]} for name in tensors},
        b"TEXT": {first: {"dtype": "os.system", "shape": "x", "data_offsets": None}},
    }  # fmt: skip
    header = json.dumps(lies[what]).encode() if what in lies else b""
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64) if header else what)


def tensor_rows() -> Iterator[Row]:
    """Tensor files that lie about their size, their shapes and their values."""
    for (name, what), turn in zip(HEADERS.items(), cycle(range(3))):

        def weights(place, what=what):
            folder = place.copy("model", "bad")
            _weights(folder / "model.safetensors", what)
            return model(place, folder)

        def adapter(place, what=what):
            path = place.copy("adapter", "bad.safetensors")
            _weights(path, what)
            return Call([str(place.good.model), str(path)], entry="load_adapter")

        def in_peft(place, what=what):
            folder = place.copy("peft", "bad")
            _weights(folder / "adapter_model.safetensors", what)
            return peft(place, folder)

        fitting = what in (b"SHAPE", b"MORE", b"NONE", b"NAN", b"ESCAPE")
        if turn != 0 or fitting:
            yield Row(KIND, f"adapter of {name}", "load_adapter", adapter, names=("bad", "finite"))
        if turn != 1 or fitting:
            yield Row(KIND, f"peft weights of {name}", "import_peft", in_peft, names=WORDS)
        if turn != 2 or what in (b"NAN", b"ESCAPE"):
            yield Row(KIND, f"weights of {name}", "pretrained", weights, EITHER if fitting else (2,))
