"""Which model types of transformers work: POET and OFT on a tiny network of each, from its configuration class alone.

    nice -n 19 .venv/bin/python tests/benchmarks/model_types.py            # every type; writes the results
    .venv/bin/python tests/benchmarks/model_types.py llama bert            # these alone, printed
    .venv/bin/python tests/benchmarks/model_types.py llama bert --write    # their rows of the results anew

POET: 3 steps with a merge, export, reload. OFT: 3 steps, the merged model and the PEFT adapter, both reloaded. The
outputs before and after must differ by less than 1e-4 of the largest. Where a network is refused with a remedy, the
remedy is followed and written down. The results go to tests/benchmarks/results/model_types.json.
"""

import argparse
import contextlib
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
from peft import PeftModel
from torch.utils.data import DataLoader

from orthotrain.adapters import export_peft
from orthotrain.errors import ConfigurationError
from orthotrain.export import export_huggingface
from orthotrain.modules import OftLayers, OftModule, Optimization, PoetLayers, PoetModule

RESULTS = Path(__file__).parent / "results/model_types.json"
MOST_REMEDIES = 12
TOLERANCE = 1e-4

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 64, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "num_labels": 3,
}  # fmt: skip
"""Keys that a configuration gets if it has them; a type may change them below."""

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IMAGES = {"image_size": 32, "patch_size": 8}
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("CausalLM", {}) for name in (
        "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "gpt_neox",
        "stablelm", "bloom", "starcoder2", "olmo", "olmo2", "cohere", "granite", "smollm3", "glm", "nemotron", "biogpt",
        "xglm", "mamba", "gpt2", "falcon", "mpt", "bert", "roberta", "electra", "rembert",
    )},
    "gptj": ("CausalLM", {"rotary_dim": 8}),
    "codegen": ("CausalLM", {"rotary_dim": 8}),
    "opt": ("CausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "gpt_neo": ("CausalLM", {"attention_types": [[["global", "local"], 1]]}),
    "mixtral": ("CausalLM", EXPERTS),
    "qwen2_moe": ("CausalLM", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("CausalLM", EXPERTS),
    "olmoe": ("CausalLM", EXPERTS),
    "gpt_oss": ("CausalLM", EXPERTS),
    "deepseek_v3": ("CausalLM", {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8,
    }),
    "llama4_text": ("CausalLM", {**EXPERTS, "intermediate_size_mlp": 64, "interleave_moe_layer_step": 2}),
    "t5": ("Seq2SeqLM", {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
                        "decoder_start_token_id": 0}),
    "bart": ("Seq2SeqLM", {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2,
    }),
    "whisper": ("SpeechSeq2Seq", {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_source_positions": 32, "num_mel_bins": 16,
        "decoder_start_token_id": 1, "max_target_positions": 32,
    }),
    **{name: ("SequenceClassification", {}) for name in ("distilbert", "albert", "deberta-v2", "modernbert")},
    **{name: ("ImageClassification", IMAGES) for name in ("vit", "dinov2")},
    "swin": ("ImageClassification", {**IMAGES, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2],
                                     "window_size": 4}),
    "resnet": ("ImageClassification", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}),
    "clip": ("", {
        "projection_dim": 32,
        "text_config": {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim", "num_labels")},
        "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                          **IMAGES},
    }),
    "wav2vec2": ("AudioClassification", {
        "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 32,
        "mask_time_prob": 0.0, "apply_spec_augment": False,
    }),
    "llava": ("ImageTextToText", {
        "image_token_index": 90, "image_token_id": 90, "vision_feature_layer": -1,
        "text_config": {**{k: v for k, v in SIZES.items() if k != "num_labels"}, "model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64,
                          "num_hidden_layers": 1, "num_attention_heads": 4, **IMAGES},
    }),
}  # fmt: skip
"""Model type -> the task of its auto class, and the keys of its configuration."""


def network_of(name: str, more: dict[str, Any]) -> Any:
    """Return a tiny network of a model type, with the same values at every call."""
    kind = transformers.CONFIG_MAPPING[name]
    task, keys = TYPES[name]
    names, known = kind().attribute_map, {*kind().to_dict(), *kind().attribute_map, "num_labels"}
    sizes = {key: value for key, value in SIZES.items() if key in known and names.get(key) not in keys}
    keys = {key: value for key, value in keys.items() if key in known or keys is not EXPERTS}
    torch.manual_seed(0)
    config = kind(**{**(sizes if "text_config" not in keys else {}), **keys, **more})
    auto = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel")
    return auto.from_config(config)


def batch_of(name: str, network: Any) -> dict[str, Any]:
    """Return two rows of what the network takes, with labels."""
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 90, (2, 12), generator=draws)
    images = torch.randn(2, 3, 32, 32, generator=draws)
    task = TYPES[name][0]
    if task in ("CausalLM", "Seq2SeqLM"):
        return {"input_ids": tokens, "labels": tokens}
    if task == "SpeechSeq2Seq":
        return {"input_features": torch.randn(2, 16, 64, generator=draws), "labels": tokens}
    if task == "ImageTextToText":
        text = torch.cat([torch.full((2, 16), 90), tokens], 1)  # a token for each patch
        return {"input_ids": text, "pixel_values": images, "labels": text}
    if task == "ImageClassification":
        return {"pixel_values": images, "labels": torch.tensor([0, 2])}
    if task == "AudioClassification":
        return {"input_values": torch.randn(2, 400, generator=draws), "labels": torch.tensor([0, 2])}
    if task == "SequenceClassification":
        return {"input_ids": tokens, "labels": torch.tensor([0, 2])}
    return {"input_ids": tokens, "pixel_values": images, "return_loss": True}


class PoetWithModelLoss(PoetModule):
    """POET on the network's own loss."""

    def loss(self, batch: Any) -> torch.Tensor:
        """Return the network's own loss."""
        return self(**batch).loss


def train(name: str, method: str, followed: dict[str, Any]) -> L.LightningModule:
    """Train a network of a type for 3 steps and return the module."""
    network = network_of(name, followed.get("config", {}))
    patterns = {key: followed[key] for key in ("include", "exclude") if key in followed}
    batch, rate = batch_of(name, network), Optimization(lr=1e-2)
    module: L.LightningModule
    if method == "POET":
        kind = PoetModule if TYPES[name][0] == "CausalLM" else PoetWithModelLoss
        module = kind(network, PoetLayers(8, init="keep", **patterns), merge_every=2, optimization=rate)
        if kind is PoetModule:
            batch = {"input_ids": batch["input_ids"][:, :-1], "labels": batch["labels"][:, 1:]}
    else:
        module = OftModule(network, OftLayers(8, **patterns), rate, objective="model", max_new_tokens=0)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tempfile.gettempdir(),
    )  # fmt: skip
    trainer.fit(module, DataLoader([batch] * 3, batch_size=None))
    return module


def outputs(network: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return the logits of a network in evaluation mode."""
    with torch.no_grad():
        found = network.eval()(**batch)
    return found["logits"] if "logits" in found else found["logits_per_image"]


def compare(name: str, method: str, followed: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train, export and reload; return the result, and the differences of the outputs relative to the largest."""
    torch.manual_seed(1)
    module: Any = train(name, method, followed)
    batch = batch_of(name, module.model)
    expected, base = outputs(module.model, batch), network_of(name, followed.get("config", {}))
    if not bool((expected != outputs(base, batch)).any()):
        raise AssertionError("training has changed nothing")
    experts = any(p.ndim == 3 and len(p) > 1 for n, p in base.named_parameters() if "conv" not in n)
    loaded, found = {}, {"experts": "not rotated"} if experts and "expert" in str(list(base.state_dict())) else {}
    if method == "OFT":
        try:
            export_peft(module.model, folder / "peft")
            loaded["peft"] = outputs(PeftModel.from_pretrained(base, folder / "peft"), batch)
        except (RuntimeError, ConfigurationError) as error:  # of a layer of PEFT, or for want of one
            if isinstance(error, ConfigurationError) and "PEFT's OFT has no layer" not in str(error):
                raise
            found["peft"] = str(error).splitlines()[0]
    kind = type(module.model)
    loaded["merged"] = outputs(kind.from_pretrained(export_huggingface(module.model, folder / "merged")), batch)
    off = {how: float((logits - expected).abs().max() / expected.abs().max()) for how, logits in loaded.items()}
    result = "passes" if max(off.values()) < TOLERANCE else "differs"
    return {"result": result, "off": {how: float(f"{x:.1e}") for how, x in off.items()}, **found}


def remedied(message: str, method: str, followed: dict[str, Any]) -> dict[str, Any] | None:
    """Return the settings that follow what a refusal says to do; None if it says nothing new."""
    excluded = "exclude", followed.get("exclude", {"POET": PoetLayers, "OFT": OftLayers}[method]().exclude)
    for key, before, shape in (
        (*excluded, r"add '([^']+)' to exclude"),
        (*excluded, r"exclude such layers, for example '([^']+)'"),
        (*excluded, r"^layer ([^\s:]+).*(?:exclude|block_size)"),
        (
            "include",
            followed.get("include", []),
            r"OFT also rotates convolutions that include names, such as '([^']+)'",
        ),
    ):
        if (found := re.search(shape, message)) and not (key == "include" and method == "POET"):
            last = f"*{found[1].rpartition('.')[2]}" if key == "include" else re.sub(r"\.\d+\.", ".*.", found[1])
            return None if last in before else {**followed, key: [*before, last]}
    if "is_decoder: true" in message and "config" not in followed:
        return {**followed, "config": {"is_decoder": True}}
    return None


def tried(name: str, method: str) -> dict[str, Any]:
    """Return the result of a method on a model type: ``passes``, ``refused`` or ``fails``, and what was followed."""
    followed: dict[str, Any] = {}
    messages: list[str] = []
    for _ in range(MOST_REMEDIES):
        try:
            with tempfile.TemporaryDirectory() as folder:
                return {"followed": followed, **compare(name, method, followed, Path(folder))}
        except ConfigurationError as error:
            messages.append(str(error))
            again = remedied(str(error), method, followed)
            if again is None:
                break
            followed = again
        except Exception as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            return {"result": "fails", "followed": followed, "message": f"{type(error).__name__}: {line[:200]}"}
    # the last message may only say that nothing is left after the remedies
    message = next((text for text in messages if "OFT also rotates" in text), messages[0])
    return {"result": "refused", "followed": {}, "message": message}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the warnings of libraries inside the ``with`` block."""
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> None:
    """Try the named types, or all; print them, and write them if they are all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; none for all")
    parser.add_argument("--write", action="store_true", help="write the rows of the named types")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text())["results"] if options.types else {}
    for name in options.types or TYPES:
        with quiet():
            results[name] = {method: tried(name, method) for method in ("POET", "OFT")}
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    if options.write or not options.types:
        document = {"transformers": transformers.__version__, "results": {name: results[name] for name in TYPES}}
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
