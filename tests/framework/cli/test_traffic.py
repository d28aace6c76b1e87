"""How much less data parallelism sends, by the numbers of the 1.3B model."""

import pytest
import torch

from orthotrain.cli.traffic import all_reduce_bytes, gradient_bytes
from orthotrain.models import CausalLM
from orthotrain.modules import PoetLayers


def bytes_of(vocab_size, poet):
    sizes = {"hidden_size": 2048, "num_attention_heads": 32, "num_hidden_layers": 24, "intermediate_size": 5376}
    with torch.device("meta"):
        model = CausalLM({**sizes, "vocab_size": vocab_size})()
        if poet:
            PoetLayers(block_size=256).apply_(model)
    return model, gradient_bytes(model)


def test_a_step_of_the_1_3b_model_sends_a_fifth_of_adamws_gradients():
    hidden, ffn, layers, vocab = 2048, 5376, 24, 32000
    model, poet = bytes_of(vocab, True)
    adamw = bytes_of(vocab, False)[1]
    direct = 2 * vocab * hidden + (2 * layers + 1) * hidden
    matrices = layers * (4 * hidden * hidden + 3 * hidden * ffn)
    generators = (
        layers * sum(m // 256 + n // 256 for m, n in [(hidden, hidden)] * 4 + [(hidden, ffn)] * 3) * 256 * 255 // 2
    )
    assert adamw == 4 * (matrices + direct)
    assert poet == 4 * (generators + direct)
    assert poet / adamw == pytest.approx(0.1881, abs=1e-4)
    assert generators / matrices == pytest.approx(0.0989, abs=1e-4)  # what embedding, head and norms do not blur
    assert all_reduce_bytes(model, 8) == 2 * 7 / 8 * poet
