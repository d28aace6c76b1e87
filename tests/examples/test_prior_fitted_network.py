"""The example of a prior-data fitted network runs, and its causal models are what its README says."""

import torch


def test_it_runs_and_learns(example, capsys):
    results = example("prior_fitted_network/train.py").main(["--fast"])
    network, mean = results["network (poet)"], results["observed mean"]
    assert network["outcome_free"] < 0.9 * mean["outcome_free"]
    assert "linear regression" in capsys.readouterr().out


def test_an_intervention_cuts_the_edges_into_the_treatment_alone(example):
    prior = example("prior_fitted_network/causal_prior.py")
    generator = torch.Generator().manual_seed(0)
    models = prior.Models.draw(200, generator)
    noise = torch.randn(200, 50, prior.NODES, generator=generator)
    covariates, treatment, outcome = models.sample(noise)
    assert set(treatment.unique().tolist()) == {0.0, 1.0}
    # an intervention that sets what would have happened anyway changes nothing
    for before, after in zip((covariates, treatment, outcome), models.sample(noise, treatment), strict=True):
        assert torch.equal(before, after)
    changed = models.sample(noise, 1 - treatment)
    earlier = models.covariates < models.treatment[:, None]
    assert torch.equal(covariates.mT[earlier], changed[0].mT[earlier])
    childless = (models.weights.gather(2, models.treatment[:, None, None].expand(-1, prior.NODES, 1)) == 0).all(1)[:, 0]
    assert childless.any()
    assert torch.equal(outcome[childless], changed[2][childless])
    assert not torch.equal(outcome[~childless], changed[2][~childless])


def test_the_effect_is_what_a_randomised_experiment_finds(example):
    prior = example("prior_fitted_network/causal_prior.py")
    batch = prior.draw_batch(20, 16, 20_000, torch.Generator().manual_seed(1))
    treated = batch["queries"][..., -1]
    experiment = (batch["outcomes"] * treated).sum(1) / treated.sum(1)
    experiment -= (batch["outcomes"] * (1 - treated)).sum(1) / (1 - treated).sum(1)
    noise = 2 * batch["outcomes"].std(1) / 20_000**0.5  # standard error of a difference of two halves
    assert torch.all((experiment - batch["effects"].mean(1)).abs() < 5 * noise)
