"""Training batches straight from a stream of documents that is too long, or too remote, to be packed first."""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast

from orthotrain.data.corpus.readers import Document
from orthotrain.data.corpus.sources import Corpus
from orthotrain.data.corpus.tokenizing import Splitter, encode
from orthotrain.data.identity import UNKNOWN, DataIdentity
from orthotrain.data.sampling import EpochProgress, as_batch, is_place

Position = tuple[int, int]
"""Index of a document in the stream and of the token inside it that the next window starts with."""

_CHUNK_CHARACTERS = 1 << 20


class TokenStream(IterableDataset):
    """Packs the train documents of a corpus into batches, in the order of the source.

    Every rank reads and tokenizes the whole stream and keeps its share of each round of windows, so that the place in
    the stream is the same two numbers on every rank, and two ranks see what one rank sees with two accumulated batches.

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
        splitter: Splitter,
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
        """Index and tokens of each train document from the start position on."""
        first, skipped = self.start
        indices: deque[int] = deque()

        def train_documents() -> Iterator[Document]:
            for index, document in enumerate(islice(self.corpus.documents(), first, None), start=first):
                if self.splitter(document) == "train":
                    indices.append(index)
                    yield document

        for _, tokens, _ in encode(train_documents(), self.tokenizer, _CHUNK_CHARACTERS):
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
        """Remove ``wanted`` tokens from the left and return them with the one that follows, cut into windows."""
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


class StreamLoader(DataLoader):
    """A `DataLoader` over a `TokenStream` that Lightning saves into checkpoints and restores from them.

    Lightning fetches one batch ahead where an epoch's length is unknown, and a worker runs further ahead. So the
    positions of the latest batches are kept, and the one saved is that of the trainer's count of processed batches.
    """

    progress: EpochProgress | None = None
    """What to save as done; without it, the number of batches handed out."""

    identity: DataIdentity = UNKNOWN
    """What the stream begins with, saved with the place and compared with a checkpoint's."""

    _MEMORY = 16

    def __init__(self, stream: TokenStream, **options: Any) -> None:
        super().__init__(stream, batch_size=None, **options)
        self.stream = stream
        self._place: dict[str, int] = {"batches": 0, "document": 0, "token": 0}
        self._recent: deque[dict[str, int]] = deque([self._place], maxlen=self._MEMORY)
        self._exhausted = False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        place, self._place = self._place, {"batches": 0, "document": 0, "token": 0}
        self._recent = deque([place], maxlen=self._MEMORY)
        self._exhausted = False
        return self._iterate(place)

    def _iterate(self, place: dict[str, int]) -> Iterator[Any]:
        self.stream.start = (place["document"], place["token"])
        for done, (batch, (document, token)) in enumerate(super().__iter__(), start=place["batches"] + 1):
            self._recent.append({"batches": done, "document": int(document), "token": int(token)})
            yield batch
        self._exhausted = True

    def state_dict(self) -> dict[str, Any]:
        """Batches done and the position after them; the stream's start once the epoch is complete."""
        return {**self._saved_place(), "data": self.identity.state()}

    def _saved_place(self) -> dict[str, int]:
        latest = self._recent[-1]
        done = latest["batches"] if self.progress is None else self.progress.processed
        complete = self.progress is not None and self.progress.complete
        if complete or (self._exhausted and done >= latest["batches"]):
            return {"batches": 0, "document": 0, "token": 0}
        return next((place for place in self._recent if place["batches"] == done), latest)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position at the next iteration.

        Raises:
            ConfigurationError: The position is damaged, or of other data.
        """
        self.identity.compare(state.get("data") if isinstance(state, dict) else state)
        names = ("batches", "document", "token")
        if not is_place(state, names):
            self.identity.refuse(f"the checkpoint holds no place in training data of this kind ({state!s:.80})")
            return
        self._place = {name: state[name] for name in names}
        self._recent = deque([self._place], maxlen=self._MEMORY)
