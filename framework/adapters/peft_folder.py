"""Reads and writes PEFT's folder of an OFT adapter: its files, its settings, and how they are checked.

PEFT 0.18 to 0.21 write ``adapter_config.json`` and ``adapter_model.safetensors``. The name of a tensor of generators is
``base_model.model.<layer>.oft_R.weight`` (``oft_embedding_R`` for an embedding). It has one row of ``b(b-1)/2`` values
for each block: the strict upper triangle, row by row, as in orthotrain.
"""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from orthotrain.adapters.state import read_safetensors
from orthotrain.console.progress import writing
from orthotrain.errors import ConfigurationError
from orthotrain.files.paths import read_json
from orthotrain.models.folder import new_folder

CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
FORMAT_VERSION = "0.18.0"
"""The first PEFT release that reads these files as the present releases do."""

_CHECKSUM = "orthotrain.sha256"
_MOST_TERMS = 100
_IGNORED = {"task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "r", "oft_block_size",
           "target_modules", "fan_in_fan_out", "exclude_modules", "init_weights", "layers_to_transform",
           "layers_pattern"}  # fmt: skip
"""Settings that do not change the function of the tensors in the file."""


@dataclass(frozen=True)
class PeftSettings:
    """The settings of PEFT's ``OFTConfig`` that decide which rotations its generators give, with PEFT's defaults.

    Args:
        use_cayley_neumann: Whether PEFT uses the Cayley-Neumann series. Otherwise it uses the exact Cayley transform,
            which is the transpose of orthotrain's.
        num_cayley_neumann_terms: Terms of the series: 3, 4, 5, 6, ... terms are the orders 2, 2, 3, 4, ...
        coft: Whether every forward projects the generators to the bound ``eps``.
        eps: Bound of the Frobenius norm of a block, times the root of the number of rows of generators.
        block_share: Whether all blocks have the same row of generators.
        module_dropout: Probability of block dropout. PEFT 0.21 stores it and does not apply it.
    """

    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    module_dropout: float = 0.0

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PeftSettings":
        """Return the settings in a parsed ``adapter_config.json``.

        Raises:
            ConfigurationError: A value has a wrong type, or orthotrain has no rotation for it.
        """
        values = {name: config.get(name, default) for name, default in asdict(cls()).items()}
        for name, default in asdict(cls()).items():
            kinds = (int, float) if isinstance(default, float) else (type(default),)
            if not isinstance(values[name], kinds) or (isinstance(values[name], bool) and bool not in kinds):
                raise ConfigurationError(f"{CONFIG_FILE}: {name}={values[name]!r} is not a {type(default).__name__}")
        settings = cls(**values)
        if settings.use_cayley_neumann:
            _check_series(settings.num_cayley_neumann_terms, config.get("peft_version"))
        if settings.coft and not 0 < settings.eps < math.inf:
            raise ConfigurationError(f"{CONFIG_FILE}: eps={settings.eps!r}: COFT needs a positive bound")
        return settings

    def parameterization(self) -> dict[str, Any]:
        """Return the description of the parameterization of orthotrain that gives the same rotations."""
        if not self.use_cayley_neumann:
            return {"class_path": "cayley", "init_args": {}}
        return {"class_path": "cayley_neumann", "init_args": {"order": max(self.num_cayley_neumann_terms, 4) - 2}}


def _check_series(terms: int, version: Any) -> None:
    if not 3 <= terms <= _MOST_TERMS:
        raise ConfigurationError(
            f"{CONFIG_FILE}: num_cayley_neumann_terms={terms}: 3 to {_MOST_TERMS} can be loaded; with fewer terms "
            "PEFT's series is I or I + 2Q, not a rotation"
        )
    found = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if found is None or (int(found[1]), int(found[2])) < (0, 18):
        raise ConfigurationError(
            f"{CONFIG_FILE}: peft_version={version!r}: PEFT 0.18 changed its Cayley-Neumann series, so that these "
            "generators would give other rotations; merge the adapter with the PEFT release that trained it"
        )


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an OFT adapter. No code from the folder is run.

    Args:
        folder: Folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        The parsed configuration, and the tensors on the CPU by their names in the file.

    Raises:
        ConfigurationError: A file is missing, damaged or a pickle, or orthotrain cannot represent the adapter.
    """
    folder = Path(folder)
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not config_path.is_file():
        raise ConfigurationError(f"{str(folder)!r} has no {CONFIG_FILE}: name the folder that save_pretrained wrote")
    if not weights_path.is_file():
        if (folder / PICKLE_FILE).exists():
            raise ConfigurationError(
                f"{str(folder)!r} has {PICKLE_FILE}, a pickle, which can run code and is never read: save the adapter "
                f"again with safe_serialization=True, as {WEIGHTS_FILE}"
            )
        raise ConfigurationError(f"{str(folder)!r} has no {WEIGHTS_FILE}")
    config = read_json(config_path, "adapter settings")
    _check_config(config)
    tensors, metadata = read_safetensors(weights_path)
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.float()).all()):
            raise ConfigurationError(f"{str(weights_path)!r}: {name} holds values that are not finite")
    checksum = metadata.get(_CHECKSUM)
    if checksum is not None and checksum != _digest(PeftSettings.from_config(config), tensors):
        raise ConfigurationError(f"{str(folder)!r} is damaged: its settings or tensors have changed")
    return config, tensors


def _check_config(config: Any) -> None:
    if not isinstance(config, dict):
        raise ConfigurationError(f"{CONFIG_FILE} is not a dictionary of settings")
    kind, bias = config.get("peft_type"), config.get("bias", "none")
    if kind != "OFT":
        raise ConfigurationError(f"{CONFIG_FILE}: peft_type={kind!r}: only OFT adapters can be loaded")
    if bias != "none":
        raise ConfigurationError(f"{CONFIG_FILE}: bias={bias!r}: only adapters without trained biases can be loaded")
    known = _IGNORED | {"peft_type", "peft_version", "bias", "modules_to_save"} | set(asdict(PeftSettings()))
    unknown = sorted(key for key in config if key not in known and config[key] not in (None, False, [], {}))
    if unknown:
        raise ConfigurationError(f"{CONFIG_FILE}: unknown setting {unknown[0]}={config[unknown[0]]!r}")
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise ConfigurationError(f"{CONFIG_FILE}: modules_to_save={saved!r} is not a list of names")


def card(base: str | None, storage: str | None) -> str:
    """Return the model card of an adapter: the settings of PEFT have no place for the quantization of the base.

    Args:
        base: Name or path of the base.
        storage: Description of the quantization that the base had in training; None for none.
    """
    lines = ["---", "library_name: peft", *([f"base_model: {json.dumps(base)}"] if base else []), "---", ""]
    lines += ["# OFT adapter", "", "Trained with orthotrain.", "", "## Quantization of the base in training", ""]
    if storage is None:
        return "\n".join([*lines, "None.", ""])
    lines += [f"The base was {storage}. Load the base in the same format: with full weights the results differ."]
    if storage.startswith("in nf4 with groups of 64") and " and " not in storage:
        lines += [
            "",
            "```python",
            'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            f"bnb_4bit_use_double_quant={'scales' in storage})",
            "```",
        ]
    else:
        lines += ["", "transformers has no such format: merge the adapter in orthotrain for the same results."]
    return "\n".join([*lines, ""])


def write_folder(
    folder: Path, config: dict[str, Any], settings: PeftSettings, tensors: dict[str, Tensor], readme: str
) -> None:
    """Write an adapter folder atomically, with a checksum of the settings and tensors.

    Raises:
        ConfigurationError: The folder exists and is not empty.
    """
    config = {**config, **asdict(settings), "peft_type": "OFT", "peft_version": FORMAT_VERSION, "bias": "none"}
    metadata, total = {"format": "pt", _CHECKSUM: _digest(settings, tensors)}, sum(t.nbytes for t in tensors.values())
    with new_folder(folder) as partial, writing("writing the adapter", partial, total):
        (partial / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
        (partial / "README.md").write_text(readme, encoding="utf-8")
        save_file(tensors, partial / WEIGHTS_FILE, metadata=metadata)


def _digest(settings: PeftSettings, tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def nearest_divisor(width: int, size: int) -> int:
    """Return PEFT's block size for a requested ``size``: the nearest divisor of the width, the smaller one of two."""
    return min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: (abs(d - size), d))
