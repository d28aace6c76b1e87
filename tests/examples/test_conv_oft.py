"""The example of OFT on convolutions runs, and its rotations keep what the table says they keep."""


def test_it_runs_and_oft_keeps_norms_and_angles(example, capsys):
    results = example("conv_oft/adapt.py").main(["--fast"])
    (head,), (full,), (oft,) = results["head"], results["full"], results["oft"]
    assert head["trained"] < oft["trained"] < full["trained"] / 10
    assert min(head["new"], full["new"], oft["new"]) > 0.5  # 0.2 is chance
    assert head["cosines"] == 0
    assert max(oft["norms"], oft["cosines"]) < 1e-5
    assert min(full["norms"], full["cosines"]) > 1e-2
    assert oft["weights"] > 1e-2, "the rotations have not moved"
    assert capsys.readouterr().out.count("\n") == 6
