"""The example of one's own network runs: both networks learn with both methods, and POET keeps the spectrum."""

import pytest


def test_it_runs(example, capsys):
    train = example("custom_network/train.py")
    results = train.main(["--fast"])
    assert set(results) == {
        (network, method) for network in ("perceptron", "transformer") for method in ("poet", "adamw")
    }
    for (network, method), (run,) in results.items():
        assert run["val_accuracy"] > 0.3, f"{network}, {method}: 0.1 is chance"
        if method == "poet":
            assert 0 < run["drift"] < 1e-5
            assert run["trained"] < results[network, "adamw"][0]["trained"] / 2
        else:
            assert run["drift"] is None
    assert capsys.readouterr().out.count("\n") == 7


@pytest.mark.parametrize("network", ["perceptron", "transformer"])
def test_both_methods_share_the_split_of_rates(example, network):
    """What has the hidden rate: POET's generators, and AdamW's weights of the same layers."""
    train = example("custom_network/train.py")
    poet, adamw = (build(train.NETWORKS[network](), 1e-3, 5e-4, 0) for build in (train.poet, train.adamw))
    for module in (poet, adamw):
        module.configure_model()
    hidden = {}
    for name, module in (("poet", poet), ("adamw", adamw)):
        names = {id(p): n for n, p in module.model.named_parameters()}
        groups = module.optimization.groups(module.model)
        hidden[name] = {names[id(p)] for group in groups if group["lr"] == 5e-4 for p in group["params"]}
    assert {n.rsplit(".", 2)[0] for n in hidden["poet"]} == {n.removesuffix(".weight") for n in hidden["adamw"]}
