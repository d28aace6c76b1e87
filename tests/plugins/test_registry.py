import importlib
import sys
import textwrap

import pytest

from orthotrain.plugins import Cayley, CayleyNeumann, Parameterization, create, get, known, register, registry

HALF_TURN = """
    from orthotrain.plugins import Cayley

    class HalfTurn(Cayley):
        '''Stands in for a parameterization of another package.'''
"""


class Unregistered(Cayley):
    """Has no name, only an import path."""

    def __init__(self, gain: float = 1.0) -> None:
        self.gain = gain


@pytest.fixture(autouse=True)
def fresh_registry(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    registry._entry_points.cache_clear()
    yield
    registry._entry_points.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a distribution with one module and the given entry points on the import path."""

    def make(distribution, source, **entry_points):
        folder = tmp_path / distribution
        metadata = folder / f"{distribution}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (folder / f"{distribution}.py").write_text(textwrap.dedent(source))
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in entry_points.items())
        (metadata / "entry_points.txt").write_text(f"[orthotrain.parameterizations]\n{lines}")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, distribution, raising=False)
        importlib.invalidate_caches()

    return make


def test_the_built_in_ones_are_known_by_name():
    assert {"cayley", "cayley_neumann", "exponential"} <= set(known())
    assert get("cayley_neumann") is CayleyNeumann
    assert list(known()) == sorted(known())


def test_a_name_is_given_once_and_a_class_named_once():
    with pytest.raises(ValueError, match=r"'cayley' is already registered; known: .*cayley_neumann, exponential"):
        register("cayley")(type("Other", (Cayley,), {}))
    with pytest.raises(ValueError, match="cannot register Cayley as 'again': it is already 'cayley'"):
        register("again")(Cayley)
    with pytest.raises(ValueError, match="not a concrete subclass of Parameterization"):
        register("number")(int)
    assert get("cayley") is Cayley


def test_a_subclass_of_a_registered_class_is_another_map():
    child = register("child")(type("Child", (CayleyNeumann,), {}))
    assert child(3).config() == {"class_path": "child", "init_args": {"order": 3}}
    assert child(3) != CayleyNeumann(3)
    assert CayleyNeumann(3).config()["class_path"] == "cayley_neumann"


def test_an_unknown_name_gets_a_suggestion_and_the_list():
    with pytest.raises(ValueError, match=r"'caley' \(did you mean 'cayley'\?\); known: cayley, .*exponential"):
        get("caley")
    with pytest.raises(ValueError, match=r"'CayleyNeuman' \(did you mean 'CayleyNeumann'\?\)"):
        create("CayleyNeuman")


@pytest.mark.parametrize(
    "spec",
    [
        "cayley_neumann",
        "CayleyNeumann",
        "orthotrain.plugins.CayleyNeumann",
        "orthotrain.plugins.cayley_neumann.CayleyNeumann",
    ],
)
def test_create_takes_names_class_names_and_paths(spec):
    assert create(spec) == CayleyNeumann(4)
    assert create({"class_path": spec, "init_args": {"order": 2}}) == CayleyNeumann(2)
    assert create({"class_path": spec, "init_args": None}) == CayleyNeumann(4)


def test_create_returns_a_parameterization_as_it_is():
    parameterization = CayleyNeumann(6)
    assert create(parameterization) is parameterization


def test_a_class_without_a_name_is_stored_by_its_path():
    assert Unregistered(2.0).config() == {"class_path": f"{__name__}.Unregistered", "init_args": {"gain": 2.0}}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"class_path": "cayley_neumann", "init_args": {"ordr": 3}},
            "CayleyNeumann: .*'ordr'; accepted: order: int = 4",
        ),
        ({"class_path": "cayley", "init_args": {"order": 3}}, "Cayley: .*'order'; accepted: none"),
        ({"class_path": "cayley_neumann", "init_args": {"order": 0}}, "CayleyNeumann: order must be .* got 0"),
        ({"class_path": "cayley_neumann", "init_args": [4]}, r"CayleyNeumann: init_args must be a mapping.*\[4\]"),
        ({"class_path": "cayley", "order": 3}, "cayley: unexpected order beside class_path and init_args"),
        ({"init_args": {}}, "a parameterization is a name or"),
        (4, "a parameterization is a name or .* got 4"),
        ("torch.nn.Linear", "'torch.nn.Linear' is not a concrete subclass of orthotrain.plugins.P"),
        ("no_such_package.Map", "cannot import parameterization 'no_such_package.Map': No module named"),
        ("orthotrain.plugins.Missing", "cannot import parameterization 'orthotrain.plugins.Missing'"),
        ("orthotrain.plugins.Parameterization", "is not a concrete subclass of"),
    ],
)
def test_create_says_what_is_wrong(spec, message):
    with pytest.raises(ValueError, match=message):
        create(spec)


def test_a_class_name_shared_by_two_registered_classes_is_ambiguous():
    register("one")(type("Twin", (Cayley,), {}))
    register("two")(type("Twin", (Cayley,), {}))
    with pytest.raises(ValueError, match="'Twin' is ambiguous, use a name: one, two"):
        create("Twin")


def test_an_installed_package_is_found_by_name_and_imported_only_then(install):
    install("half_turn", HALF_TURN, half_turn="half_turn:HalfTurn")
    assert get("cayley") is Cayley
    assert "half_turn" not in sys.modules
    with pytest.raises(ValueError, match="known: cayley, cayley_neumann, exponential, half_turn"):
        get("nothing")
    assert "half_turn" not in sys.modules
    parameterization = create("half_turn")
    assert isinstance(parameterization, Parameterization)
    assert parameterization.config() == {"class_path": "half_turn", "init_args": {}}
    assert create("HalfTurn") == parameterization
    assert "half_turn" in known()


def test_an_installed_class_may_register_itself(install):
    source = HALF_TURN.replace("import Cayley", "import Cayley, register").replace(
        "class HalfTurn", "@register('half_turn')\n    class HalfTurn"
    )
    install("half_turn", source, half_turn="half_turn:HalfTurn")
    assert create("half_turn").config()["class_path"] == "half_turn"
    assert "half_turn" in known()


@pytest.mark.parametrize(
    ("source", "value", "reason"),
    [
        ("import no_such_dependency", "broken_one:Map", "ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("x = 1", "broken_one:Map", "AttributeError"),
        ("Map = int", "broken_one:Map", "cannot register .* not a concrete subclass of Parameterization"),
    ],
)
def test_a_broken_package_is_named_and_stops_nobody_else(install, source, value, reason):
    install("broken_one", source, broken=value)
    with pytest.raises(ValueError, match=rf"entry point 'broken' \({value}\) of broken_one is broken: .*{reason}"):
        get("broken")
    with pytest.raises(ValueError, match="broken_one"):
        known()
    assert create("cayley_neumann") == CayleyNeumann()


def test_two_packages_or_a_built_in_cannot_share_a_name(install):
    install("half_turn", HALF_TURN, half_turn="half_turn:HalfTurn", cayley="half_turn:HalfTurn")
    with pytest.raises(ValueError, match=r"entry point 'cayley' .* of half_turn is broken: .* already registered"):
        get("cayley")
    install("other_turn", HALF_TURN, half_turn="other_turn:HalfTurn")
    registry._entry_points.cache_clear()
    with pytest.raises(ValueError, match=r"entry point 'half_turn' .* is broken: .* already registered"):
        get("half_turn")
