"""A fingerprint of the training data: a resumed run must go on with the same rows in the same order."""

from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from orthotrain.errors import ConfigurationError


@dataclass(frozen=True)
class DataFingerprint:
    """The training data of a run, as a loader saves it with its position.

    Attributes:
        content: A digest of the training tokens in their order.
        amount: The amount of data, for messages.
        settings: The settings that decide the content, for messages.
        allow_changed: Whether the run may continue with other data.
    """

    content: str
    amount: str
    settings: dict[str, Any] = field(default_factory=dict)
    allow_changed: bool = False

    def state(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {"content": self.content, "amount": self.amount, "settings": self.settings}

    def compare(self, saved: Any) -> None:
        """Compare with the state in a checkpoint; ``None`` (no state) passes.

        The same content from another source is the same data.

        Raises:
            ConfigurationError: The content differs, and ``allow_changed`` is false.
        """
        if saved is None:
            return
        if not isinstance(saved, dict) or not isinstance(settings := saved.get("settings"), dict):
            raise ConfigurationError(f"the checkpoint's state of the training data is damaged: {saved!s:.80}")
        if saved.get("content") == self.content:
            return
        names = [name for name in {**settings, **self.settings} if settings.get(name) != self.settings.get(name)]
        values = {
            name: f"{settings.get(name)!s:.100} in the checkpoint, {self.settings.get(name)!s:.100} here"
            for name in names
        }
        renamed = values.pop("source", None)  # another name alone is no difference of the content
        differences = [f"{name} {value}" for name, value in values.items()]
        if saved.get("amount") != self.amount:
            differences.append(f"other content ({saved.get('amount')!s:.100} in the checkpoint, {self.amount} here)")
        elif not differences:
            differences.append(f"{self.amount} in both, but with other content or in another order")
        if renamed is not None:
            differences.append(f"the source has another name too: {renamed}")
        self.refuse(f"the training data differs from the checkpoint's: {'; '.join(differences)}")

    def refuse(self, difference: str) -> None:
        """Refuse a difference between the data of the checkpoint and of this run; warn if differences are allowed.

        Raises:
            ConfigurationError: ``allow_changed`` is false.
        """
        if not self.allow_changed:
            raise ConfigurationError(
                f"{difference}; resume with the same data, or set allow_changed: true in data "
                "(--data.allow_changed true) to continue with the data of this run"
            )
        rank_zero_warn(f"{difference}; the run continues, because allow_changed is set")


UNKNOWN = DataFingerprint("", "")
"""Fingerprint of a loader whose data is not known."""
