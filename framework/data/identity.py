"""What a run was trained on, told apart by content: a resumed run is to go on with the same rows in the same order."""

from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from orthotrain.errors import ConfigurationError


@dataclass(frozen=True)
class DataIdentity:
    """The training data of a run, as a loader saves it with its place.

    Attributes:
        content: A digest of the training tokens in their order.
        amount: How much there is, for messages.
        settings: The settings of which the content is made, for messages.
        allow_changed: Whether other data is continued with, and not refused.
    """

    content: str
    amount: str
    settings: dict[str, Any] = field(default_factory=dict)
    allow_changed: bool = False

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"content": self.content, "amount": self.amount, "settings": self.settings}

    def compare(self, saved: Any) -> None:
        """Compare with what a checkpoint says; one of an earlier version says nothing.

        The same content from another place is the same data.

        Raises:
            ConfigurationError: The content differs, unless that is allowed.
        """
        if saved is None:
            return
        if not isinstance(saved, dict) or not isinstance(settings := saved.get("settings"), dict):
            raise ConfigurationError(f"the checkpoint's state of the training data is damaged: {saved!s:.80}")
        if saved.get("content") == self.content:
            return
        names = [name for name in {**settings, **self.settings} if settings.get(name) != self.settings.get(name)]
        values = {name: f"{settings.get(name)!s:.100} there, {self.settings.get(name)!s:.100} here" for name in names}
        renamed = values.pop("source", None)  # another name alone is no difference of the content
        differences = [f"{name} {value}" for name, value in values.items()]
        if saved.get("amount") != self.amount:
            differences.append(f"other content ({saved.get('amount')!s:.100} there, {self.amount} here)")
        elif not differences:
            differences.append(f"{self.amount} in both, of other content or in another order")
        if renamed is not None:
            differences.append(f"the source has another name too: {renamed}")
        self.refuse(f"the training data differs from the checkpoint's: {'; '.join(differences)}")

    def refuse(self, difference: str) -> None:
        """Refuse a difference between the checkpoint's data and this run's, or say it where it is allowed.

        Raises:
            ConfigurationError: The difference is not allowed.
        """
        if not self.allow_changed:
            raise ConfigurationError(
                f"{difference}; resume with the same data, or set allow_changed: true in data "
                "(--data.allow_changed true) to go on with this"
            )
        rank_zero_warn(f"{difference}; going on, since allow_changed is set")


UNKNOWN = DataIdentity("", "")
"""Of a loader that nobody told what it reads."""


MOST_TOKENS, MOST_WORKERS = 1 << 31, 1024


def check_sizes(batch_size: int, length: int, workers: int) -> None:
    """Refuse a batch or a number of processes that no machine can hold.

    Raises:
        ConfigurationError: Naming the sizes.
    """
    if batch_size * length > MOST_TOKENS:
        raise ConfigurationError(
            f"batch_size {batch_size} times a length of {length}: a batch has at most {MOST_TOKENS:,} tokens"
        )
    if workers > MOST_WORKERS:
        raise ConfigurationError(f"num_workers {workers}: must be at most {MOST_WORKERS}")


def check_data_state(state: Any) -> dict[str, Any]:
    """Return the state of a data module from a checkpoint, once it is known to be what such a module saves.

    Raises:
        ConfigurationError: The state is no dictionary, or an entry has another type.
    """
    if not isinstance(state, dict):
        raise ConfigurationError(
            f"the checkpoint's data state is damaged: it is a {type(state).__name__}, no dictionary"
        )
    kinds = {"tokenizer": str, "tokenizer_fingerprint": str, "special_tokens": dict, "settings": dict}
    for name, kind in kinds.items():
        if not isinstance(state.get(name, kind()), kind):
            found = type(state[name]).__name__
            raise ConfigurationError(f"the checkpoint's data state is damaged: {name} is a {found}, no {kind.__name__}")
    if not isinstance(state.get("chat_template"), str | None):
        raise ConfigurationError("the checkpoint's data state is damaged: chat_template is no text")
    return state
