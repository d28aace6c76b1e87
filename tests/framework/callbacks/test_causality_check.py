"""A network that sees the tokens that it is to predict is refused; other networks are left as they were."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding, BertConfig, BertForMaskedLM

from orthotrain.callbacks import CausalityCheck
from orthotrain.errors import ConfigurationError
from orthotrain.models import CausalLM, PretrainedModel
from orthotrain.modules import OftLayers, OftModule, PoetLayers, PoetModule
from orthotrain.modules.base import BaseModule

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
TOKENS = torch.arange(1, 35).view(2, 17)
NEXT = {"input_ids": TOKENS[:, :-1], "labels": TOKENS[:, 1:]}


def trainer(folder, **options):
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=1,
        enable_model_summary=False, default_root_dir=folder, **options,
    )  # fmt: skip


def rows(batch):
    return DataLoader([batch], batch_size=None)


def poet(model_type, **config):
    return PoetModule(CausalLM({**SIZES, **config}, model_type), PoetLayers(4))


class Network(nn.Module):
    """Tokens -> logits; what a token gets from the others is in the subclass."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear, self.head = nn.Embedding(64, 16), nn.Linear(16, 16), nn.Linear(16, 64)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids):
        return self.head(self.dropout(self.mix(self.linear(self.embed(input_ids)))))

    def mix(self, x):
        return x.cumsum(1)


class Mean(Network):
    def mix(self, x):
        return x + x.mean(1, keepdim=True)


class FixedLength(Mean):
    """Takes rows of one length alone, and needs a mask."""

    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids) + torch.zeros(16, 1) * attention_mask[..., None]


class Carried(Network):
    """Adds the mean of the last call, which no buffer holds, and counts its calls in a buffer."""

    def __init__(self):
        super().__init__()
        self.before = 0.0
        self.register_buffer("calls", torch.zeros(()))

    def mix(self, x):
        x, self.before = super().mix(x) + self.before, x.detach().mean()
        self.calls += 1
        return x


class FullExpert(Network):
    """An expert that takes half of all tokens: those with the highest scores."""

    def mix(self, x):
        scores = x.sum(-1).flatten()
        taken = (scores >= scores.median()).view(x.shape[:2])
        return torch.where(taken[..., None], 2 * x, x)


class Rounded(Network):
    """A causal network in which rounding depends on all tokens of a batch, as where experts compute groups of them."""

    def mix(self, x):
        large = 1e3 * x.sum((0, 1))
        return super().mix(x + large - large)


def base_module(network):
    return BaseModule(network)


@pytest.mark.parametrize("model_type", ["roberta", "electra"])
def test_encoders_are_refused_before_the_first_step(model_type, tmp_path):
    module = poet(model_type)
    with pytest.raises(ConfigurationError, match=r"sees the tokens that it is to predict.*set is_decoder: true") as e:
        trainer(tmp_path).fit(module, rows(NEXT))
    assert "\n" not in str(e.value) and module.global_step == 0


def test_a_decoder_trains(tmp_path):
    module = poet("roberta", is_decoder=True)
    trainer(tmp_path).fit(module, rows(NEXT), rows(NEXT))
    assert module.global_step == 1


@pytest.mark.parametrize("objective", ["next_token", "model"])
def test_a_pretrained_encoder_is_refused_in_evaluation_too(objective, tmp_path):
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "base")
    model = PretrainedModel(str(tmp_path / "base"))
    module = OftModule(model, OftLayers(block_size=4, exclude=["*decoder"]), max_new_tokens=0, objective=objective)
    batch = NEXT if objective == "next_token" else {"input_ids": TOKENS, "labels": TOKENS}
    with pytest.raises(ConfigurationError, match=r"BertLMHeadModel sees .* or in options of PretrainedModel"):
        trainer(tmp_path).validate(module, rows(batch), verbose=False)


@pytest.mark.parametrize("kind", [Mean, FixedLength])
def test_a_network_of_the_user_is_refused(kind, tmp_path):
    batch = NEXT if kind is Mean else {**NEXT, "attention_mask": torch.ones(2, 16)}
    with pytest.raises(ConfigurationError, match=f"{kind.__name__} sees .* or override loss for another objective"):
        trainer(tmp_path).fit(base_module(kind()), rows(batch))


def test_the_check_can_be_switched_off_as_its_message_says(tmp_path):
    batch = BatchEncoding(NEXT)  # as collators of transformers give it: a mapping, and no dict
    with pytest.raises(ConfigurationError, match=r"if no label counts there, add .*CausalityCheck with enabled: false"):
        trainer(tmp_path).validate(base_module(Mean()), rows(batch), verbose=False)
    run = trainer(tmp_path, callbacks=[CausalityCheck(enabled=False)])
    assert run.validate(base_module(Mean()), rows(batch), verbose=False)[0]["val_loss"] > 0
    assert sum(isinstance(callback, CausalityCheck) for callback in run.callbacks) == 1


@pytest.mark.parametrize("kind", [Network, Carried, FullExpert, Rounded])
def test_no_false_alarm(kind, tmp_path):
    network, check = kind(), CausalityCheck()
    module = base_module(network)
    run = trainer(tmp_path)
    run.fit(module, rows(NEXT))
    module.train()
    network.head.eval()
    state, buffers = torch.get_rng_state(), [buffer.clone() for buffer in network.buffers()]
    check.on_train_batch_start(run, module, NEXT, 0)
    assert check.checked and torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, buffers, network.buffers()))
    assert network.training and network.dropout.training and not network.head.training


def test_labels_of_masked_tokens_are_no_next_tokens(tmp_path):
    masked = TOKENS.clone()
    masked[:, ::3] = 0
    labels = torch.where(masked == 0, TOKENS, -100)
    trainer(tmp_path).fit(base_module(Mean()), rows({"input_ids": masked, "labels": labels}))
