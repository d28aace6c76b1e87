"""A config that trains on the small corpus in seconds; processes that live until they are killed."""

import os
import signal

import pytest
import torch
import yaml
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast


@pytest.fixture
def small_config(tmp_path, corpus):
    """Overrides of pretrain/poet_quickstart.yaml: tiny network, few steps, everything under ``tmp_path``."""
    run = tmp_path / "run"
    network = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = {
        "trainer": {
            "accelerator": "cpu",
            "precision": "32-true",
            "max_steps": 6,
            "val_check_interval": 3,
            "limit_val_batches": 2,
            "num_sanity_val_steps": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "default_root_dir": str(run),
            "logger": [
                {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": str(run), "name": "", "version": ""},
                }
            ],
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"every_n_train_steps": 2, "save_last": True, "filename": "best"},
                },
                {"class_path": "RunReport", "init_args": {"sample_tokens": 4}},
            ],
        },
        "model": {
            "init_args": {
                "merge_every": 2,
                "layers": {"block_size": 8},
                "model": {"init_args": {"config": {**network, "vocab_size": 320, "max_position_embeddings": 64}}},
            }
        },
        "data": {
            "init_args": {
                "source": str(corpus),
                "vocab_size": 320,
                "sequence_length": 32,
                "batch_size": 4,
                "cache_dir": str(tmp_path.parent / "cache"),
                "val_fraction": 0.2,
                "test_fraction": 0.2,
            }
        },
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def forked():
    """Fork a process that calls a function and then lives until it is killed; gives its number after the call."""
    started = []

    def fork(act):
        done, stays = os.pipe(), os.pipe()
        if (pid := os.fork()) == 0:
            try:
                os.close(stays[1])
                act()
                os.write(done[1], b"x")
                os.read(stays[0], 1)
            finally:
                os._exit(1)
        os.close(done[1]), os.close(stays[0])
        started.append((pid, stays[1]))
        os.read(done[0], 1)
        os.close(done[0])
        return pid

    yield fork
    for pid, descriptor in started:
        os.close(descriptor)
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


@pytest.fixture
def killed(forked):
    """Let a process call a function, then kill it; a number in the place of the function is that of a forked one."""

    def kill(act):
        pid = act if isinstance(act, int) else forked(act)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the function has failed in the forked process"

    return kill


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A folder with a BERT of one layer without a head, and its tokenizer of letters and a few pieces of words."""
    folder = tmp_path_factory.mktemp("bert")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,-"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters), "good", "bad", "film", "##s"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", special)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    return folder
