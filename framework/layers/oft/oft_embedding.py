"""The OFT layer for embeddings: a rotation of the rows that are read from a frozen table."""

import copy

import torch
from torch import Tensor, nn

from orthotrain.layers.oft.oft_layer import OftLayer, OftSettings
from orthotrain.layers.oft.oft_rotation import OftRotation


class OftEmbedding(OftLayer):
    """``y = rot_out(E[index])``, so ``W_eff = E R``: one rotation turns the whole table.

    A padding row of zeros stays zero, and the norms of all rows stay as they are. A layer that scales its rows does so
    before the rotation, and a factor commutes with the rotation. A table that was tied to another layer is untied.

    Args:
        embedding: The frozen table ``(num_embeddings, d)``; its weight is no longer trained.
        rotation_out: Rotation of the ``d`` output features.
    """

    side = "out"
    rotation_out: OftRotation

    def __init__(self, embedding: nn.Embedding, rotation_out: OftRotation) -> None:
        super().__init__(rotation_out)
        embedding.weight.requires_grad_(False)
        self.embedding = embedding

    def forward(self, index: Tensor) -> Tensor:
        """Map integers ``(...)`` to ``(..., d)`` in the dtype of the table, also under autocast, like nn.Embedding."""
        return self.rotation_out(self.embedding(index))

    @torch.no_grad()
    def unwrap(self) -> nn.Embedding:
        """Return the plain embedding that computes the same, with the merged table."""
        embedding = copy.copy(self.embedding)
        embedding._parameters = {"weight": nn.Parameter(self.merged_weight())}
        return embedding

    @staticmethod
    def _rotation_for(layer: nn.Embedding, settings: OftSettings) -> OftRotation:
        return settings.rotation(layer.embedding_dim)

    @property
    def _weight(self) -> Tensor:
        return self.embedding.weight

    def _effective_weight(self) -> Tensor:
        return self.rotation_out.fold(self.embedding.weight, transposed=False)
