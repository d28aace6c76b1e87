"""From a pretrained checkpoint to an adapter and a merged model, by the command line alone."""

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orthotrain.adapters import import_peft
from orthotrain.checkpoints.reading import read_checkpoint
from orthotrain.cli.main import main
from orthotrain.export import load_network
from orthotrain.models import PretrainedModel

QUICK = ["-c", "finetune/quickstart.yaml"]


@pytest.fixture
def base(small_config, tmp_path):
    """A folder with a tiny model that `orthotrain fit` and `export` made."""
    main(["fit", "-c", "pretrain/poet_quickstart.yaml", "-c", str(small_config), "--trainer.max_steps", "2"])
    main(["export", "--ckpt", str(tmp_path / "run" / "checkpoints" / "last.ckpt"), "--out", str(tmp_path / "base")])
    return tmp_path / "base"


@pytest.fixture
def overrides(tmp_path):
    run = tmp_path / "finetune"
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(f'{{"prompt": "repeat {i}", "response": "{i} {i}"}}' for i in range(60)))
    config = {
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "max_steps": 6,
            "val_check_interval": 3,
            "limit_val_batches": 2,
            "num_sanity_val_steps": 1,
            "enable_progress_bar": False,
            "default_root_dir": str(run),
            "logger": False,
            "callbacks": [
                {"class_path": "RunReport", "init_args": {"prompt": "", "spectrum_layers": 1}},
                {
                    "class_path": "AdapterCheckpoint",
                    "init_args": {"every_n_steps": 2, "dirpath": str(run / "adapters")},
                },
            ],
        },
        "model": {"init_args": {"layers": {"block_size": 8}, "max_new_tokens": 4, "optimization": {"lr": 0.05}}},
        "data": {
            "init_args": {
                "source": str(rows),
                "max_length": 64,
                "val_fraction": 0.2,
                "generation_samples": 2,
                "batch_size": 4,
            }
        },
    }
    path = tmp_path / "finetune.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_adapter_and_merged_model_compute_the_same_elsewhere(base, overrides, tmp_path, capsys):
    source = ["--model.model", "PretrainedModel", "--model.model.name", str(base), "--data.tokenizer", str(base)]
    main(["fit", *QUICK, "-c", str(overrides), *source])
    printed = capsys.readouterr().out
    assert "validation rouge l" in printed and "validation token accuracy" in printed
    checkpoint = tmp_path / "finetune" / "adapters" / "step-000006" / "resume.ckpt"
    assert checkpoint.stat().st_size < (base / "model.safetensors").stat().st_size
    main(["export", "--ckpt", str(checkpoint), "--out", str(tmp_path / "merged")])
    main(["export", "--ckpt", str(checkpoint), "--out", str(tmp_path / "adapter"), "--format", "peft"])
    ids = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / "merged").encode("repeat 7\n7 7")])
    with torch.no_grad():
        expected = load_network(read_checkpoint(checkpoint))(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base)
        unadapted = plain(ids).logits
        adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")(ids).logits
    assert (unadapted - expected).abs().max() > 1e-3
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapted, expected, rtol=1e-5, atol=1e-5)
    main(["fit", *QUICK, "-c", str(overrides), *source, "--ckpt_path", str(checkpoint), "--trainer.max_steps", "8"])
    assert (tmp_path / "finetune" / "adapters" / "step-000008").is_dir()


def test_finetunes_the_checkpoint_of_a_pretraining_run(small_config, overrides, tmp_path):
    main(["fit", "-c", "pretrain/poet_quickstart.yaml", "-c", str(small_config), "--trainer.max_steps", "2"])
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    source = ["--model.model", "CheckpointModel", "--model.model.path", last, "--data.tokenizer", last]
    main(["fit", *QUICK, "-c", str(overrides), *source, "--trainer.max_steps", "2"])
    assert (tmp_path / "finetune" / "adapters" / "step-000002").is_dir()


def test_a_model_in_4_bits_of_which_some_layers_are_rotated_resumes_and_leaves(base, overrides, tmp_path):
    model = ["--model.model", "PretrainedModel", "--model.model.name", str(base), "--data.tokenizer", str(base)]
    some = [
        "--model.model.load_in_4bit",
        "true",
        "--model.model.dtype",
        "float32",
        "--model.layers.include",
        "['*q_proj']",
    ]
    command = ["fit", *QUICK, "-c", str(overrides), *model, *some]
    main(command)
    folder = tmp_path / "finetune" / "adapters"
    checkpoint = folder / "step-000004" / "resume.ckpt"  # after validations, which bitsandbytes would have repacked for
    whole = load_file(folder / "step-000006" / "adapter.safetensors")
    main([*command, "--ckpt_path", str(checkpoint)])
    resumed = load_file(folder / "step-000006" / "adapter.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert all(tensor.any() for tensor in whole.values())
    last = folder / "step-000006" / "resume.ckpt"
    main(["export", "--ckpt", str(last), "--out", str(tmp_path / "merged")])
    main(["export", "--ckpt", str(last), "--out", str(tmp_path / "half"), "--dtype", "float16"])
    main(["export", "--ckpt", str(last), "--out", str(tmp_path / "adapter"), "--format", "peft"])
    ids = torch.arange(20)[None]
    network = load_network(read_checkpoint(last))
    with torch.no_grad():
        expected = network(ids).logits
        torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, expected,
                                   rtol=1e-5, atol=1e-5)  # fmt: skip
        half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
        assert {p.dtype for p in half.parameters()} == {torch.float16}
        torch.testing.assert_close(half(ids).logits.float(), expected, rtol=2e-2, atol=2e-2)
    fresh = PretrainedModel(str(base), dtype="float32", load_in_4bit=True)().eval()
    import_peft(fresh, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(fresh(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_class_of_a_layer_chooses_its_oft_layer(small_config, tmp_path):
    config = yaml.safe_load(small_config.read_text())
    network = config["model"]["init_args"]["model"]["init_args"]
    layers = {"include": ["*q_proj", "*embed_tokens"], "block_size": 8}
    init_args = {"model": {"class_path": "CausalLM", "init_args": network}, "layers": layers}
    config["model"] = {"class_path": "OftModule", "init_args": init_args}
    config["data"]["class_path"] = "TextData"
    config["trainer"] |= {"max_steps": 2, "callbacks": config["trainer"]["callbacks"][:1]}
    path = tmp_path / "embedding.yaml"
    path.write_text(yaml.safe_dump(config))
    main(["fit", "-c", str(path)])
    state = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    rotated = {name: tensor for name, tensor in state.items() if name.endswith(".generators")}
    assert sorted(rotated) == [
        "model.model.embed_tokens.rotation_out.generators",
        "model.model.layers.0.self_attn.q_proj.rotation_in.generators",
    ]
    assert all(generators.any() for generators in rotated.values())
