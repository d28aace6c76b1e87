"""What the data modules share."""

from typing import Any

from orthotrain.errors import ConfigurationError


class BuiltFromArguments:
    """A data module that is built from its arguments alone: a checkpoint only says where its data goes on."""

    @classmethod
    def load_from_checkpoint(cls, *given: Any, **more: Any) -> Any:
        """Refuse: Lightning's own method would build whatever class the file names.

        Raises:
            ConfigurationError: Naming what works.
        """
        raise ConfigurationError(
            f"{cls.__name__}.load_from_checkpoint: build the data module with its arguments, and give the checkpoint "
            "to trainer.fit(module, data, ckpt_path=file), which goes on where the file stopped"
        )
