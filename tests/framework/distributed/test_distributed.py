"""Several real processes: same samples and losses, equal bits on every rank, bytes sent, resuming on other numbers."""

import os
import runpy
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from orthotrain.checkpoints.reading import check_checkpoint, read_checkpoint
from orthotrain.checkpoints.resume import adapt_ranks
from orthotrain.distributed.consolidate import consolidate
from orthotrain.errors import ConfigurationError

FAULTS = Path(__file__).parents[2] / "faults"
RANKS = runpy.run_path(str(FAULTS / "ranks.py"))
STEPS, MIDDLE = 6, 3
STRATEGIES = ("ddp", "fsdp2")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")

# Relative difference of a step's loss and of the largest weight: another order of summing gradients, six steps long.
# bf16 rounds each rank's gradients (bf16-true) or products (bf16-mixed) to 8 bits of mantissa before they are summed.
LOSS_TOLERANCE = {"32-true": 1e-5, "bf16-mixed": 2e-3, "bf16-true": 5e-3}
EIGHT_BIT_TOLERANCE = 1e-3


class Groups:
    """Starts groups of ranks that share a folder."""

    def __init__(self, folder, corpus):
        self.folder, self.corpus = folder, corpus

    def __call__(self, name, ranks, runs):
        if not (self.folder / f"{name}.done").exists():
            self.run(name, ranks, runs)
        return [torch.load(self.folder / f"{name}.{rank}.pt", weights_only=True) for rank in range(ranks)]

    def run(self, name, ranks, runs):
        job = {"name": name, "runs": runs, "out": str(self.folder), "corpus": str(self.corpus)}
        job["cache"] = str(self.folder / "cache")
        codes = RANKS["wait"](RANKS["start"](FAULTS / "groups.py", job, ranks, log=self.folder / name))
        logs = "".join((self.folder / f"{name}.{rank}").read_text()[-3000:] for rank in range(ranks))
        assert codes == [0] * ranks, logs
        (self.folder / f"{name}.done").touch()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, corpus):
    """All runs of this file: one rank that accumulates, two ranks, and each resumed as the other."""
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID")  # several workers share the runs of one of them
    base = tmp_path_factory.getbasetemp()
    folder = base.parent / f"groups-{session}" if session else base / "groups"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        return all_runs(folder, Groups(folder, corpus))


def all_runs(folder, start):

    def at(name, **given):
        return {"steps": STEPS, "save_at": [str(folder / name), MIDDLE], **given}

    def saved(name):
        return str(folder / name / f"step={MIDDLE}.ckpt")

    one = {"one": at("one", accumulate=2)}
    one["masked twice"] = {"steps": 3, "accumulate": 2, "masked": True}
    one |= {p: {"steps": 3, "accumulate": 2, "precision": p} for p in PRECISIONS[1:]}
    one["masked"] = {"steps": 3, "accumulate": 4, "masked": True, "batches": 10}
    single = start("a", 1, one)
    two = {"ddp": at("ddp", strategy="ddp"), "fsdp2": at("fsdp2", strategy="fsdp2")}
    two |= {f"ddp {p}": {"steps": 3, "strategy": "ddp", "precision": p} for p in PRECISIONS[1:]}
    two |= {f"fsdp2 {p}": {"steps": 3, "strategy": "fsdp2", "precision": p} for p in PRECISIONS[1:]}
    two |= {f"{s} compiled": {"steps": 3, "strategy": s, "compile": "default"} for s in ("ddp", "fsdp2")}
    two |= {f"one to {s}": {"steps": STEPS, "strategy": s, "resume": saved("one")} for s in ("ddp", "fsdp2")}
    two |= {f"{s} chunked": {"steps": 3, "strategy": s, "chunked_loss": True} for s in ("ddp", "fsdp2")}
    two |= {
        f"{s} masked": {"steps": 3, "strategy": s, "accumulate": 2, "masked": True, "batches": 5} for s in STRATEGIES
    }
    two |= {f"{s} masked once": {"steps": 3, "strategy": s, "masked": True} for s in STRATEGIES}
    two["distributed"] = at("distributed", strategy="fsdp2", distributed=True)
    two["stepwise"] = {"steps": 4, "strategy": "ddp", "stepwise": True}
    two["stepwise fsdp2"] = at("stepwise", steps=4, strategy="fsdp2", stepwise=True)
    # saved when permutations were just drawn, and the generators have no state
    two["stepwise distributed"] = at("shards", steps=4, strategy="fsdp2", stepwise=True, distributed=True)
    two["stepwise shards resumed"] = {"steps": 4, "strategy": "fsdp2", "stepwise": True, "distributed": True}
    two["stepwise shards resumed"]["resume"] = saved("shards")
    two["distributed resumed"] = {"steps": STEPS, "strategy": "fsdp2", "distributed": True}
    two["distributed resumed"]["resume"] = saved("distributed")
    two["8 bit"] = at("8bit", strategy="fsdp2", eight_bit=True)
    two["8 bit resumed"] = {"steps": STEPS, "strategy": "fsdp2", "eight_bit": True, "resume": saved("8bit")}
    two["8 bit ddp"] = {"steps": STEPS, "strategy": "ddp", "eight_bit": True}
    two["stepwise resumed"] = {"steps": 4, "strategy": "fsdp2", "stepwise": True, "resume": saved("stepwise")}
    pair = start("b", 2, two)
    if not (folder / "consolidated.ckpt").exists():
        consolidate(saved("distributed"), folder / "consolidated.ckpt")
    back = {f"{s} to one": {"steps": STEPS, "accumulate": 2, "resume": saved(s)} for s in ("ddp", "fsdp2")}
    back["8 bit to one"] = {"steps": STEPS, "accumulate": 2, "eight_bit": True, "resume": saved("8bit")}
    back["one to one"] = {"steps": STEPS, "accumulate": 2, "resume": saved("one")}
    back["consolidated to one"] = {"steps": STEPS, "accumulate": 2, "resume": str(folder / "consolidated.ckpt")}
    returned = start("c", 1, back)
    four = {s: {"steps": 4, "strategy": s} for s in ("ddp", "fsdp2")}
    return {"folder": folder, "one": single + returned, "two": pair, "four": start("d", 4, four)}


def losses(results, name):
    """Mean loss of each optimizer step over ranks and accumulated batches."""
    sums = {}
    for rank in results:
        for step, values in rank[name]["losses"].items():
            sums[step] = sums.get(step, 0.0) + sum(values) / len(results)
    return sums


def step_losses(results, name):
    """The same for one rank that accumulates two batches, whose losses Lightning has halved."""
    (result,) = [result for result in results if name in result]
    values = [loss for step in sorted(result[name]["losses"]) for loss in result[name]["losses"][step]]
    first = min(step for step, _ in result[name]["batches"]) + 1
    return {first + i: values[2 * i] + values[2 * i + 1] for i in range(len(values) // 2)}


def windows(results, name, accumulate=1):
    """The windows of each optimizer step."""
    seen = {}
    for result in results:
        for i, (_, rows) in enumerate(result[name]["batches"]):
            seen.setdefault(i // accumulate, []).extend(rows)
    return {step: sorted(rows) for step, rows in seen.items()}


def close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    worst = max(abs(found[step] - expected[step]) / expected[step] for step in expected)
    assert worst <= tolerance, f"{worst:.1e}"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_ranks_and_one_that_accumulates_reach_the_same_loss(runs, strategy, precision):
    plain = precision == "32-true"
    single, name = ("one", strategy) if plain else (precision, f"{strategy} {precision}")
    assert windows(runs["one"][:1], single, 2) == windows(runs["two"], name)
    close(losses(runs["two"], name), step_losses(runs["one"][:1], single), LOSS_TOLERANCE[precision])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_loss_by_chunks_is_that_of_whole_logits(runs, strategy):
    """The head returns the loss inside the network's forward pass, where FSDP2 has gathered its weight."""
    whole = losses(runs["two"], strategy)
    found = losses(runs["two"], f"{strategy} chunked")
    close(found, {step: whole[step] for step in found}, 1e-5)
    assert {result[f"{strategy} chunked"]["loss"] for result in runs["two"]} == {"by chunks of 65536 rows of logits"}


@pytest.mark.parametrize(("ranks", "strategy"), [(r, s) for r in ("two", "four") for s in ("ddp", "fsdp2")])
def test_weights_permutations_and_generators_are_equal_bits_on_every_rank(runs, ranks, strategy):
    for result in runs[ranks]:
        assert result[strategy]["differing"] == []
        assert set(result[strategy]["merges"].values()) == {3 if ranks == "two" else 2}
        names = " ".join(result[strategy]["state"])
        assert "permutation" in names and "generators" in names and "weight.values" in names


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_compiled_networks_have_the_losses_of_eager_ones(runs, strategy):
    expected = losses(runs["two"], strategy)
    close(losses(runs["two"], f"{strategy} compiled"), {s: expected[s] for s in (1, 2, 3)}, LOSS_TOLERANCE["32-true"])
    for result in runs["two"]:
        assert result[strategy]["graphs"] == 0 and result[f"{strategy} compiled"]["differing"] == []
        # the hooks of FSDP2 divide the graph
        assert 1 <= result[f"{strategy} compiled"]["graphs"] <= (1 if strategy == "ddp" else 40)


@pytest.mark.parametrize("name", ["stepwise", "stepwise fsdp2"])
def test_stepwise_poet_is_the_same_on_every_rank(runs, name):
    for result in runs["two"]:
        assert result[name]["differing"] == []
        assert set(result[name]["merges"].values()) == {1}  # after three steps; the other steps only fold
        state = result[name]["state"]
        assert any(n.startswith("momentum of") and t.any() for n, t in state.items())
        assert not any(t.any() for n, t in state.items() if n.endswith("generators") and not n.startswith("momentum"))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("masked", "single"), [("masked", "masked"), ("masked once", "masked twice")])
def test_a_step_follows_the_mean_over_the_targets_of_all_ranks(runs, strategy, masked, single):
    """Also in a last window of one micro-batch a rank."""
    (expected,) = [result[single] for result in runs["one"] if single in result]
    for result in runs["two"]:
        found = result[f"{strategy} {masked}"]
        assert found["step losses"] == pytest.approx(expected["step losses"], rel=1e-5)
        assert len(found["step gradients"]) == 3
        for mine, theirs in zip(found["step gradients"], expected["step gradients"], strict=True):
            assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_stepwise_poet_shards_and_resumes(runs):
    close(losses(runs["two"], "stepwise fsdp2"), losses(runs["two"], "stepwise"), LOSS_TOLERANCE["32-true"])
    whole, resumed = losses(runs["two"], "stepwise fsdp2"), losses(runs["two"], "stepwise resumed")
    close(resumed, {step: whole[step] for step in range(MIDDLE + 1, 5)}, LOSS_TOLERANCE["32-true"])


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_sharded_merges_are_those_of_one_process_bit_for_bit(runs, ranks):
    for result in runs[ranks]:
        assert result["fsdp2"]["merged otherwise"] == []


def test_distributed_checkpoints_resume(runs):
    """Also at a step where the generators have no optimizer state: the other parameters keep their moments."""
    for name, resumed in (
        ("fsdp2", "distributed resumed"),
        ("stepwise fsdp2", "stepwise distributed"),
        ("stepwise fsdp2", "stepwise shards resumed"),
    ):
        whole, again = losses(runs["two"], name), losses(runs["two"], resumed)
        close(again, {step: whole[step] for step in again}, LOSS_TOLERANCE["32-true"])
        if "resumed" in resumed:
            assert min(again) == MIDDLE + 1


def test_eight_bit_moments_are_sharded(runs):
    """Blocks of 256 values begin at other values in a shard: moments round differently, and once more on a resume."""
    expected = losses(runs["two"], "8 bit ddp")
    close(losses(runs["two"], "8 bit"), expected, EIGHT_BIT_TOLERANCE)
    resumed = losses(runs["two"], "8 bit resumed"), step_losses(runs["one"], "8 bit to one")
    for again in resumed:
        close(again, {step: expected[step] for step in range(MIDDLE + 1, STEPS + 1)}, EIGHT_BIT_TOLERANCE)
    (state,) = read_checkpoint(runs["folder"] / "8bit" / f"step={MIDDLE}.ckpt")["optimizer_states"]
    kinds = {e["__bnb_optimizer_quant_state__"]["state1"].dtype for e in state["state"].values()}
    assert kinds == {torch.uint8, torch.float32}


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_merging_gathers_one_layer_at_a_time(runs, ranks):
    for result in runs[ranks]:
        assert result["fsdp2"]["gathered at once"] == 1


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_ddp_sends_gradients_and_nothing_else(runs, ranks):
    for result in runs[ranks]:
        steps = dict(result["ddp"]["bytes"])
        trained = result["ddp"]["trained_bytes"]
        frozen = sum(t.numel() * t.element_size() for n, t in result["ddp"]["state"].items() if "weight.values" in n)
        assert frozen > 20_000
        for step in (1, 2, 4, 5) if ranks == "two" else (1, 2, 3):  # others end with a checkpoint or a validation
            sent = steps[step]
            # four bytes ask for a signal after a batch (Lightning's own question before a batch is left out), and four
            # whether all ranks are finite; before the first step a batch is sent, with which all ranks try the network;
            # in the second step DDP sends the order of its buckets once. Steps 2 and 4 end with a merge.
            assert sent.pop("broadcast", 0) <= {1: 4096, 2: 148}.get(step, 0), (step, sent)
            # and eight for the targets of the step and their loss
            assert sent == {"allreduce": trained + 4 + 4 + 8}


def test_fsdp2_reduces_no_gradient_of_a_frozen_weight(runs):
    for result in runs["two"]:
        assert result["fsdp2"]["gradients"] == []
        steps = result["fsdp2"]["bytes"]
        assert all(steps[step]["reduce_scatter_base"] == result["fsdp2"]["trained_bytes"] for step in range(1, STEPS))


def test_merging_sharded_weights_gathers_each_layer_once(runs):
    state = runs["two"][0]["fsdp2"]["state"]
    wrapped = [n for n in state if n.endswith(("weight.values", "generators"))]
    shards = sum(-(-state[n].shape[0] // 2) * state[n][0].numel() * state[n].element_size() for n in wrapped)
    steps = runs["two"][0]["fsdp2"]["bytes"]
    for merge in (2, 4):  # the orthogonality monitor gathers the generators in every step
        assert steps[merge]["all_gather_into_tensor"] - steps[5]["all_gather_into_tensor"] == shards
        assert "broadcast" not in steps[merge]


def test_with_max_epochs_too_a_run_goes_on_in_the_middle_of_its_epoch(runs):
    resumed, whole = step_losses(runs["one"], "one to one"), step_losses(runs["one"][:1], "one")
    assert resumed == {step: whole[step] for step in range(MIDDLE + 1, STEPS + 1)}


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_a_checkpoint_of_one_rank_goes_on_on_two(runs, name):
    resumed, whole = losses(runs["two"], f"one to {name}"), step_losses(runs["one"][:1], "one")
    close(resumed, {step: whole[step] for step in range(MIDDLE + 1, STEPS + 1)}, LOSS_TOLERANCE["32-true"])
    assert list(windows(runs["two"], f"one to {name}").values()) == list(windows(runs["two"], "ddp").values())[MIDDLE:]


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "consolidated"])
def test_a_checkpoint_of_two_ranks_goes_on_on_one(runs, name):
    resumed, whole = step_losses(runs["one"], f"{name} to one"), losses(runs["two"], "ddp")
    close(resumed, {step: whole[step] for step in range(MIDDLE + 1, STEPS + 1)}, LOSS_TOLERANCE["32-true"])


def test_checkpoints_hold_the_same_whichever_strategy_wrote_them(runs):
    folder = runs["folder"]
    one, ddp, fsdp2 = (read_checkpoint(folder / name / f"step={MIDDLE}.ckpt") for name in ("one", "ddp", "fsdp2"))
    for other in (ddp, fsdp2):
        assert other["state_dict"].keys() == one["state_dict"].keys()
        for name, tensor in one["state_dict"].items():
            torch.testing.assert_close(other["state_dict"][name], tensor, rtol=1e-4, atol=1e-5)
        (theirs,), (ours,) = other["optimizer_states"], one["optimizer_states"]
        assert theirs["state"].keys() == ours["state"].keys()
    check_checkpoint(folder / "distributed" / f"step={MIDDLE}.ckpt")


def test_places_that_do_not_divide_are_refused():
    place = {"epoch": 0, "batches": 3, "windows": 100, "batch_size": 4, "num_replicas": 1, "seed": 0}
    checkpoint = {"loops": {"fit_loop": {"state_dict": {"combined_loader": [place]}}}}
    with pytest.raises(ConfigurationError, match="seen 3 batches of its epoch on 1 ranks, .* divides 3"):
        adapt_ranks(checkpoint, 2)
