"""The schedules: cosine, and warm-up, stable, decay."""

from itertools import pairwise

import pytest
import torch

from orthotrain.errors import ConfigurationError
from orthotrain.models import CausalLM
from orthotrain.modules import Optimization
from orthotrain.schedules import CosineWithWarmup, WarmupStableDecay


def rates(total, kind=CosineWithWarmup, **kwargs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = kind(optimizer, total_steps=total, **kwargs)
    seen = []
    for _ in range(total + 5):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_rises_then_falls_to_the_final_ratio():
    seen = rates(100, warmup_steps=10, final_ratio=0.1)
    assert seen[0] == pytest.approx(0.2) and seen[9] == seen[10] == pytest.approx(2.0)
    assert seen[55] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert all(later <= earlier for earlier, later in pairwise(seen[10:]))
    assert seen[100] == seen[104] == pytest.approx(0.2)


def test_without_warmup_it_starts_at_the_full_rate():
    assert rates(10)[0] == 2.0


@pytest.mark.parametrize("kwargs", [{"warmup_steps": -1}, {"final_ratio": 1.5}])
def test_numbers_out_of_range_are_refused(kwargs):
    with pytest.raises(ConfigurationError, match=next(iter(kwargs))):
        rates(10, **kwargs)


def test_warms_up_stays_and_decays():
    seen = rates(110, WarmupStableDecay, warmup_steps=10, decay_fraction=0.2, final_ratio=0.1)
    assert seen[0] == pytest.approx(0.2)
    assert all(rate == pytest.approx(2.0) for rate in seen[9:91])
    assert seen[100] == pytest.approx(2.0 * (1 - 0.9 * 0.5))
    assert seen[110] == seen[114] == pytest.approx(0.2)


@pytest.mark.parametrize("kind", [CosineWithWarmup, WarmupStableDecay])
def test_a_checkpoint_goes_on_to_the_end_of_the_run_that_resumes_it(kind):
    def schedule(total):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        return optimizer, kind(optimizer, warmup_steps=5, total_steps=total)

    optimizer, first = schedule(50)
    for _ in range(20):
        optimizer.step()
        first.step()
    saved = first.state_dict()
    assert "total_steps" not in saved
    for state in (saved, {**saved, "total_steps": 50}):  # checkpoints used to hold it
        longer_optimizer, longer = schedule(200)
        longer.load_state_dict(state)
        seen = []
        for _ in range(20, 200):
            longer_optimizer.step()
            longer.step()
            seen.append(longer_optimizer.param_groups[0]["lr"])
        whole = rates(200, kind, warmup_steps=5)
        assert seen == pytest.approx(whole[21:201])


def test_a_run_without_an_end_is_refused_by_a_schedule_that_needs_one(tiny_llama):
    model = CausalLM(tiny_llama)()
    recipe = Optimization(scheduler=WarmupStableDecay)
    with pytest.raises(ConfigurationError, match="WarmupStableDecay needs the length of the run"):
        recipe.configure(model, None)
    assert recipe.configure(model, 10)["lr_scheduler"]["scheduler"].total_steps == 10
    assert set(Optimization().configure(model, None)) == {"optimizer"}
    fixed = Optimization(scheduler=lambda optimizer: WarmupStableDecay(optimizer, total_steps=7))
    assert fixed.configure(model, None)["lr_scheduler"]["scheduler"].total_steps == 7


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_decay_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ConfigurationError, match=f"decay_fraction={fraction}"):
        rates(10, WarmupStableDecay, decay_fraction=fraction)
