import copy
import io

import bitsandbytes as bnb
import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import OFTConfig, get_peft_model
from torch import nn

from orthotrain.callbacks.project_generators import ProjectGenerators
from orthotrain.errors import ConfigurationError
from orthotrain.layers import Mergeable, OftLinear, OftRotation, OftSettings

DTYPES = [torch.float32, torch.bfloat16]
BASES = [None, "nf4", "int8"]


def wrap(linear, block_size=8, **options):
    if options.get("storage") == "int8":
        options.setdefault("group_size", 32)
    return OftLinear.from_linear(linear, block_size, **options)


def turn_(layer, std=0.1, seed=0):
    with torch.no_grad():
        for generators in layer.rotation_parameters():
            generators.copy_(std * torch.randn(generators.shape, generator=torch.Generator().manual_seed(seed)))
    return layer


@torch.no_grad()
def relative(actual, expected):
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


@settings(max_examples=25, deadline=None)
@given(
    blocks=st.integers(1, 6),
    block_size=st.sampled_from([2, 3, 8, 16]),
    out_features=st.integers(1, 40),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    parameterization=st.sampled_from(["cayley_neumann", "cayley", "exponential"]),
    share=st.booleans(),
    rotation_dtype=st.sampled_from(["input", "float32"]),
)
def test_starts_as_the_wrapped_layer_bit_for_bit(
    blocks, block_size, out_features, bias, dtype, parameterization, share, rotation_dtype
):
    linear = nn.Linear(blocks * block_size, out_features, bias, dtype=dtype)
    layer = OftLinear.from_linear(
        linear, block_size, parameterization, block_share=share, rotation_dtype=rotation_dtype
    )
    x = torch.randn(2, 3, blocks * block_size, dtype=dtype)
    assert torch.equal(layer(x), linear(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_starts_as_linear4bit_bit_for_bit(dtype, bias):
    linear = bnb.nn.Linear4bit(64, 48, bias, quant_type="nf4", compute_dtype=dtype).to("cpu")
    layer = OftLinear.from_linear(linear, 8)
    x = torch.randn(5, 64, dtype=dtype)
    assert torch.equal(layer(x), linear.train()(x))


def test_only_generators_train_unless_the_bias_is_asked_for():
    def trained(**options):
        layer = wrap(nn.Linear(16, 8), **options)
        return [name for name, p in layer.named_parameters() if p.requires_grad]

    assert trained() == ["rotation_in.generators"]
    assert trained(train_bias=True) == ["bias", "rotation_in.generators"]
    assert trained(storage="nf4") == ["rotation_in.generators"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_changes_nothing_beyond_rounding(dtype):
    layer = turn_(wrap(nn.Linear(64, 48, dtype=dtype)))
    assert isinstance(layer, Mergeable)
    x = torch.randn(32, 64, dtype=dtype)
    before, effective, exact = layer(x), layer.merged_weight(), layer.rotation_in.fold(layer.weight.values)
    plain = layer.unwrap()
    layer.merge_()
    assert torch.equal(layer.weight.values, effective)
    assert not layer.rotation_in.generators.any()
    assert layer.last_merge_error is None
    assert torch.equal(plain(x), layer(x))
    if dtype == torch.float32:
        assert relative(layer(x), before) < 1e-5
    else:
        assert torch.equal(effective, exact.bfloat16())
        assert relative(layer(x), before) < 2**-8


@pytest.mark.parametrize(("storage", "limit"), [("nf4", 0.11), ("int8", 0.01)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_into_a_quantised_weight_loses_what_it_reports(storage, limit, dtype):
    layer = turn_(wrap(nn.Linear(64, 96, bias=False, dtype=dtype), storage=storage))
    eye, x = torch.eye(64), torch.randn(512, 64)
    weight = layer.merged_weight()
    layer.float()
    rounding = relative(layer(x), x @ weight.float().T)
    # an evaluation before the merge: where PEFT's outputs change by 140% on CPUs that bitsandbytes repacks for
    with torch.no_grad():
        before, exact = layer.eval()(x), layer(eye)
    layer.train().merge_()
    assert 0 < layer.last_merge_error < limit
    assert relative(layer(eye), exact) == pytest.approx(layer.last_merge_error, rel=1e-3)
    assert relative(layer(x), before) < 1.1 * layer.last_merge_error + rounding
    assert not layer.rotation_in.generators.any()


def test_unwrap_of_a_quantised_layer_does_not_requantize():
    layer = turn_(wrap(nn.Linear(64, 48), storage="nf4"))
    x = torch.randn(8, 64)
    assert relative(layer.unwrap()(x), layer(x)) < 1e-5


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("order", [2, 4])
# fewer tokens than outputs, more of them, and more of them close to the identity: the three routes of oft_linear
@pytest.mark.parametrize(("tokens", "std"), [(7, 0.1), (60, 0.1), (60, 0.01)])
def test_outputs_and_gradients_equal_peft(order, share, tokens, std):
    linear = nn.Linear(32, 24)
    layer = turn_(wrap(copy.deepcopy(linear), 8, parameterization=cayley_neumann(order), block_share=share), std)
    config = OFTConfig(
        target_modules=["0"],
        oft_block_size=8,
        use_cayley_neumann=True,
        num_cayley_neumann_terms=order + 2,
        block_share=share,
    )
    peft_model = get_peft_model(nn.Sequential(linear), config)
    (theirs,) = [p for p in peft_model.parameters() if p.requires_grad]
    with torch.no_grad():
        theirs.copy_(layer.rotation_in.generators)
    x = torch.randn(tokens, 32)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, expected = layer(x_ours), peft_model(x_theirs)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    (ours.square().mean()).backward()
    (expected.square().mean()).backward()
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.rotation_in.generators.grad, theirs.grad, rtol=1e-5, atol=1e-6)
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(layer.merged_weight(), merged[0].weight, rtol=1e-5, atol=1e-6)


def cayley_neumann(order):
    return {"class_path": "cayley_neumann", "init_args": {"order": order}}


@pytest.mark.parametrize("storage", BASES)
def test_trains_saves_and_reloads_in_both_modes(storage):
    layer = wrap(nn.Linear(64, 48), storage=storage)
    optimizer = torch.optim.Adam(layer.rotation_parameters(), 1e-2)
    x = torch.randn(16, 64)
    for step in range(3):
        layer.eval() if step == 1 else layer.train()
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    twin = wrap(nn.Linear(64, 48), storage=storage)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    for training in (True, False, True):
        assert torch.equal(twin.train(training)(x), layer.train(not training)(x))
    copied = copy.deepcopy(layer)
    layer.merge_()
    assert torch.equal(copied(x), twin(x))


@pytest.mark.parametrize("storage", BASES)
@pytest.mark.parametrize("rotation_dtype", ["input", "float32"])
def test_compiles_without_a_graph_break(storage, rotation_dtype):
    layer = turn_(wrap(nn.Linear(64, 48), storage=storage, rotation_dtype=rotation_dtype, block_share=True))
    x, y = (torch.randn(4, 64).requires_grad_() for _ in range(2))
    y.data.copy_(x.data)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    grad = layer.rotation_in.generators.grad.clone()
    layer.zero_grad()
    layer(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(grad, layer.rotation_in.generators.grad)


def test_compiles_with_block_dropout():
    layer = turn_(wrap(nn.Linear(64, 48), block_dropout=0.5))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 64)
    assert not torch.equal(compiled(x), compiled(x))


def test_block_share_is_one_rotation_everywhere():
    layer = turn_(wrap(nn.Linear(32, 8), block_share=True))
    assert layer.rotation_in.generators.shape == (1, 28)
    (displacement,) = layer.displacements()
    assert displacement.shape == (4, 8, 8)
    assert all(torch.equal(block, displacement[0]) for block in displacement)
    single = turn_(wrap(nn.Linear(8, 8)))
    assert torch.equal(single.displacements()[0][0], displacement[0])
    x = torch.randn(3, 32)
    before = layer(x)
    layer.merge_()
    assert relative(layer(x), before) < 1e-5


def test_block_dropout_drops_the_stated_share_and_scales_nothing():
    share, blocks, forwards = 0.3, 16, 200
    rotation = OftRotation(blocks * 4, OftSettings(4, block_dropout=share))
    nn.init.normal_(rotation.generators, std=0.2)
    x = torch.randn(2, blocks * 4)
    rotated = rotation.eval()(x)
    assert torch.equal(rotation(x), rotated)
    rotation.train()
    dropped = 0
    for _ in range(forwards):
        y = rotation(x).view(2, blocks, 4)
        kept = (y == rotated.view(2, blocks, 4)).all(-1).all(0)
        identity = (y == x.view(2, blocks, 4)).all(-1).all(0)
        assert (kept ^ identity).all()
        dropped += int(identity.sum())
    deviation = (share * (1 - share) / (blocks * forwards)) ** 0.5
    assert abs(dropped / (blocks * forwards) - share) < 5 * deviation
    assert rotation.generators.grad is None


def test_block_dropout_is_off_in_eval_and_in_merges():
    layer = turn_(wrap(nn.Linear(64, 48), block_dropout=0.9))
    x = torch.randn(3, 64)
    before = layer.eval()(x)
    assert torch.equal(layer(x), before)
    layer.train().merge_()
    assert relative(layer(x), before) < 1e-5


def test_coft_projects_to_the_ball_and_keeps_the_bits_inside():
    layer = turn_(wrap(nn.Linear(64, 48), coft_eps=0.5), std=0.01)
    inside = layer.rotation_in.generators.clone()
    layer.project_()
    assert torch.equal(layer.rotation_in.generators, inside)
    turn_(layer, std=1.0)
    before = layer.rotation_in.generators.clone()
    layer.project_()
    after = layer.rotation_in.generators
    # ||Q||_F^2 = 2 |generators|^2, shared out equally over 8 blocks
    torch.testing.assert_close(2**0.5 * after.norm(dim=1), torch.full((8,), 0.5 / 8**0.5))
    torch.testing.assert_close(torch.cosine_similarity(after, before), torch.ones(8))
    (displacement,) = layer.displacements()
    assert displacement.norm() < 2 * 0.5 * 1.05


class Regression(L.LightningModule):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.norms = []

    def training_step(self, batch, _):
        self.norms.append(float(self.layer.rotation_in.generators.detach().norm()))
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.layer.rotation_parameters(), 100.0)


def fit(layer, tmp_path):
    data = torch.utils.data.TensorDataset(torch.randn(12, 16), torch.randn(12, 8))
    module = Regression(layer)
    trainer = L.Trainer(
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[ProjectGenerators()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=2))
    return module


def test_the_callback_projects_after_every_optimizer_step(tmp_path):
    module = fit(wrap(nn.Linear(16, 8), coft_eps=1e-3), tmp_path)
    bound = 1e-3 / 2**0.5
    assert module.norms[:2] == [0, 0]
    assert all(norm == pytest.approx(bound, rel=1e-5) for norm in module.norms[2:])
    with pytest.raises(ConfigurationError, match="coft_eps"):
        fit(wrap(nn.Linear(16, 8)), tmp_path)


def test_rotation_in_fp32_over_a_bf16_base_is_closer():
    linear = nn.Linear(64, 48, dtype=torch.bfloat16)
    x = torch.randn(256, 64, dtype=torch.bfloat16)
    errors = {}
    for rotation_dtype in ("input", "float32"):
        layer = turn_(wrap(copy.deepcopy(linear), rotation_dtype=rotation_dtype))
        rotated = layer.rotation_in(x)
        assert rotated.dtype == layer(x).dtype == torch.bfloat16
        exact = x.double() + torch.einsum(
            "tnb,nbc->tnc", x.double().view(-1, 8, 8), layer.displacements()[0].double()
        ).reshape(-1, 64)
        errors[rotation_dtype] = relative(rotated, exact)
    assert errors["float32"] < errors["input"] < 2**-8


def test_casting_the_layer_keeps_fp32_generators():
    layer = turn_(wrap(nn.Linear(64, 48), block_share=True)).to(torch.bfloat16)
    assert layer.rotation_in.generators.dtype == torch.float32
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("storage", BASES)
def test_disabled_it_is_the_wrapped_layer(storage):
    linear = nn.Linear(64, 48)
    layer = wrap(linear, storage=storage)
    x = torch.randn(3, 64)
    base = layer(x)
    turn_(layer)
    turned = layer(x)
    layer.enabled = False
    assert torch.equal(layer(x), base)
    with pytest.raises(ConfigurationError, match="enabled=True"):
        layer.merge_()
    layer.enabled = True
    assert torch.equal(layer(x), turned)


@pytest.mark.parametrize(
    ("hidden", "ffn", "kv", "layers", "millions"),
    [
        (4096, 11008, 4096, 32, 17.65),
        (5120, 13824, 5120, 40, 27.62),
        (1536, 8960, 256, 28, 7.89),
        (3584, 18944, 512, 28, 17.55),
        (5120, 27648, 1024, 64, 57.90),
    ],
)
def test_published_parameter_counts(hidden, ffn, kv, layers, millions):
    shapes = [
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, ffn),
        (hidden, ffn),
        (ffn, hidden),
    ]
    wrapped = [OftLinear.from_linear(nn.Linear(*shape, device="meta")) for shape in shapes]
    count = sum(p.numel() for layer in wrapped for p in layer.rotation_parameters())
    assert round(layers * count / 1e6, 2) == millions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 32}, r"block_size=32 .*688 features.*16 and 43"),
        ({"block_size": 1}, "from 2 to 688"),
        ({"block_size": 1000}, "from 2 to 688"),
        ({"block_size": 16, "coft_eps": 0.0}, "coft_eps=0.0"),
        ({"block_size": 16, "block_dropout": 1.0}, "block_dropout=1.0"),
        ({"block_size": 16, "rotation_dtype": "half"}, "rotation_dtype='half'.*input, float32"),
        ({"block_size": 16, "storage": "residual"}, "storage='residual'.*dense, int8 or nf4"),
        ({"block_size": 16, "storage": "int8"}, "group_size=256 .*172 and 344"),
        ({"block_size": 16, "group_size": 64}, "group_size=64 with storage=None: only int8 and nf4"),
    ],
)
def test_errors_name_what_would_work(options, message):
    with pytest.raises(ConfigurationError, match=message):
        OftLinear.from_linear(nn.Linear(688, 8), **options)


def test_refuses_to_requantise_what_is_quantized():
    linear = bnb.nn.Linear4bit(64, 48, quant_type="nf4").to("cpu")
    with pytest.raises(ConfigurationError, match="already quantized to nf4 in groups of 64"):
        OftLinear.from_linear(linear, 8, storage="int8")


def test_an_unloaded_layer_stays_frozen():
    assert not OftLinear.from_linear(nn.Linear(16, 8), 4).unload().weight.requires_grad
