"""The choice of the route: shipped and given tables of costs, the device that they name, and the shapes."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orthotrain.errors import ConfigurationError
from orthotrain.layers import PoetLinear
from orthotrain.layers.poet.cost_tables import SHIPPED, VARIABLE, costs_for, read_table
from orthotrain.layers.poet.route_costs import ROUTES, choose_route, route_costs

COSTS = {
    "multiply_add": 1.0,
    "rotate_call": 10.0,
    "rotate_element": 2.0,
    "rotate_column": 0.5,
    "fold_call": 20.0,
    "fold_element": 3.0,
    "fold_column": 0.25,
}
CONTRACT = {"contract_call": 5.0, "contract_element": 0.5, "contract_column": 0.125}


def table(path, name="cpu", kind="cpu", **changed):
    entry = {"type": kind, "name": name, "source": "a test", "float32": COSTS | changed, "half": COSTS}
    path.write_text(json.dumps({"unit": "ns", "devices": [entry]}))
    return path


@pytest.fixture
def given_table(tmp_path, monkeypatch):
    def give(**changed):
        monkeypatch.setenv(VARIABLE, str(table(tmp_path / f"{len(list(tmp_path.iterdir()))}.json", **changed)))

    return give


@given(
    st.tuples(*[st.integers(1, 5000)] * 3), st.sampled_from([0, 8, 64, 256]), st.sampled_from([8, 32]), st.booleans()
)
def test_the_choice_is_the_smallest_of_the_predicted_costs(shape, b_in, b_out, half):
    tokens, d_in, d_out = shape
    costs, product = costs_for("cpu", None, half), tokens * d_in * d_out
    sides = [(width, size) for width, size in ((d_in, b_in), (d_out, b_out)) if size]
    fold = costs.fold(d_in * d_out, b_in + b_out)
    expected = {
        "input": 2 * costs.multiply_add * product + sum(costs.rotation(tokens * w, size) for w, size in sides),
        "product": 3 * costs.multiply_add * product + fold,
        "contraction": 2 * costs.multiply_add * product
        + fold / 3
        + sum(
            costs.contract_call
            + tokens * w * (costs.contract_element + size * costs.contract_column)
            + costs.multiply_add * 3 * w * size**2
            for w, size in sides
        ),
    }
    dtype = torch.bfloat16 if half else torch.float32
    found = {
        route: slope * tokens + start
        for route, slope, start in route_costs(ROUTES, d_in, d_out, b_in, b_out, "cpu", dtype)
    }
    assert found == pytest.approx(expected, rel=1e-9)
    for routes in (ROUTES, ROUTES[:2], ROUTES[1:]):
        chosen = choose_route(routes, tokens, d_in, d_out, b_in, b_out, "cpu", dtype)
        assert expected[chosen] <= min(expected[route] for route in routes) * (1 + 1e-9)


def test_a_table_written_by_hand_decides_as_computed_by_hand(given_table):
    given_table()
    # input: 2 * 800 + 2 * (10 + 40 * (2 + 0.5 * 4)) = 1940; product: 3 * 800 + 20 + 400 * (3 + 0.25 * 8) = 4420
    assert route_costs(ROUTES, 20, 20, 4, 4, "cpu", torch.float32) == (("input", 960, 20), ("product", 1200, 2020))
    assert choose_route(ROUTES, 2, 20, 20, 4, 4) == "input"
    given_table(rotate_element=1000.0)
    assert choose_route(ROUTES, 2, 20, 20, 4, 4) == "product"
    assert choose_route(ROUTES, 2, 20, 20, 4, 4, dtype=torch.bfloat16) == "input"
    # contraction: 2 * 800 + 2020 / 3 + 2 * (5 + 40 * (0.5 + 0.125 * 4) + 3 * 20 * 16)
    given_table(rotate_element=1000.0, **CONTRACT)
    found = dict(
        (route, slope * 2 + start) for route, slope, start in route_costs(ROUTES, 20, 20, 4, 4, "cpu", torch.float32)
    )
    assert found["contraction"] == pytest.approx(1600 + 2020 / 3 + 2 * (5 + 40 + 960))
    assert choose_route(ROUTES, 2, 20, 20, 4, 4) == "contraction"
    assert choose_route(("input", "product"), 2, 20, 20, 4, 4) == "product"


@pytest.mark.parametrize(("route", "expected"), [("input", {"input"}), ("weight", {"product", "contraction"})])
def test_the_setting_restricts_the_routes(given_table, route, expected):
    found = set()
    for changed in ({"contract_element": 1e4}, {"rotate_element": 1e4}):
        given_table(**CONTRACT | changed)
        layer = PoetLinear.from_linear(nn.Linear(16, 16), 4, route=route)
        found.add(layer._route(torch.zeros(50, 16)))
    assert found == expected


@pytest.mark.parametrize(("name", "expected"), [("NVIDIA H200", "*H200*"), ("NVIDIA H100 80GB HBM3", "*H100*")])
def test_a_gpu_is_found_by_its_name(monkeypatch, name, expected):
    monkeypatch.setattr("orthotrain.layers.poet.cost_tables.device_name", lambda kind, index=None: name)
    entry = next(entry for entry in read_table(SHIPPED) if entry["name"] == expected)
    assert costs_for("cuda", 0, half=True) == entry["half"] and costs_for("cuda", 0, half=False) == entry["float32"]


def test_an_unknown_device_takes_the_first_of_its_type(monkeypatch):
    monkeypatch.setattr("orthotrain.layers.poet.cost_tables.device_name", lambda kind, index=None: "something new")
    entries = read_table(SHIPPED)
    for kind, first in (("cpu", "cpu"), ("cuda", "cuda"), ("mps", "cuda")):
        assert costs_for(kind, None, half=True) == next(e["half"] for e in entries if e["type"] == first)


def test_a_calibrated_table_in_the_cache_comes_before_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("ORTHOTRAIN_CACHE", str(tmp_path / "none"))
    shipped = costs_for("cpu", None, half=False)
    monkeypatch.setenv("ORTHOTRAIN_CACHE", str(tmp_path))
    table(tmp_path / "routes.json")
    # a table from before contraction was measured, which is then not taken
    assert vars(costs_for("cpu", None, half=False)) == COSTS | dict.fromkeys(CONTRACT) != vars(shipped)
    other = tmp_path / "other"
    other.mkdir()
    table(other / "routes.json", name="NVIDIA B200", kind="cuda")
    monkeypatch.setenv("ORTHOTRAIN_CACHE", str(other))
    assert costs_for("cpu", None, half=False) == shipped


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "ill-formed"),
        ("[]", "ill-formed"),
        ('{"devices": 3}', "ill-formed"),
        ('{"devices": [{"type": "cpu", "name": 3}]}', "type and name of a device must be strings"),
        ('{"devices": [{"type": "cpu", "name": "cpu", "float32": {"multiply_add": 1}, "half": {}}]}', "costs are"),
        ('{"devices": [{"type": "cpu", "name": "cpu", "float32": {}}]}', "costs are"),
    ],
)
def test_an_ill_formed_table_is_refused(tmp_path, monkeypatch, text, message):
    path = tmp_path / "costs.json"
    path.write_text(text)
    monkeypatch.setenv(VARIABLE, str(path))
    with pytest.raises(ConfigurationError, match=rf"costs\.json.*{message}.*orthotrain calibrate"):
        PoetLinear.from_linear(nn.Linear(8, 8), 4)(torch.zeros(1, 8))


@pytest.mark.parametrize("value", [-1.0, "1", None, True, float("nan"), float("inf"), 0.0])
def test_a_cost_that_is_no_time_is_refused(tmp_path, value):
    with pytest.raises(ConfigurationError, match="multiply_add is"):
        read_table(table(tmp_path / "costs.json", multiply_add=value))


def test_the_costs_of_contraction_are_measured_together(tmp_path):
    with pytest.raises(ConfigurationError, match="all or none of those that begin with contract_"):
        read_table(table(tmp_path / "costs.json", contract_call=1.0))


def test_a_table_that_is_named_must_exist(monkeypatch):
    monkeypatch.setenv(VARIABLE, "/nowhere/costs.json")
    with pytest.raises(ConfigurationError, match=r"/nowhere/costs\.json cannot be read"):
        choose_route(ROUTES, 1, 8, 8, 4, 4)


def test_a_compiled_layer_chooses_by_the_number_of_tokens_at_hand(given_table):
    # the table would have contraction, which torch.compile does not take
    given_table(rotate_element=12.0, **CONTRACT)
    layer = PoetLinear.from_linear(nn.Linear(16, 16), 4)
    assert [choose_route(ROUTES[:2], tokens, 16, 16, 4, 4) for tokens in (3, 50)] == ["input", "product"]
    assert layer._route(torch.zeros(50, 16)) == "contraction"
    seen = []

    def counting(graph, _):
        seen.append("fold" if "fold" in graph.code else "block_rotate")
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=counting, dynamic=True)
    for tokens in (2, 50, 3, 60):
        x = torch.randn(tokens, 16)
        torch.testing.assert_close(compiled(x), layer(x))
    assert sorted(seen) == ["block_rotate", "fold"]


def test_a_cpu_of_its_own_kind_has_its_own_costs_and_plain_ones_serve_the_rest(monkeypatch, tmp_path):
    def named(name):
        monkeypatch.setattr("orthotrain.layers.poet.cost_tables.device_name", lambda kind, index=None: name)
        return costs_for("cpu", None, half=True)

    monkeypatch.setenv("ORTHOTRAIN_CACHE", str(tmp_path))
    assert named("cpu, AMX") != named("cpu") == named("cpu, of tomorrow")
