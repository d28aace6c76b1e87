"""`LabeledData`: texts with a class, a class for each word, or a number, from files of rows to padded batches."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedTokenizerFast

from orthotrain.data.data_fingerprint import DataFingerprint
from orthotrain.data.instructions.layouts import Limit
from orthotrain.data.instructions.row_faults import RowFaults
from orthotrain.data.labels.class_names import ClassNames, check_booleans
from orthotrain.data.labels.encoding import LabelEncoder, OnTooLong, encode_rows
from orthotrain.data.labels.labeled_rows import LabeledBatches, LabeledRows
from orthotrain.data.labels.rows import LabelColumns, LabeledRow, LabelTask, class_text, parse_row
from orthotrain.data.labels.tables import STDLIB_PACKAGES, table_rows
from orthotrain.data.row_data import RowData
from orthotrain.data.splits import SPLITS, Splitter
from orthotrain.data.tokenizer_state import load_model_tokenizer
from orthotrain.errors import ConfigurationError, check_choice

_DECIDES_CONTENT = (
    *("source", "val_source", "task", "text_column", "pair_column", "label_column", "labels", "max_length"),
    *("on_too_long", "val_fraction", "seed"),
)
_MOST_CLASSES = 100_000


class LabeledData(RowData[LabeledRows]):
    """Labeled texts for finetuning: classes of texts, classes of words, or numbers.

    The network computes its loss from ``labels``; a module logs the metrics of the task. The classes are those of the
    training rows, sorted (numbers by value), or ``labels`` in its order. `PretrainedModel` gets a head with an output
    for each class, and its config their names.

    The words of ``token_classification`` are joined by spaces before they are tokenized. The first token of a word has
    the label of the word; the other tokens have -100, which does not count.

    Args:
        tokenizer: The tokenizer of the model: a tokenizer.json, a folder with one, a Hugging Face name, or a .ckpt.
        source: ``python-stdlib-packages`` (functions of the standard library and their package), a file, folder or glob
            of .csv .tsv .jsonl .json .parquet .arrow (.gz), a folder of ``save_to_disk``, a Hugging Face dataset
            ``org/name[:config][@split]``, or a list.
        val_source: Source of the validation rows; by default a share of ``source``.
        test_source: Source of the test rows; by default there are no test rows.
        task: ``sequence_classification``, ``token_classification`` or ``regression``.
        text_column: Key of a row's text; for ``token_classification`` of its list of words, or of text whose words
            stand between spaces.
        pair_column: Key of a second text, which the tokenizer joins to the first one.
        label_column: Key of a row's class (text or a whole number), list of classes, or number.
        labels: Names of the classes in the order of the network's outputs. A row may have the place of a name, from 0.
            If names are numbers, all rows have names or all have places.
        max_length: Most tokens of a row, with special tokens.
        on_too_long: ``truncate`` longer rows at the end, ``drop`` them, or ``error``. A log line counts these rows.
        batch_size: Rows of one batch on one device.
        val_fraction: Share of ``source`` for validation, by a hash of the content or the built-in file; 0 for none.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        seed: Seed of the split and of the order of the rows.
        allow_changed: Whether a resumed run may continue with other training data, or another tokenizer, than the
            checkpoint's; a warning then names the difference.

    Raises:
        ConfigurationError: An argument cannot work; rows are checked in `setup`.

    Example:
        >>> data = LabeledData("google-bert/bert-base-uncased", "reviews.csv", label_column="stars", max_length=256)
        >>> data.limits
        (Limit(argument='max_length', tokens=256, unit='tokens'),)
        >>> trainer.fit(module, data)  # doctest: +SKIP
    """

    is_labeled = True
    built_in = STDLIB_PACKAGES

    def __init__(
        self,
        tokenizer: str | None = None,
        source: str | list[str] = STDLIB_PACKAGES,
        val_source: str | list[str] | None = None,
        test_source: str | list[str] | None = None,
        task: LabelTask = "sequence_classification",
        text_column: str = "text",
        pair_column: str | None = None,
        label_column: str = "label",
        labels: list[str] | None = None,
        max_length: int = 512,
        on_too_long: OnTooLong = "truncate",
        batch_size: int = 16,
        val_fraction: float = 0.1,
        num_workers: int = 0,
        seed: int = 0,
        allow_changed: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.task = task
        self.batch_size = batch_size
        self._check_tokenizer("labeled")
        self._check_arguments("max_length")
        check_choice("task", task, LabelTask)
        check_choice("on_too_long", on_too_long, OnTooLong)
        if task == "token_classification" and pair_column is not None:
            raise ConfigurationError(f"pair_column {pair_column!r}: token_classification labels the words of one text")
        texts = {class_text(str(name)) for name in labels or ()}
        if labels is not None and (task == "regression" or len(texts) != len(labels) or len(labels) < 2):
            raise ConfigurationError(
                f"labels {labels}: give two or more different names of classes, none for regression"
            )
        self.limits = (Limit("max_length", max_length, "tokens"),)
        self._declared = None if labels is None else ClassNames([str(name) for name in labels])

    @property
    def label_names(self) -> list[str]:
        """Names of the classes in the order of the network's outputs; one name, that of the column, for a regression.

        Raises:
            ConfigurationError: All training rows have one class.
        """
        if self.task == "regression":
            return [self.hparams["label_column"]]
        found = self._split_rows("train").names
        if len(found) < 2:
            raise ConfigurationError(
                f"label_column {self.hparams['label_column']!r}: all training rows have the class "
                f"{', '.join(found) or 'none'}; give rows of two classes or more"
            )
        names = self._declared.names if self._declared else sorted(found, key=_by_value)
        if len(names) > _MOST_CLASSES:
            raise ConfigurationError(
                f"label_column {self.hparams['label_column']!r}: has {len(names):,} different values; for numbers to "
                "predict set task: regression"
            )
        return names

    @property
    def label_options(self) -> dict[str, Any]:
        """The options of a transformers network for the labels: ``num_labels``, the names and ``problem_type``."""
        names = self.label_names
        problem = {"regression": "regression", "sequence_classification": "single_label_classification"}
        return {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: number for number, name in enumerate(names)},
            **({"problem_type": problem[self.task]} if self.task in problem else {}),
        }

    def _load_tokenizer(self) -> PreTrainedTokenizerFast:
        return load_model_tokenizer(self.hparams["tokenizer"], joins=False)

    def _read(self, source: str | list[str], splits: tuple[str, ...]) -> None:
        given = self.hparams
        splitter = Splitter(given["seed"], given["val_fraction"])
        rank_zero_info(f"tokenizing the rows of {source!r}")
        encoder = LabelEncoder(self.tokenizer, given["max_length"], given["on_too_long"])
        is_training = "train" in splits
        if not is_training and self._declared is not None and self._declared.is_ambiguous:
            self._split_rows("train")  # they decide what a number means
        rows = (
            (row, splits[0] if len(splits) == 1 else splitter(row.key)) for row in self._parsed(source, is_training)
        )
        found = encode_rows(rows, encoder)
        for split_rows in found.values():
            check_booleans(split_rows.first)
        rank_zero_info(f"{source!r}: {encoder.counts.summary(given['max_length'])}")
        self._rows |= {split: found.get(split, LabeledRows()) for split in splits}

    def _parsed(self, source: str | list[str], is_training: bool) -> Iterator[LabeledRow]:
        given = self.hparams
        columns = LabelColumns(given["text_column"], given["pair_column"], given["label_column"])
        faults, parsed, held = RowFaults(), None, list[LabeledRow]()
        for where, row, own, group in table_rows(source, columns):
            parsed = None
            with faults.collect(where):
                read = replace(parse_row(row, where, columns, self.task), group=group)
                parsed = self._named(read, own, held)
            if parsed is not None:
                yield parsed
        if held and self._declared is not None:
            if is_training:
                self._declared.decide(held)
            for row in held:
                parsed = None
                with faults.collect(row.where):
                    parsed = self._declared.name(row)
                if parsed is not None:
                    yield parsed
        faults.refuse()

    def _named(self, row: LabeledRow, own: tuple[str, ...] | None, held: list[LabeledRow]) -> LabeledRow | None:
        """Return a row whose classes are names, if there are names; a row that needs the whole column goes to held."""
        if self.task == "regression":
            return row
        if own is not None:
            self._declared = self._declared or ClassNames(list(own))
            return self._declared.of_dataset(own, row.where).name(row)
        if self._declared is None:
            return row
        if self._declared.is_ambiguous:
            held.append(row)
            return None
        return self._declared.name(row)

    def _check_size(self, split: str) -> None:
        super()._check_size(split)
        rows = self._split_rows(split)
        if unknown := [name for name in rows.first if name not in self.label_names]:
            names = ", ".join(self.label_names[:10])
            raise ConfigurationError(
                f"{rows.first[unknown[0]]}: the {split} split has the class {unknown[0]!r}, which no training row has "
                f"(their classes: {names:.200}); correct the label, or give labels with all names"
            )

    def _dataset(self, split: str) -> LabeledBatches:
        rows = self._split_rows(split)
        names = [*dict.fromkeys([*self.label_names, *rows.names])]  # a class that training lacks is refused later
        # files are often sorted by class, and limit_val_batches takes the first rows
        order = None if split == "train" else np.random.default_rng(self.hparams["seed"]).permutation(len(rows))
        return LabeledBatches(rows, self.task, names, self.tokenizer.pad_token_id, order)

    def _amount(self, split: str) -> str:
        return f"{len(self._split_rows(split))} rows"

    def amounts(self) -> dict[str, dict[str, int]]:
        """Return rows and tokens of each split that was read."""
        read = {split: self._rows[split].lengths for split in SPLITS if split in self._rows and self._has(split)}
        return {split: {"rows": len(lengths), "tokens": int(lengths.sum())} for split, lengths in read.items()}

    def _fingerprint(self) -> DataFingerprint:
        given, rows = self.hparams, self._split_rows("train")
        settings = {name: given[name] for name in _DECIDES_CONTENT} | {"tokenizer": self.tokenizer_fingerprint[:12]}
        content = f"{rows.digest()} {self.label_names}"
        return DataFingerprint(content, f"{len(rows):,} rows", settings, given["allow_changed"])

    def predict_dataloader(self) -> Any:
        """Refuse the call: ``predict`` writes texts, and a network with labels writes none.

        Raises:
            ConfigurationError: Always; the message names what works.
        """
        raise ConfigurationError(
            "predict continues texts, and labels are no texts: test the run (orthotrain test), or export it and load "
            "the folder with transformers.pipeline"
        )


def _by_value(name: str) -> tuple[float, str]:
    """Sort whole numbers by value, before other names."""
    digits = name.removeprefix("-")
    return (int(name) if digits.isdecimal() and digits.isascii() and len(digits) < 19 else float("inf"), name)
