"""A config that trains on the small corpus in seconds."""

import pytest
import yaml


@pytest.fixture
def small_config(tmp_path, corpus):
    """Overrides of the quickstart: tiny network, few steps, everything under ``tmp_path``."""
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
