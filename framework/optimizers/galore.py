"""GaLore (arXiv:2403.03507) from the package galore-torch, with a state of plain tensors."""

from collections.abc import Iterable
from typing import Any

from orthotrain.errors import ConfigurationError
from orthotrain.optimizers.composite import CompositeOptimizer


class GaLore(CompositeOptimizer):
    """AdamW on gradients projected to their leading singular directions; for matrices only.

    galore-torch keeps objects (projectors) in its state. This ``state_dict`` holds their matrices instead, so that a
    checkpoint loads without a pickle.

    Args:
        params: Matrices, or groups of them.
        lr: Learning rate.
        betas: Adam's decay rates.
        eps: Adam's denominator offset.
        weight_decay: Decoupled weight decay.
        rank: Number of singular directions that are kept.
        update_proj_gap: Steps between two singular value decompositions.
        scale: Factor of the update (alpha of the paper).

    Raises:
        ConfigurationError: If galore-torch is not installed, or a parameter is no matrix.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        rank: int = 128,
        update_proj_gap: int = 200,
        scale: float = 0.25,
    ) -> None:
        try:
            from galore_torch import GaLoreAdamW
        except ImportError as error:
            raise ConfigurationError("GaLore needs the package galore-torch: pip install galore-torch") from error
        given = list(params)
        groups = given if given and isinstance(given[0], dict) else [{"params": given}]
        for shape in (tuple(p.shape) for group in groups for p in group["params"] if p.ndim != 2):
            raise ConfigurationError(
                f"GaLore projects matrices, and a parameter of shape {shape} is none: use GaLore only for the hidden "
                "matrices, through optimizer_overrides"
            )
        projection = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": "std"}
        groups = [{**group, **projection} for group in groups]
        part = GaLoreAdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, no_deprecation_warning=True)
        super().__init__([part])

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with matrices in place of the projectors."""
        document = super().state_dict()
        # new dictionaries, because super() returns those of the optimizer itself
        document["state"] = {
            number: {name: value.ortho_matrix if name == "projector" else value for name, value in state.items()}
            for number, state in document["state"].items()
        }
        return document

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state and rebuild the projectors."""
        from galore_torch.galore_projector import GaLoreProjector

        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for state in (self.state[p] for p in group["params"] if p in self.state):
                projector = GaLoreProjector(
                    group["rank"], update_proj_gap=group["update_proj_gap"], scale=group["scale"], proj_type="std"
                )
                projector.ortho_matrix = state["projector"]
                state["projector"] = projector
