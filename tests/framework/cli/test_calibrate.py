"""orthotrain calibrate: fits that find known costs, a table that layers then take, and refusals."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthotrain.cli import calibrate as module
from orthotrain.cli.calibrate import (
    Part,
    calibrate,
    features,
    fit,
    non_negative_least_squares,
    passes,
    predicted,
    write_table,
)
from orthotrain.cli.main import main
from orthotrain.errors import ConfigurationError
from orthotrain.layers.poet.cost_tables import VARIABLE, Costs, costs_for, device_name
from orthotrain.layers.poet.route_costs import ROUTES, choose_route, route_costs

CPU = torch.device("cpu")
SMALL = [(64, 32, 8), (16, 64, 16), (128, 48, 4), (32, 64, 32), (8, 96, 8)]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0.01, 100.0), min_size=10, max_size=10), st.booleans())
def test_costs_are_recovered_from_times_that_they_foretell(values, contracts):
    costs, parts = Costs(*values if contracts else values[:7]), []
    for shape in SMALL:
        for kind in ("linear", *ROUTES[: 2 + contracts]):
            part = Part(kind, shape, features(kind, *shape), 0.0)
            parts.append(part._replace(nanoseconds=predicted(costs, part)))
    found = fit(parts)
    for part in parts:
        assert predicted(found, part) == pytest.approx(part.nanoseconds, rel=1e-6)
    assert list(vars(found).values())[7:].count(None) == (0 if contracts else 3)
    known = {name: cost for name, cost in vars(costs).items() if cost is not None}
    assert {name: vars(found)[name] for name in known} == pytest.approx(known, rel=1e-4, abs=1e-4)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(3, 8))
def test_least_squares_is_the_best_without_negative_values(seed, unknowns, rows):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(rows, unknowns, generator=generator, dtype=torch.float64)
    target = torch.randn(rows, generator=generator, dtype=torch.float64)
    found = non_negative_least_squares(matrix, target)
    assert bool((found >= 0).all())
    # the conditions of Karush, Kuhn and Tucker
    slope = matrix.T @ (matrix @ found - target)
    assert bool((slope >= -1e-8).all()) and bool((slope[found > 0].abs() <= 1e-8).all())


@given(st.integers(1, 5000), st.sampled_from([64, 96, 512]), st.sampled_from([4, 32]), st.booleans())
def test_routes_are_foretold_as_the_choice_between_them_is_made(tokens, width, size, half):
    costs = costs_for("cpu", None, half)
    dtype = torch.bfloat16 if half else torch.float32
    for route, per_token, once in route_costs(ROUTES, width, width, size, size, "cpu", dtype):
        part = Part(route, SMALL[0], features(route, tokens, width, size), 0.0)
        assert per_token * tokens + once == pytest.approx(predicted(costs, part), rel=1e-6)


def test_every_part_runs_forward_and_backward_and_is_timed():
    entry, parts = calibrate(CPU, shapes=SMALL[:4], rounds=1)
    assert entry["type"] == "cpu" and entry["name"] == device_name("cpu") and "CPU threads: " in entry["source"]
    for key, dtype in module.DTYPES.items():
        assert [part.kind for part in parts[key]] == ["linear", *ROUTES] * 4
        assert all(part.nanoseconds > 0 for part in parts[key])
        runs = passes(*SMALL[0], CPU, dtype)
        assert [grad.dtype for run in runs.values() for grad in run()] == [dtype] * 11
        assert Costs(**entry[key]).multiply_add > 0


def test_the_command_writes_the_table_that_layers_take(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("ORTHOTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "CPU_SHAPES", SMALL)
    before = costs_for("cpu", None, half=False)
    main(["calibrate"])
    printed = capsys.readouterr().out
    assert "predicted ms" in printed and "wrote" in printed and str(tmp_path / "cache") in printed
    (entry,) = json.loads((tmp_path / "cache" / "routes.json").read_text())["devices"]
    assert vars(costs_for("cpu", None, half=False)) == entry["float32"] != vars(before)

    elsewhere = tmp_path / "mine.json"
    main(["calibrate", "--device", "cpu", "--out", str(elsewhere)])
    monkeypatch.setenv(VARIABLE, str(elsewhere))
    assert choose_route(ROUTES, 8, 64, 64, 8, 8) in ROUTES
    assert vars(costs_for("cpu", None, half=True)) == json.loads(elsewhere.read_text())["devices"][0]["half"]


def test_a_gpu_that_is_not_there_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", "--device", "cuda"])
    assert stop.value.code == 2
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="routes.json cannot be written"):
        write_table({}, tmp_path / "file" / "routes.json")
