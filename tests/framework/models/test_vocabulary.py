"""A tokenizer with more tokens than an embedding has rows: the embedding grows, and never becomes random."""

import pytest
import torch

from orthotrain.errors import ConfigurationError
from orthotrain.models import CausalLM, PretrainedModel, check_vocabulary
from orthotrain.models.vocabulary import enlarge_embeddings_
from orthotrain.modules import OftLayers, PoetLayers

IDS = torch.arange(12).view(1, 12)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def folder(request, tiny_llama, tmp_path):
    CausalLM({**tiny_llama, "tie_word_embeddings": request.param})().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize(
    "layers", [PoetLayers(block_size=8, init="keep"), OftLayers(block_size=8)], ids=["POET", "OFT"]
)
def test_new_rows_are_the_mean_of_the_old_rows_and_old_logits_stay(folder, layers):
    base = PretrainedModel(folder)().eval()
    rows = base.config.vocab_size
    network = PretrainedModel(folder, resize_vocabulary=rows + 3)().eval()
    layers.apply_(network)
    for layer, before in (
        (network.get_input_embeddings(), base.get_input_embeddings()),
        (network.get_output_embeddings(), base.get_output_embeddings()),
    ):
        assert torch.equal(layer.weight[:rows], before.weight)
        assert torch.equal(layer.weight[rows:], before.weight.mean(0, dtype=torch.float64).float().expand(3, -1))
    tied = base.config.tie_word_embeddings
    assert (network.lm_head.weight is network.model.embed_tokens.weight) == tied
    assert network.config.vocab_size == rows + 3
    torch.testing.assert_close(network(IDS).logits[..., :rows], base(IDS).logits, rtol=1e-5, atol=1e-5)


def test_enough_rows_stay_and_an_absurd_number_is_refused(folder):
    network = PretrainedModel(folder)()
    weight = network.get_input_embeddings().weight
    enlarge_embeddings_(network, len(weight) - 1)
    assert network.get_input_embeddings().weight is weight
    with pytest.raises(ConfigurationError, match=r"^resize_vocabulary 10{17} describes a network"):
        PretrainedModel(folder, resize_vocabulary=10**17)()


def test_a_random_embedding_is_refused(folder):
    with pytest.raises(ConfigurationError, match=r"whole of model.embed_tokens.weight by random.*resize_vocabulary"):
        PretrainedModel(folder, options={"vocab_size": 999, "ignore_mismatched_sizes": True})()


def test_too_many_tokens_name_the_remedy():
    with pytest.raises(ConfigurationError, match="vocabulary of 9 does not fit the model's embedding of 8 rows: set"):
        check_vocabulary(9, 8)
    check_vocabulary(8, 8)
    check_vocabulary(None, 8)
