"""The OFT layer for embeddings: a rotation of the rows that are read from a frozen table."""

from collections.abc import Callable

from torch import Tensor, nn

from orthotrain.layers.oft.oft_layer import OftLayer, WeightInfo
from orthotrain.layers.oft.oft_rotation import OftRotation


class OftEmbedding(OftLayer):
    """``y = rot_out(E[index])``, so ``W_eff = E R``: one rotation turns the whole table.

    A padding row of zeros stays zero, and the norms of all rows stay as they are. A layer that scales its rows does so
    before the rotation, and a factor commutes with the rotation. A table that was tied to another layer is untied.

    Args:
        embedding: The frozen table ``(num_embeddings, d)``.
        rotation_out: Rotation of the ``d`` output features.
    """

    wraps, side, width = nn.Embedding, "out", "embedding_dim"
    rotation_out: OftRotation

    def __init__(self, embedding: nn.Embedding, rotation_out: OftRotation) -> None:
        super().__init__(rotation_out)
        self.embedding = embedding
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx = embedding.padding_idx

    @property
    def weight(self) -> WeightInfo:
        """Shape, dtype and device of the frozen table."""
        return self._info()

    def forward(self, index: Tensor) -> Tensor:
        """Map integers ``(...)`` to ``(..., d)`` in the dtype of the table, also under autocast, like nn.Embedding."""
        return self.rotation_out(self.embedding(index))

    @property
    def _frozen(self) -> nn.Embedding:
        return self.embedding

    def _effective_weight(self, error: Callable[[], str] | None = None, inverse: bool = False) -> Tensor:
        return self.rotation_out.fold(self.embedding.weight, transposed=False, error=error, inverse=inverse)
