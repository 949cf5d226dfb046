"""Experiment files: read as what they say, or refused with the line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from backmerge.config import Document, Problems, Settings, load_yaml, validated, with_overrides
from backmerge.errors import CheckpointError, ConfigError, DataError
from backmerge.planning.settings import as_stored


class Inner(Settings):
    """A group within a group."""

    margin: Annotated[float, Field(gt=0, lt=1)] = 0.03
    rule: Literal["safe", "bold"] = "safe"


class Sweep(Settings):
    """An item of a list."""

    method: str = "linear"
    lam: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.5,)
    parameters: Mapping[str, Any] = Field(default_factory=dict)


class Outer(Settings):
    """A whole file."""

    name: str
    limit: int | None = None
    choice: Inner = Inner()
    finetune: Inner | None = None
    merge: tuple[Sweep, ...] = (Sweep(),)


WHOLE = """\
# a comment
name: mine
choice:
  margin: 0.05
merge:
  - method: linear
    lam: [0.2, 0.4]
  - method: slerp
    lam:
      - 0.5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file to be written."""
    return tmp_path / "experiment.yaml"


def read(file: Path, text: str, *overrides: str) -> Outer:
    """The settings of a text, with options."""
    file.write_text(text)
    return validated(Outer, with_overrides(load_yaml(file), overrides))


def refused(file: Path, text: str, words: str, *overrides: str) -> str:
    """The text is refused with those words; the whole message."""
    with pytest.raises(ConfigError, match=words) as caught:
        read(file, text, *overrides)
    return str(caught.value)


def test_a_file_is_read(file: Path) -> None:
    """Values, lists and defaults by hand."""
    outer = read(file, WHOLE)
    assert outer.name == "mine"
    assert outer.choice == Inner(margin=0.05)
    assert [(sweep.method, sweep.lam) for sweep in outer.merge] == [("linear", (0.2, 0.4)), ("slerp", (0.5,))]


def test_settings_are_frozen(file: Path) -> None:
    """What was validated cannot be changed afterwards."""
    outer = read(file, WHOLE)
    with pytest.raises(ValidationError):
        outer.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nname: b\n", "line 2: 'name' is set twice .first on line 1"),
        ("name: a\nchoice:\n  margin: 0.1\n  rule: safe\n  margin: 0.2\n", "line 5: 'choice.margin' is set twice"),
        ("name: a\nmerge:\n - lam: [0.1]\n   lam: [0.2]\n", "line 4: 'merge.0.lam' is set twice"),
        ("name: a\n'name': b\n", "line 2: 'name' is set twice"),
    ],
)
def test_a_repeated_key_is_refused(file: Path, text: str, words: str) -> None:
    """YAML itself would take the last without a word, at any depth."""
    refused(file, text, words)


def test_equal_keys_in_two_list_items_are_allowed(file: Path) -> None:
    """Two items of a list may each have a `method`."""
    assert len(read(file, "name: a\nmerge: [{method: x}, {method: y}]\n").merge) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: a\nlimmit: 3\n", "line 2: unknown key 'limmit'; did you mean 'limit'"),
        ("name: a\nchoice:\n  margn: 0.1\n", "line 3: unknown key 'choice.margn'; did you mean 'margin'"),
        ("name: a\nfinetune:\n  margn: 0.1\n", "line 3: unknown key 'finetune.margn'; did you mean 'margin'"),
        (
            "name: a\nmerge:\n  - lam: [.1]\n  - metod: x\n",
            "line 4: unknown key 'merge.1.metod'; did you mean 'method'",
        ),
        ("name: a\nqqqq: 1\n", "line 2: unknown key 'qqqq'$"),
        ("name: a\nmerge:\n - lam:\n   - 0.5\n   - 1.5\n", "line 5: 'merge.0.lam.1': 1.5 should be less than 1"),
        ("name: a\nchoice:\n  rule: boldly\n", "line 3: 'choice.rule': 'boldly' should be 'safe' or 'bold'"),
        ("name: a\nlimit: many\n", "line 2: 'limit': 'many' should be a valid integer"),
        ("limit: 3\n", "'name' is required"),
        ("name: a\nchoice: 3\n", "line 2: 'choice': 3 should be a valid dictionary"),
        ("name: 2024-01-01\n", "line 1: 'name': 2024-01-01 should be a valid string"),
        ("name: a\n1: b\n", "Keys should be strings"),
    ],
)
def test_a_fault_is_named_with_its_line(file: Path, text: str, words: str) -> None:
    """A misspelt key, a value out of range, of another type, or absent: key, line, and the likely word."""
    refused(file, text, rf"(?m){words}")


def test_all_faults_are_reported_at_once(file: Path) -> None:
    """One line for each."""
    message = refused(file, "limmit: 3\nchoice:\n  margin: 7\n", "cannot be used")
    assert all(words in message for words in ("line 1: unknown key", "line 3: 'choice.margin'", "'name' is required"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no settings"),
        ("- a\n- b\n", "has no settings"),
        ("just words\n", "has no settings"),
        ("name: [1, 2\n", "is not YAML"),
        ("name: a\n\tlimit: 3\n", "is not YAML"),
        ("name: !!python/object/apply:os.system ['true']\n", "is not YAML"),
        ("name: 2024-13-45\n", "is not YAML"),
        ("limit: 0x_\nname: a\n", "is not YAML"),
        ("? [a, b]\n: c\n", "is not YAML"),
        ("name: a\n---\nname: b\n", "is not YAML"),
        ("name: " + "[" * 1200 + "]" * 1200 + "\n", "is not YAML"),
        ("name: &x\n  - *x\n", "line 1: 'name.0' contains itself|line 2: 'name.0' contains itself"),
    ],
    ids=[
        "empty", "list", "words", "open", "tab", "python", "date", "number", "key", "two", "deep", "endless"
    ],
)  # fmt: skip
def test_files_without_settings_are_refused(file: Path, text: str, words: str) -> None:
    """Other YAML, broken YAML, YAML that would run code, and what pyyaml itself stumbles over: one clear error."""
    refused(file, text, words)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    """Absent, a folder, or not UTF-8."""
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    for path in (tmp_path / "absent.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match="cannot read"):
            load_yaml(path)


def test_anchors_and_a_byte_order_mark_are_read(file: Path) -> None:
    """Common habits of editors and authors are not faults."""
    text = "\ufeffname: a\nchoice: &c {margin: 0.1}\nfinetune: *c\nmerge: [&s {method: x}, {<<: *s, lam: [0.1]}]\n"
    outer = read(file, text)
    assert outer.finetune == outer.choice == Inner(margin=0.1)
    assert outer.merge[1] == Sweep(method="x", lam=(0.1,))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("name=other", {"name": "other"}),
        ("choice.margin=0.1", {"choice": Inner(margin=0.1)}),
        ("limit=7", {"limit": 7}),
        ("limit=null", {"limit": None}),
        ("finetune.rule=bold", {"finetune": Inner(rule="bold")}),
        ("merge.1.lam=[0.1, 0.9]", {}),
        ("merge=[{method: x}]", {"merge": (Sweep(method="x"),)}),
        ("name=a=b", {"name": "a=b"}),
        ("name='1'", {"name": "1"}),
    ],
)
def test_an_option_takes_the_place_of_a_value(file: Path, override: str, expected: dict[str, Any]) -> None:
    """--set reads its value as YAML, makes groups that are not there, and reaches into lists."""
    outer = read(file, WHOLE, override)
    assert outer == read(file, WHOLE).model_copy(update=expected) or not expected
    if not expected:
        assert outer.merge[1].lam == (0.1, 0.9)
        assert outer.merge[0].lam == (0.2, 0.4)


def test_the_last_option_counts_and_the_document_stays(file: Path) -> None:
    """Two options for one key: the later. The document that they are applied to is not changed."""
    file.write_text(WHOLE)
    document = load_yaml(file)
    changed = with_overrides(document, ["choice.margin=0.1", "choice.margin=0.2", "merge.0.lam=[0.3]"])
    assert validated(Outer, changed).choice.margin == 0.2
    assert validated(Outer, document) == read(file, WHOLE)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("name", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("name=[1", "the value is not YAML"),
        ("name=2024-13-45", "the value is not YAML"),
        ("merge.7.lam=[0.1]", "'merge' is a list of 2; '7' is not in it"),
        ("merge.-1.lam=[0.1]", "'-1' is not in it"),
        ("merge.².lam=[0.1]", "'²' is not in it"),
        ("merge.first.lam=[0.1]", "'first' is not in it"),
        ("name.first=3", "'name' is a single value and has no keys"),
        ("choice.margin.low=3", "'choice.margin' is a single value"),
        ("choice.margn=0.1", "--set choice.margn=0.1: unknown key 'choice.margn'; did you mean 'margin'"),
        ("choice.margin=7", "--set choice.margin=7: 'choice.margin': 7 should be less than 1"),
        ("merge.1.lam=[0.1, 3]", r"--set merge.1.lam=\[0.1, 3\]: 'merge.1.lam.1'"),
    ],
)
def test_a_wrong_option_is_named(file: Path, override: str, words: str) -> None:
    """A fault of an option is told of the option, not of the line in the file that it replaced."""
    message = refused(file, WHOLE, words, override)
    assert "  line " not in message


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
OUTERS = st.builds(
    Outer,
    name=NAMES | st.sampled_from(["null", "yes", "1e-3", "~", "0x1", "2024-01-01", "1_000", "", " ", "a: b", "# c"]),
    limit=st.none() | st.integers(),
    choice=st.builds(Inner, margin=st.floats(0, 1, exclude_min=True, exclude_max=True)),
    merge=st.lists(
        st.builds(
            Sweep,
            method=NAMES,
            lam=st.lists(st.floats(0, 1, exclude_min=True, exclude_max=True), max_size=3).map(tuple),
            parameters=st.dictionaries(NAMES, st.integers() | st.booleans() | NAMES, max_size=2),
        ),
        max_size=2,
    ).map(tuple),
)


def test_stored_settings_read_back(tmp_path: Path) -> None:
    """The resolved configuration in a run directory is the one that ran: to the last bit, whatever the words."""

    @given(outer=OUTERS)
    def check(outer: Outer) -> None:
        (tmp_path / "resolved.yaml").write_bytes(as_stored(outer).encode())
        assert validated(Outer, load_yaml(tmp_path / "resolved.yaml")) == outer

    check()


def test_every_default_is_written(file: Path) -> None:
    """A later version's other defaults cannot change what a resolved file says."""
    text = as_stored(read(file, "name: a\n"))
    assert all(f"{key}:" in text for key in ("limit", "margin", "rule", "finetune", "method", "lam", "parameters"))


def test_a_document_needs_no_file() -> None:
    """Settings put together by the command line go the same way, and their faults name what stands for the file."""
    with pytest.raises(ConfigError, match="restore cannot be used:\n  'name' is required"):
        validated(Outer, Document("restore", {}, {}))


def test_aliases_that_multiply_are_refused_at_once(tmp_path: Path) -> None:
    """Half a kilobyte of aliases stands for billions of values: one message, no hang; a few aliases are fine."""
    file = tmp_path / "e.yaml"
    lines = ["a0: &a0 [x, x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12))]
    file.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="its aliases repeat one another"):
        load_yaml(file)
    file.write_text("\n".join(lines[:3]))
    assert len(load_yaml(file).values) == 3


def test_one_problem_keeps_its_kind_and_gets_its_line(file: Path) -> None:
    """It is the error that was raised, whose message starts with the place of the key."""
    file.write_text("base: a\nevaluate:\n  safety:\n    - b.csv\n")
    problems = Problems(load_yaml(file))
    problems.raise_any()
    with problems.at("evaluate", "safety", 0):
        raise DataError("there is no file 'b.csv'", remedy="give one.")
    with pytest.raises(DataError) as caught:
        problems.raise_any()
    assert str(caught.value) == f"{file}, line 4, evaluate.safety.0: there is no file 'b.csv'\n  → give one."


def test_several_problems_are_one_error(file: Path) -> None:
    """Each with its line or with its option, once; what has no place is reported all the same."""
    file.write_text("base: a\nevaluate:\n  safety:\n    - b.csv\n")
    problems = Problems(with_overrides(load_yaml(file), ["tuned=[x]"]))
    for _ in range(2):
        with problems.at("base"):
            raise CheckpointError("there is no model 'a'")
    with problems.at("tuned", 0):
        raise CheckpointError("there is no model 'x'", remedy="give a folder.")
    with problems.at("choice", "margin"):
        raise ConfigError("too much")
    with pytest.raises(ConfigError) as caught:
        problems.raise_any()
    assert str(caught.value).splitlines() == [
        f"{file} cannot be used: 3 problems",
        "  line 1, base: there is no model 'a'",
        "  --set tuned=[x]: there is no model 'x'",
        "    → give a folder.",
        "  too much",
    ]


def test_problems_of_a_command_name_its_options() -> None:
    """Nobody who typed an option reads of a key."""
    document = Document(
        "the command line", {"evaluate": {"safety": ["b"]}}, {}, options={("evaluate", "safety"): "--safety"}
    )
    problems = Problems(document)
    problems.note(DataError("there is no file 'b'"), ("evaluate", "safety", 0))
    with pytest.raises(DataError, match=r"^--safety: there is no file 'b'$"):
        problems.raise_any()


def test_many_problems_are_cut(file: Path) -> None:
    """A message stays readable, and says how many more there are."""
    problems = Problems()
    for number in range(40):
        problems.note(ConfigError(f"{number} " + "x" * 100))
    with pytest.raises(ConfigError, match=r"and \d+ more$") as caught:
        problems.raise_any()
    assert len(str(caught.value)) < 2_000
