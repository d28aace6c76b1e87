"""The example of a defense in representation space runs, and its attack and its prompts are what its README says."""

import pytest
import torch


@pytest.fixture
def defend(example):
    return example("representation_defense/defend.py")


@pytest.fixture
def small(defend):
    """A function that builds a module on a tiny network, with one batch and the network's two kinds of prompts."""

    def build(method):
        torch.manual_seed(0)
        network, tokenizer = defend.load(None)
        benign, harmful = (defend.encode(texts[:6], tokenizer, True) for texts in (defend.BENIGN, defend.HARMFUL))
        module = defend.build(method, defend.lower_part(network, 2), 1e-3)
        module.configure_model()
        with torch.no_grad():
            module.anchor(benign, benign, 2)
        (batch,) = defend.batches(benign, harmful, benign, steps=1, size=6)
        return module, batch, harmful

    return build


def test_it_runs_and_both_methods_start_from_the_same(defend, capsys):
    results = defend.main(["--fast"])
    assert {name.split()[0] for name in results} == {"oft", "lora"}
    one, other = results.values()
    assert one["before"] == pytest.approx(other["before"], rel=1e-3)
    for run in (one, other):
        assert run["after"]["bad"] != pytest.approx(run["before"]["bad"], rel=1e-3)
        assert run["after"]["perplexity"] == pytest.approx(run["before"]["perplexity"], rel=0.2)
    assert capsys.readouterr().out.count("\n") == 5


@pytest.mark.parametrize("method", ["oft", "lora"])
def test_the_gradient_of_the_objective_leads_down(small, method, monkeypatch):
    module, batch, _ = small(method)
    module.double()
    for name in ("original_tokens", "original_prose", "original", "center", "scale"):
        setattr(module, name, getattr(module, name).double())
    trained = [p for p in module.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:  # at the start the distance to the untouched states has a kink
            parameter.add_(0.02 * torch.randn_like(parameter))
    negatives = module.attack(batch["harmful"], 2)
    monkeypatch.setattr(module, "attack", lambda *_: negatives)
    start = module.loss(batch)
    gradients = torch.autograd.grad(start, trained)
    length = torch.nn.utils.get_total_norm(gradients).item()
    step = 1e-5
    with torch.no_grad():
        torch._foreach_add_(trained, gradients, alpha=-step / length)
    assert start.item() - module.loss(batch).item() == pytest.approx(step * length, rel=1e-2)


def test_untouched_layers_and_prompts_are_left_where_they_were(small):
    module, batch, _ = small("lora")
    trained = {name.rsplit(".", 1)[-1] for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {"down", "up"}
    tokens = module.tokens(module.embed(batch["benign"]["input_ids"]), batch["benign"])
    assert torch.allclose(tokens, module.original_tokens[batch["rows"]], atol=1e-5)


def test_an_attack_moves_towards_the_benign_center_and_stays_in_its_ball(defend, small):
    module, _, harmful = small("oft")
    start = module.embed(harmful["input_ids"])
    attacked = module.attack(harmful, 4)
    radius = defend.RADIUS * module.model.embed_tokens.weight.norm(dim=1).mean()
    assert (attacked - start).norm(dim=-1).max() <= radius * (1 + 1e-5)
    with torch.no_grad():
        before, after = (module.distance(module.states(place, harmful), module.center) for place in (start, attacked))
    assert torch.all(after < before)
    assert all(p.grad is None for p in module.parameters())


def test_the_prompts_are_forty_of_each_and_none_twice(defend):
    assert len(set(defend.BENIGN)) == len(set(defend.HARMFUL)) == 40
    assert not set(defend.BENIGN) & set(defend.HARMFUL)
