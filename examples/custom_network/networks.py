"""Two networks that import nothing of this package: a perceptron and a small vision transformer for 8 x 8 images.

POET rotates ``nn.Linear`` layers, so attention is written with them: ``nn.MultiheadAttention`` keeps its input
projection as a bare parameter and reads the weight of its output projection directly, so a rotation would not act.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Perceptron(nn.Module):
    """64 pixels, two hidden layers, 10 classes.

    Args:
        width: Units of a hidden layer.
    """

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, 1, 8, 8)`` to logits ``(B, 10)``."""
        return self.head(self.hidden(images.flatten(1)))


class Block(nn.Module):
    """A pre-norm transformer block without dropout.

    Args:
        width: Features of a token.
        heads: Attention heads; divides ``width``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, T, width)`` to tokens."""
        qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class VisionTransformer(nn.Module):
    """Sixteen patches of 2 x 2 pixels, transformer blocks, the mean of the tokens, 10 classes.

    Args:
        width: Features of a token.
        depth: Transformer blocks.
        heads: Attention heads.
    """

    def __init__(self, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, 1, 8, 8)`` to logits ``(B, 10)``."""
        tokens = self.embed(images).flatten(2).mT + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))
