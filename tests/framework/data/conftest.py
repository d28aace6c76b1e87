import random
from pathlib import Path

import pytest

from orthotrain.data import TextData


def _prose(generator: random.Random, words: int) -> str:
    syllables = ["ka", "to", "ri", "mu", "sen", "ola", "be", "nad", "é", "ß", "zu", "lin"]
    text = []
    for _ in range(words):
        text.append("".join(generator.choice(syllables) for _ in range(generator.randint(1, 4))))
    return " ".join(text) + "\n"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Sixty small documents in two folders."""
    root = tmp_path_factory.mktemp("corpus")
    generator = random.Random(7)
    for number in range(60):
        path = root / ("a" if number % 2 else "b") / f"{number:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(_prose(generator, 120), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_data(corpus, session_cache):
    """TextData over the small corpus, its cache shared by all tests that change nothing in it."""

    def make(**changes) -> TextData:
        settings = {
            "source": str(corpus),
            "vocab_size": 300,
            "sequence_length": 64,
            "batch_size": 4,
            "val_fraction": 0.15,
            "test_fraction": 0.15,
            "cache_dir": str(session_cache),
        }
        return TextData(**settings | changes)

    return make
