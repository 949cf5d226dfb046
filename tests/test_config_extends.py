"""Settings files that extend others: merged as they say, refused with the file and the line."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.config import Document, Settings, load_extended, load_yaml, merged, part, validated, with_overrides
from backmerge.errors import ConfigError


class Group(Settings):
    """A group."""

    a: int = 0
    b: int = 0
    items: tuple[int, ...] = ()


class Whole(Settings):
    """A whole file."""

    name: str
    group: Group = Group()
    other: Group | None = None


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """`write(NAME, TEXT) -> Path`, folders made."""

    def written(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return written


TREES = st.recursive(
    st.integers() | st.text(max_size=3) | st.none() | st.lists(st.integers(), max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
    max_leaves=12,
)
MAPPINGS = st.dictionaries(st.sampled_from("abcd"), TREES, max_size=4)


def over(under: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """The values of one mapping laid over another."""
    return merged(Document("under", under, {}), Document("above", above, {}), source="both").values


@given(MAPPINGS)
def test_nothing_and_itself_change_nothing(values: dict[str, Any]) -> None:
    """An empty document on either side, and the document itself, leave it as it is."""
    assert over(values, {}) == over({}, values) == over(values, values) == values


@given(MAPPINGS, MAPPINGS, MAPPINGS)
def test_upper_settings_override_any_base(a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]) -> None:
    """Laying the same over what already has it changes nothing more, and no input is changed."""
    before = repr((a, b, c))
    once = over(a, b)
    assert over(once, b) == once
    for key, value in b.items():
        if not isinstance(value, dict):
            assert once[key] == value
    assert repr((a, b, c)) == before


def test_mappings_are_merged_and_lists_are_replaced(write: Any) -> None:
    """Key by key at any depth; a list is one value, and so is null."""
    write("base.yaml", "name: base\ngroup: {a: 1, b: 2, items: [1, 2, 3]}\nother: {a: 5}\n")
    file = write("own.yaml", "extends: base.yaml\nname: own\ngroup: {b: 3, items: [9]}\nother: null\n")
    assert validated(Whole, load_extended(file)) == Whole(name="own", group=Group(a=1, b=3, items=(9,)))


def test_later_files_hold_over_earlier_ones_and_the_file_over_all(write: Any) -> None:
    """A list of files is laid one over the other, in its order."""
    write("one.yaml", "name: one\ngroup: {a: 1, b: 1, items: [1]}\n")
    write("two.yaml", "group: {b: 2, items: [2]}\n")
    file = write("own.yaml", "extends: [one.yaml, two.yaml]\ngroup: {items: [3]}\n")
    assert validated(Whole, load_extended(file)) == Whole(name="one", group=Group(a=1, b=2, items=(3,)))


def test_chains_and_paths_from_each_file_s_own_folder(write: Any) -> None:
    """What is extended may extend: each path is told from the file that it stands in, wherever one works."""
    write("shared/root.yaml", "name: root\ngroup: {a: 1, b: 1}\n")
    write("shared/middle.yaml", "extends: root.yaml\ngroup: {b: 2}\n")
    file = write("runs/deep/own.yaml", "extends: ../../shared/middle.yaml\n")
    assert validated(Whole, load_extended(file)) == Whole(name="root", group=Group(a=1, b=2))


def test_one_file_may_be_reached_twice(write: Any) -> None:
    """Two files that share a third are no circle."""
    write("root.yaml", "name: root\n")
    write("one.yaml", "extends: root.yaml\n")
    write("two.yaml", "extends: root.yaml\nname: two\n")
    assert load_extended(write("own.yaml", "extends: [one.yaml, two.yaml]\n")).values == {"name": "two"}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"own.yaml": "extends: own.yaml\n"}, r"own.yaml, line 1: .*it extends itself: own.yaml → own.yaml"),
        (
            {"own.yaml": "extends: b.yaml\n", "b.yaml": "name: b\nextends: own.yaml\n"},
            r"b.yaml, line 2: .*own.yaml → b.yaml → own.yaml",
        ),
        ({"own.yaml": "name: a\nextends: nowhere.yaml\n"}, r"own.yaml, line 2: there is no file 'nowhere.yaml'"),
        ({"own.yaml": "name: a\nextends: {a: b}\n"}, r"line 2: 'extends' is neither a path nor a list"),
        ({"own.yaml": "extends: [b.yaml, 7]\n", "b.yaml": "name: b\n"}, r"'extends' is neither a path nor a list"),
        ({"own.yaml": "extends: b.yaml\n", "b.yaml": "name: [1\n"}, r"b.yaml is not YAML"),
        ({"own.yaml": "extends: b.yaml\n", "b.yaml": "name: b\nname: c\n"}, r"b.yaml, line 2: 'name' is set twice"),
        ({"own.yaml": "name: a\nscales: small.yaml\n"}, r"own.yaml, line 2: 'scales' is not a mapping"),
        ({"own.yaml": "name: a\nscales:\n  small: s.yaml\n"}, r"own.yaml, line 3: there is no file 's.yaml'"),
    ],
)
def test_a_fault_of_extending_is_named_with_its_file_and_line(write: Any, files: dict[str, str], words: str) -> None:
    """A circle, a missing or damaged file, or a value that is not a path."""
    for name, text in files.items():
        write(name, text)
    with pytest.raises(ConfigError, match=words):
        load_extended(write("own.yaml", files["own.yaml"]))


def test_a_fault_in_an_extended_file_is_named_there(write: Any) -> None:
    """Each value is known by the file that it came from: the extended one, or the one that replaced it."""
    write("base.yaml", "name: base\ngroup:\n  a: many\n  bb: 1\n  items:\n  - 1\n  - x\n")
    file = write("own.yaml", "extends: base.yaml\nnmae: own\ngroup: {b: few}\n")
    with pytest.raises(ConfigError) as caught:
        validated(Whole, load_extended(file))
    lines = str(caught.value).splitlines()
    base = file.with_name("base.yaml")
    assert lines[0] == f"{file} cannot be used:"
    assert any(line.startswith(f"  {base}, line 3: 'group.a'") for line in lines)
    assert any(line.startswith(f"  {base}, line 4: unknown key 'group.bb'; did you mean 'b'") for line in lines)
    assert any(line.startswith(f"  {base}, line 7: 'group.items.1'") for line in lines)
    assert any(line.startswith("  line 3: 'group.b'") for line in lines)
    assert any(line.startswith("  line 2: unknown key 'nmae'; did you mean 'name'") for line in lines)


def test_replaced_value_has_a_new_place(write: Any) -> None:
    """A short list over a long one leaves no line of the long one behind."""
    write("base.yaml", "name: base\ngroup:\n  items:\n  - 1\n  - 2\n  - 3\n")
    file = write("own.yaml", "extends: base.yaml\ngroup: {items: [x]}\n")
    document = load_extended(file)
    assert ("group", "items", 2) not in document.lines
    assert document.place(("group", "items", 0)) == "line 2"
    assert document.place(("name",)) == f"{file.with_name('base.yaml')}, line 1"


def test_options_override_extended_files(write: Any) -> None:
    """--set comes last, and is what a fault of it is called by."""
    write("base.yaml", "name: base\ngroup: {a: 1}\n")
    file = write("own.yaml", "extends: base.yaml\n")
    document = with_overrides(load_extended(file), ["group.a=7", "group.b=x"])
    with pytest.raises(ConfigError, match=r"--set group.b=x: 'group.b'"):
        validated(Whole, document)
    assert validated(Whole, with_overrides(document, ["group.b=2"])).group == Group(a=7, b=2)


def test_a_scale_goes_over_all(write: Any) -> None:
    """Asked for, its files are laid over the file itself; else nothing of them is read."""
    write("small.yaml", "extends: tiny.yaml\ngroup: {a: 10}\n")
    write("tiny.yaml", "group: {a: 9, b: 9}\n")
    write("base.yaml", "name: base\nscales: {small: small.yaml}\n")
    file = write("own/own.yaml", "extends: ../base.yaml\ngroup: {a: 1, b: 1, items: [1]}\n")
    assert validated(Whole, load_extended(file)).group == Group(a=1, b=1, items=(1,))
    assert validated(Whole, load_extended(file, "small")).group == Group(a=10, b=9, items=(1,))
    assert load_extended(file, "small").source == str(file)
    with pytest.raises(ConfigError, match="has no scale 'smal'; did you mean 'small'"):
        load_extended(file, "smal")


def test_a_scale_of_the_file_itself_holds_over_an_extended_one(write: Any) -> None:
    """Two files may offer one scale: the nearer is taken."""
    write("far.yaml", "name: far\n")
    write("near.yaml", "name: near\n")
    write("base.yaml", "name: base\nscales: {small: far.yaml, large: far.yaml}\n")
    file = write("own.yaml", "extends: base.yaml\nscales: {small: near.yaml}\n")
    assert load_extended(file, "small").values["name"] == "near"
    assert load_extended(file, "large").values["name"] == "far"


def test_a_scale_may_be_no_need(write: Any) -> None:
    """A file that has no such scale is as it is, where the caller says so."""
    file = write("own.yaml", "name: a\n")
    assert load_extended(file, "small", needs_scale=False) == load_extended(file)
    with pytest.raises(ConfigError, match="no scale 'small'"):
        load_extended(file, "small")


def test_a_part_keeps_its_lines(write: Any) -> None:
    """What stands under a key is known by the file and the line that it came from."""
    write("base.yaml", "set:\n  group: {a: 1}\n")
    file = write("own.yaml", "extends: base.yaml\nset:\n  group:\n    b: x\n")
    found = part(load_extended(file), ("set",))
    assert found.values == {"group": {"a": 1, "b": "x"}}
    assert found.place(("group", "b")) == "line 4"
    assert found.place(("group", "a")) == f"{file.with_name('base.yaml')}, line 2"
    assert part(Document("own", {"set": None}, {}), ("set",)).values == {}


def test_a_plain_file_is_read_as_before(write: Any) -> None:
    """Where nothing is extended, both readers give the same."""
    file = write("own.yaml", "name: a\ngroup: {a: 1}\n")
    assert load_extended(file) == load_yaml(file)
