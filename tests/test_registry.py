"""Names that stand for things, and how a wrong one is answered."""

import inspect
import sys
import types
from pathlib import Path

import pytest

from backmerge import registry
from backmerge.errors import ConfigError
from backmerge.generation.protocol import Generator, engine_class
from backmerge.judging.protocol import JudgeSettings
from backmerge.planning.prepare import find_judge
from backmerge.registry import ENGINES, METHODS, Permissions, Table, closest, is_plugin, resolve

TABLES = [table for table in vars(registry).values() if isinstance(table, Table)]
ENTRIES = [(table, name) for table in TABLES for name in table.entries]


@pytest.mark.parametrize(("table", "name"), ENTRIES, ids=[f"{table.noun} {name}" for table, name in ENTRIES])
def test_every_entry_is_there(table: Table, name: str) -> None:
    """Each name of each table leads to something callable that says what it is."""
    found = resolve(table, name)
    assert callable(found)
    assert inspect.getdoc(found)


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    """The error has the likely name and all known ones."""
    with pytest.raises(ConfigError, match="no merge method named 'linaer'; did you mean 'linear'") as caught:
        resolve(METHODS, "linaer")
    assert "linear" in (caught.value.remedy or "")
    assert closest("zzz", METHODS.entries) == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("package.module:function", True),
        ("module:f", True),
        ("linear", False),
        (":f", False),
        ("m:", False),
        ("a..b:f", False),
        ("C:\\data.csv", False),
        ("m:f.g", False),
        ("os;:f", False),
    ],
)
def test_what_counts_as_code(name: str, expected: bool) -> None:
    """Only module:function, both of plain Python names."""
    assert is_plugin(name) is expected


def test_own_code_needs_permission_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --allow-plugins a module is not even imported; with it, its function is found."""
    (tmp_path / "own_methods_7.py").write_text("def mine():\n    return 'mine'\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="your own code") as caught:
        resolve(METHODS, "own_methods_7:mine")
    assert "--allow-plugins" in (caught.value.remedy or "")
    assert "own_methods_7" not in sys.modules
    assert resolve(METHODS, "own_methods_7:mine", permissions=Permissions(plugins=True))() == "mine"
    with pytest.raises(ConfigError, match="cannot be imported"):
        resolve(METHODS, "own_methods_7:absent", permissions=Permissions(plugins=True))
    with pytest.raises(ConfigError, match="cannot be imported"):
        resolve(METHODS, "no_such_module_7:mine", permissions=Permissions(plugins=True))


def test_a_table_comes_before_code() -> None:
    """A known name is never treated as a module."""
    assert resolve(Table("thing", {"os:getcwd": "math:floor"}), "os:getcwd")(1.5) == 1


def test_a_plugin_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine and a judge subclass their base class, whose attributes declare what they can do."""
    module = types.SimpleNamespace(engine=dict, judge=lambda settings: settings)
    monkeypatch.setitem(sys.modules, "own_parts_7", module)
    allowed = Permissions(plugins=True)
    with pytest.raises(ConfigError, match="not an engine"):
        engine_class("own_parts_7:engine", allowed)
    with pytest.raises(ConfigError, match="does not make a judge"):
        find_judge(JudgeSettings(name="own_parts_7:judge"), allowed)


@pytest.mark.parametrize("name", sorted(ENGINES.entries))
def test_every_engine_declares_what_it_can_do(name: str) -> None:
    """Likelihoods are declared by those that override the method, and by no other."""
    engine = engine_class(name)
    assert engine.gives_likelihoods is (engine.log_likelihoods is not Generator.log_likelihoods)
