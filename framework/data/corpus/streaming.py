"""Training batches from a stream of documents that is too long, or too far away, to be tokenized beforehand."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from orthotrain.data.corpus.documents import Document
from orthotrain.data.corpus.sources import Corpus
from orthotrain.data.corpus.token_windows import as_batch
from orthotrain.data.corpus.tokenizing import AnySplitter, encode_documents
from orthotrain.data.loaders import ResumableLoader

Position = tuple[int, int]
"""Where the next window starts: the index of a document (or part) in the stream, and of a token in it."""

_CHUNK_CHARACTERS = 1 << 20


class TokenStream(IterableDataset):
    """Packs the train documents of a corpus into batches, in the order of the source.

    Every rank reads and tokenizes the whole stream and keeps its share of each round of windows. So the position in the
    stream is the same two numbers on every rank, and two ranks see what one rank sees with two accumulated batches.

    Args:
        corpus: The documents.
        splitter: Tells train documents from the others.
        tokenizer: Turns text into tokens.
        sequence_length: T.
        batch_size: Windows of one batch on one rank.
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(
        self,
        corpus: Corpus,
        splitter: AnySplitter,
        tokenizer: PreTrainedTokenizerFast,
        sequence_length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.corpus, self.splitter, self.tokenizer = corpus, splitter, tokenizer
        self.sequence_length, self.windows = sequence_length, batch_size * world_size
        self.rank, self.world_size = rank, world_size
        self.start: Position = (0, 0)

    def _train_tokens(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield index and tokens of each train document from the start position on."""
        first, skipped = self.start
        indices: deque[int] = deque()

        def train_documents() -> Iterator[Document]:
            found = islice(self.splitter.split(self.corpus.documents()), first, None)
            for index, (split, document) in enumerate(found, start=first):
                if split == "train":
                    indices.append(index)
                    yield document

        for _, tokens, _ in encode_documents(train_documents(), self.tokenizer, _CHUNK_CHARACTERS):
            index = indices.popleft()
            yield index, np.asarray(tokens, np.int64)[skipped if index == first else 0 :]

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], Position]]:
        """Yield each batch with the position after it."""
        first, skipped = self.start
        wanted = self.windows * self.sequence_length
        held: deque[tuple[int, int, np.ndarray]] = deque()
        available = 0
        for index, tokens in self._train_tokens():
            held.append((index, skipped if index == first else 0, tokens))
            available += len(tokens)
            while available > wanted:  # one token more than the windows advance by: the last label
                block, position = self._take(held, wanted)
                available -= wanted
                yield as_batch(block[self.rank :: self.world_size]), position

    def _take(self, held: deque[tuple[int, int, np.ndarray]], wanted: int) -> tuple[np.ndarray, Position]:
        """Remove ``wanted`` tokens from the left; return them and the next token, cut into windows."""
        pieces: list[np.ndarray] = []
        missing = wanted
        while missing >= len(held[0][2]):
            pieces.append(held.popleft()[2])
            missing -= len(pieces[-1])
        index, offset, tokens = held.popleft()
        pieces.append(tokens[: missing + 1])
        held.appendleft((index, offset + missing, tokens[missing:]))
        block = np.concatenate(pieces)
        windows = np.lib.stride_tricks.sliding_window_view(block, self.sequence_length + 1)[:: self.sequence_length]
        return windows, (index, offset + missing)


class StreamLoader(ResumableLoader):
    """A resumable loader over a `TokenStream`.

    Lightning fetches one batch ahead if the length of an epoch is unknown, and a worker runs further ahead. So the
    loader keeps the positions of the latest batches and saves the position that belongs to the trainer's count.

    Args:
        stream: The stream.
        options: Arguments of `DataLoader`.
    """

    _MEMORY = 16
    _BEGINNING: ClassVar[dict[str, int]] = {"batches": 0, "document": 0, "token": 0}

    def __init__(self, stream: TokenStream, **options: Any) -> None:
        super().__init__(stream, batch_size=None, **options)
        self.stream = stream
        self.restore(self._BEGINNING)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start = self._start
        self.restore(self._BEGINNING)  # for the next epoch
        self._recent.append(start)  # the position until the first batch is handed out
        return self._iterate(start)

    def _iterate(self, start: dict[str, int]) -> Iterator[Any]:
        self.stream.start = (start["document"], start["token"])
        for done, (batch, (document, token)) in enumerate(super().__iter__(), start=start["batches"] + 1):
            self._recent.append({"batches": done, "document": int(document), "token": int(token)})
            yield batch
        self._exhausted = True

    def position(self) -> dict[str, int]:
        """Return the finished batches and the position after them; the beginning once the epoch is complete."""
        latest = self._recent[-1]
        done = latest["batches"] if self.processed is None else self.processed
        complete = self.trainer is not None and done >= self.trainer.num_training_batches
        if complete or (self._exhausted and done >= latest["batches"]):
            return self._BEGINNING
        return next((position for position in self._recent if position["batches"] == done), latest)

    def restore(self, position: dict[str, int]) -> None:
        """Continue from a saved position at the next iteration."""
        self._start = {name: position[name] for name in self._BEGINNING}
        self._recent = deque([self._start], maxlen=self._MEMORY)
        self._exhausted = False
