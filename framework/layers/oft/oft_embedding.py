"""The OFT layer for embeddings: a frozen table whose rows are rotated after they are looked up."""

import copy
from typing import Any, Self

import torch
from torch import Tensor, nn

from orthotrain.layers.oft.oft_rotation import OftRotation, RotationDtype
from orthotrain.plugins import Parameterization


class OftEmbedding(nn.Module):
    """``y = rot_out(E[index])``, so ``W_eff = E R``: one rotation turns the whole table.

    A padding row of zeros stays zero, the norms of all rows stay as they are, and a layer that scales its rows after
    the look-up does so before the rotation, with which a factor commutes.

    Args:
        embedding: The frozen table ``(num_embeddings, d)``; it is held, its weight no longer trained.
        rotation_out: Rotation of the ``d`` output features.
    """

    def __init__(self, embedding: nn.Embedding, rotation_out: OftRotation) -> None:
        super().__init__()
        embedding.weight.requires_grad_(False)
        self.embedding = embedding
        self.rotation_out = rotation_out

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Embedding,
        block_size: int = 32,
        parameterization: Parameterization | str | dict[str, Any] = "cayley_neumann",
        *,
        block_share: bool = False,
        coft_eps: float | None = None,
        block_dropout: float = 0.0,
        rotation_dtype: RotationDtype = "input",
    ) -> Self:
        """Wrap a copy of an embedding without changing its function; a table tied to another layer is untied.

        Args:
            embedding: Any ``nn.Embedding``.
            block_size: Size of the rotated blocks; must divide the width of the rows.
            parameterization: A :class:`Parameterization`, a registered name or its configuration.
            block_share: See :class:`OftRotation`.
            coft_eps: See :class:`OftRotation`.
            block_dropout: See :class:`OftRotation`.
            rotation_dtype: See :class:`OftRotation`.

        Raises:
            ConfigurationError: If the block size does not fit, naming what would.
        """
        with torch.device(embedding.weight.device):
            rotation = OftRotation(
                embedding.embedding_dim,
                block_size,
                parameterization,
                block_share=block_share,
                coft_eps=coft_eps,
                block_dropout=block_dropout,
                rotation_dtype=rotation_dtype,
            )
        return cls(copy.deepcopy(embedding), rotation)

    @property
    def enabled(self) -> bool:
        """Whether the rotation acts; without it the layer computes what the wrapped one did."""
        return self.rotation_out.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.rotation_out.enabled = value

    def forward(self, index: Tensor) -> Tensor:
        """Map integer ``(...)`` to ``(..., d)`` in the dtype of the table, under autocast too, like nn.Embedding."""
        return self.rotation_out(self.embedding(index))

    @torch.no_grad()
    def merge_(self) -> None:
        """Fold the rotation into the frozen table, rotated in fp32 and rounded once, and reset it to the identity.

        Raises:
            ConfigurationError: If the rotation is disabled.
        """
        self.embedding.weight.copy_(self.merged_weight())
        self.rotation_out.reset_()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return ``E R`` ``(num_embeddings, d)`` in the dtype of the table."""
        return self.rotation_out.fold(self.embedding.weight, transposed=False).to(self.embedding.weight.dtype)

    def rotation_parameters(self) -> list[nn.Parameter]:
        """Return the generators."""
        return [self.rotation_out.generators]

    def displacements(self) -> list[Tensor]:
        """Return ``D = R - I``, ``(n, b, b)``, alone in a list."""
        return [self.rotation_out.displacement()]

    @torch.no_grad()
    def unwrap(self) -> nn.Embedding:
        """Return the plain embedding that computes the same, with the merged table."""
        embedding = copy.copy(self.embedding)
        embedding._parameters = {"weight": nn.Parameter(self.merged_weight())}
        return embedding

    def project_(self) -> None:
        """Bring the generators back to COFT's bound; see :meth:`OftRotation.project_`."""
        self.rotation_out.project_()
