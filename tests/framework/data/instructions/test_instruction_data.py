"""`InstructionData` as a run uses it: sources, splits, batches, generation, checkpoints, a trainer."""

import gzip
import json
import logging

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import LlamaConfig, LlamaForCausalLM

from orthotrain.data import InstructionData, tokenizer_from_state
from orthotrain.data.instructions.stdlib_docstrings import functions_with_docstrings
from orthotrain.data.tokenizers import train_tokenizer
from orthotrain.errors import ConfigurationError

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
ROWS = [
    {"prompt": f"what follows {n}?", "response": f"{n + 1} follows {n}" + ", of course" * (n % 7)} for n in range(80)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of the same tokenizer without and with a chat template."""
    tokenizer = train_tokenizer([f"{row['prompt']} {row['response']} def return self" for row in ROWS], 300)
    root = tmp_path_factory.mktemp("tokenizers")
    tokenizer.save_pretrained(root / "plain")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(root / "chat")
    return root


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(path)


@pytest.fixture
def make_data(folders, rows_file):
    def make(kind="plain", **changes):
        settings = {"source": rows_file, "batch_size": 4, "max_length": 128, "val_fraction": 0.2}
        return InstructionData(str(folders / kind), **settings | changes)

    return make


def responses(data, batch):
    """The text of all labels that count in each sequence."""
    return [data.tokenizer.decode(labels[labels >= 0]) for labels in batch["labels"]]


@pytest.mark.parametrize("kind", ["plain", "chat"])
@pytest.mark.parametrize("packing", [False, True])
def test_every_response_is_trained_or_validated(kind, packing, make_data):
    data = make_data(kind, packing=packing, batch_size=1)
    data.setup("fit")
    end = data.tokenizer.eos_token
    seen = {}
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        texts = [text for batch in loader for text in responses(data, batch)]
        seen[split] = sorted(part for text in texts for part in text.split(end) if part)
    assert sorted(seen["train"] + seen["val"]) == sorted(row["response"] for row in ROWS)
    assert 5 < len(seen["val"]) < 30
    assert (data.rows_used, data.rows_dropped) == (80, 0)


def test_the_split_depends_on_content_and_seed_only(make_data, tmp_path):
    def validation(**changes):
        data = make_data(**changes)
        data.setup("validate")
        return sorted(text for batch in data.val_dataloader() for text in responses(data, batch))

    backwards = tmp_path / "backwards.json"
    backwards.write_text(json.dumps(ROWS[::-1]))
    assert validation() == validation(source=str(backwards))
    assert validation() != validation(seed=1)


def test_all_formats_hold_the_same_rows(make_data, tmp_path):
    import pyarrow
    import pyarrow.parquet

    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}]}
        for r in ROWS
    ]
    renamed = [{"q": row["prompt"], "a": row["response"]} for row in ROWS]
    (tmp_path / "chats.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, chats)).encode()))
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    (tmp_path / "renamed.jsonl").write_text("\n".join(map(json.dumps, renamed)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), tmp_path / "chats.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("not rows")
    (tmp_path / "folder" / "rows.json").write_text(json.dumps(ROWS))
    sources = ["chats.jsonl.gz", "chats.json", "chats.parquet", "rows.parquet", "folder", "chats.js*n", "renamed.jsonl"]

    def first_batch(**changes):
        data = make_data("chat", **changes)
        data.setup("fit")
        return next(iter(data.train_dataloader()))["labels"]

    expected = first_batch()
    for name in sources:
        columns = {"prompt_column": "q", "response_column": "a"} if name == "renamed.jsonl" else {}
        assert torch.equal(first_batch(source=str(tmp_path / name), **columns), expected), name
    half = {"source": [str(tmp_path / "rows.parquet")], "val_source": str(tmp_path / "chats.json")}
    data = make_data("chat", **half)
    data.setup("fit")
    assert data.rows_used == 160
    assert sum(len(batch["labels"]) for batch in data.val_dataloader()) == 80


def test_a_hub_dataset(make_data, monkeypatch):
    import datasets

    calls = []

    def load_dataset(path, config, split, streaming):
        calls.append((path, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = make_data(source="org/name", val_source="org/name:main@test[:50%]")
    data.setup("fit")
    assert calls == [("org/name", None, "train"), ("org/name", "main", "test[:50%]")]
    assert data.rows_used == 160


def test_dropped_rows_are_reported_in_one_line(make_data, caplog):
    data = make_data(max_length=20)
    with caplog.at_level(logging.INFO):
        data.setup("fit")
    lines = [record.getMessage() for record in caplog.records if "rows used" in record.getMessage()]
    assert len(lines) == 1
    assert f"{data.rows_used} rows used, {data.rows_dropped} dropped; the longest has" in lines[0]
    assert f"{data.rows_dropped} dropped as too long for max_length 20" in lines[0]
    assert data.rows_used + data.rows_dropped == 80
    assert data.rows_dropped > 0


def test_generation_batches_hold_prompts_and_references(make_data):
    data = make_data("chat", generation_samples=6)
    data.setup("validate")
    batches = data.generation_batches()
    assert [len(batch["references"]) for batch in batches] == [4, 2]
    answers = {row["prompt"]: row["response"] for row in ROWS}
    for batch in batches:
        for tokens, mask, reference in zip(*batch.values(), strict=True):
            prompt = data.tokenizer.decode(tokens[mask.bool()])
            question = prompt.removeprefix("<user>\n").removesuffix("\n<assistant>\n")
            assert answers[question] == reference
    with pytest.raises(ConfigurationError, match="there is no test split; set test_source"):
        data.generation_batches("test")


def test_predict_gives_prompts_one_by_one(make_data, rows_file):
    data = make_data(test_source=rows_file, generation_samples=5)
    data.setup("predict")
    batches = list(data.predict_dataloader())
    assert [batch["references"] for batch in batches] == [[ROWS[n]["response"]] for n in (0, 19, 39, 59, 79)]
    assert all(batch["attention_mask"].all() for batch in batches)
    assert sum(len(batch["labels"]) for batch in data.test_dataloader()) == 80


def test_the_state_carries_the_tokenizer(make_data, folders, tmp_path):
    data = make_data("chat")
    data.setup("fit")
    path = tmp_path / "run.ckpt"
    torch.save({"InstructionData": data.state_dict(), "state_dict": {"weight": torch.ones(2)}}, path)
    state = torch.load(path, weights_only=True)["InstructionData"]
    assert data.vocab_size == 300
    assert tokenizer_from_state(state).encode("what follows") == data.tokenizer.encode("what follows")
    again = InstructionData(str(path), data.hparams.source)
    again.load_state_dict(state)
    again.setup("fit")
    assert again.tokenizer.chat_template == CHAT_TEMPLATE
    assert again.tokenizer_fingerprint == data.tokenizer_fingerprint
    plain = make_data("plain")
    plain.setup("fit")
    with pytest.raises(ConfigurationError, match="its chat template differs from the checkpoint's"):
        plain.load_state_dict(state)


def test_another_tokenizer_is_refused(make_data, tmp_path):
    data = make_data()
    data.setup("fit")
    train_tokenizer(["something else entirely, something else"], 270).save_pretrained(tmp_path)
    other = InstructionData(str(tmp_path), data.hparams.source)
    other.load_state_dict(data.state_dict())
    with pytest.raises(ConfigurationError, match="differs from the checkpoint's"):
        other.setup("fit")


class Finetuning(L.LightningModule):
    """A tiny Llama that remembers what it saw."""

    def __init__(self):
        super().__init__()
        config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **config))
        self.seen, self.losses = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].tolist())
        masks = {name: batch[name] for name in ("attention_mask", "position_ids") if name in batch}
        logits = self.model(batch["input_ids"], **masks).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, batch_idx):
        assert (batch["labels"] >= 0).any()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def fit(data, steps, folder=None, ckpt_path=None, **options):
    torch.manual_seed(0)
    module = Finetuning()
    if folder is not None:
        options["callbacks"] = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_steps=steps, enable_checkpointing=folder is not None, **quiet | options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_resumes_mid_epoch_bit_for_bit(packing, make_data, tmp_path):
    options = {"packing": packing, "batch_size": 2}
    whole = fit(make_data(**options), 9, tmp_path)
    for place in (3, 7):
        rest = fit(make_data(**options), 9, ckpt_path=tmp_path / f"step={place}.ckpt")
        assert rest.seen == whole.seen[place:]
        assert rest.losses == whole.losses[place:]
    assert whole.losses[-1] < whole.losses[0]


@pytest.mark.parametrize("packing", [False, True])
def test_overfitting_repeats_its_batches(packing, make_data):
    module = fit(make_data(packing=packing), 4, overfit_batches=2)
    assert module.seen[:2] == module.seen[2:]
    assert len(module.seen[0]) == 4


def test_predict_and_validate_run_through_a_trainer(make_data):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(**quiet, enable_checkpointing=False)
    data, module = make_data("chat", generation_samples=3), Finetuning()
    module.predict_step = lambda batch, batch_idx: batch["references"]
    references = [answer for answers in trainer.predict(module, data) for answer in answers]
    assert len(set(references)) == 3
    assert set(references) <= {row["response"] for row in ROWS}
    trainer.validate(module, data, verbose=False)


def test_functions_become_pairs():
    module = b'''
class A:
    async def area(self, width, height):
        """Multiply the sides
        of the rectangle.

        More about it.
        """
        result = width * height
        return result

def on_one_line(): "This docstring has no line of its own."

def only_docstring():
    """This function does nothing at all."""

def without(a):
    b = a
    return b
'''
    source = "async def area(self, width, height):\n    result = width * height\n    return result"
    assert list(functions_with_docstrings(module)) == [("area", source, "Multiply the sides of the rectangle.")]
    assert list(functions_with_docstrings(b"print 'old'")) == []
