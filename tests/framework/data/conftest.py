import os
import pickle
import random
import resource
import signal
from pathlib import Path

import numpy as np
import pytest

from orthotrain.data import TextData
from orthotrain.data.instructions.examples import EncodedExample
from orthotrain.data.instructions.token_rows import TokenRows

MEMORY_BYTES = 1_900 << 20
"""With the 1.1 GiB that importing the package maps, 3 GiB of address space."""


@pytest.fixture
def bounded():
    """Calls a function in a forked process with limits of memory and of 60 seconds, and returns what it returns."""

    def call(function, memory: int = MEMORY_BYTES, seconds: int = 60):
        reading, writing = os.pipe()
        if not (pid := os.fork()):
            try:
                mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (mapped + memory,) * 2)
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(seconds)
                try:
                    result = function()
                except BaseException as error:  # told to the test, whatever it is
                    result = f"{type(error).__name__}: {error}"
                os.write(writing, pickle.dumps(result))
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
        assert os.waitpid(pid, 0)[1] == 0, "ran out of time, or was killed"
        return pickle.loads(answer)

    return call


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


@pytest.fixture
def make_rows():
    """Makes rows of random tokens whose last third is the response; each row begins with its own number."""

    def make(lengths, vocabulary=64):
        generator, rows = np.random.default_rng(0), TokenRows()
        for number, length in enumerate(lengths):
            tokens = generator.integers(2, vocabulary, length + 1).tolist()
            tokens[0] = 2 + number % (vocabulary - 2)
            prompt = max(1, 2 * length // 3)
            rows.append(
                EncodedExample(tokens, [False] * prompt + [True] * (length + 1 - prompt), prompt), f"answer {number}"
            )
        return rows

    return make
