import pytest
import torch
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers import Mergeable, OftEmbedding, OftSettings


def turn_(layer, std=0.1):
    with torch.no_grad():
        layer.rotation_out.generators.normal_(std=std)
    return layer


@torch.no_grad()
def relative(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [False, True])
def test_identity_then_exact_merge(dtype, share):
    embedding = nn.Embedding(20, 16, padding_idx=3, dtype=dtype)
    layer = OftEmbedding.from_settings(embedding, OftSettings(4, block_share=share))
    assert isinstance(layer, Mergeable)
    index = torch.tensor([[0, 3, 5], [19, 1, 3]])
    assert torch.equal(layer(index), embedding(index))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(index), embedding(index))
    before, plain = turn_(layer)(index), layer.unwrap()
    assert not torch.equal(before, embedding(index))
    layer.merge_()
    assert relative(layer(index), before) < (1e-5 if dtype == torch.float32 else 2**-8)
    assert torch.equal(plain(index), layer(index))
    assert plain.padding_idx == 3 and not plain.weight[3].any()
    assert not layer.rotation_out.generators.any()


def test_merged_table_is_the_rotated_one():
    layer = turn_(OftEmbedding.from_settings(nn.Embedding(20, 16), OftSettings(4)))
    rotation = torch.block_diag(*(torch.eye(4) + layer.displacements()[0]))
    torch.testing.assert_close(layer.merged_weight(), layer.embedding.weight @ rotation)
    torch.testing.assert_close(layer.merged_weight().norm(dim=1), layer.embedding.weight.norm(dim=1))


def test_gradient_is_that_of_the_rotated_table():
    layer = turn_(OftEmbedding.from_settings(nn.Embedding(20, 16), OftSettings(4)))
    index = torch.tensor([1, 1, 7])
    grad = torch.randn(3, 16)
    generators = layer.rotation_out.generators
    (actual,) = torch.autograd.grad(layer(index), generators, grad)
    rotation = torch.block_diag(*(torch.eye(4) + layer.displacements()[0]))
    (expected,) = torch.autograd.grad(layer.embedding.weight[index] @ rotation, generators, grad)
    torch.testing.assert_close(actual, expected)


def test_trains_only_the_generators_unties_and_reloads():
    embedding = nn.Embedding(20, 16)
    head = nn.Linear(16, 20, bias=False)
    head.weight = embedding.weight
    layer = turn_(OftEmbedding.from_settings(embedding, OftSettings(4)))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["rotation_out.generators"]
    before = head.weight.clone()
    twin = OftEmbedding.from_settings(nn.Embedding(20, 16), OftSettings(4))
    twin.load_state_dict(layer.state_dict())
    index = torch.arange(20)
    assert torch.equal(twin(index), layer(index))
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(index), layer(index))
    layer.enabled = False
    assert torch.equal(layer(index), embedding(index))
    layer.enabled = True
    layer.merge_()
    assert torch.equal(head.weight, before)


def test_block_size_must_fit():
    with pytest.raises(ConfigurationError, match=r"block_size=5 .*16 features to rotate; near it: 4 and 8"):
        OftEmbedding.from_settings(nn.Embedding(20, 16), OftSettings(5))


class Scaled(nn.Embedding):
    def forward(self, index):
        return 3 * super().forward(index)


class Shifted(nn.Embedding):
    def forward(self, index):
        return super().forward(index) + 1


class Normed(nn.Embedding):
    def forward(self, index):
        return nn.functional.layer_norm(super().forward(index), (self.embedding_dim,))


def test_a_subclass_may_scale_rows_and_nothing_else():
    layer, index = turn_(OftEmbedding.from_settings(Scaled(20, 16), OftSettings(4))), torch.arange(20)
    assert relative(layer.unwrap()(index), layer(index)) < 1e-6
    for kind in (Shifted, Normed):
        with pytest.raises(ConfigurationError, match=f"the layer is a {kind.__name__}, .*rows times a factor"):
            OftEmbedding.from_settings(kind(20, 16), OftSettings(4))
