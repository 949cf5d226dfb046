"""The presets: rows of the published data, real ones where they are at hand, become the paper's examples."""

from __future__ import annotations

import doctest
import importlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from backmerge.benchmarks.openfunctions import function_prompt
from backmerge.errors import ConfigError, DataError
from backmerge.finetuning.data_settings import DataSettings
from backmerge.finetuning.datasets import HELPFUL, Task, load_training_data
from backmerge.finetuning.shapes import RowError
from backmerge.finetuning.tasks.code import code
from backmerge.finetuning.tasks.medical import DOCTOR, medical
from backmerge.finetuning.tasks.reasoning import reasoning
from backmerge.finetuning.tasks.tools import tools
from backmerge.records import Message
from backmerge.registry import DATASETS, resolve

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
NEEDS_FLAN = pytest.mark.skipif(not (SHARED / "flan_cot").is_dir(), reason="Flan CoT is not in ../shared/data")
NEEDS_TOOLS = pytest.mark.skipif(
    not (SHARED / "openfunctions").is_dir(), reason="OpenFunctions is not in ../shared/data"
)

TASKS = [task for task in (resolve(DATASETS, name)() for name in DATASETS.entries) if isinstance(task, Task)]
EACH_TASK = pytest.mark.parametrize("task", TASKS, ids=[task.name for task in TASKS])
FAMILIES = ("llama", "gemma", "gemma2", "qwen2", "never-heard-of")

SPECIFICATION = {"name": "Alarm", "api_name": "alarm.set", "parameters": [{"name": "hour", "description": "0 to 23"}]}
CALL = "alarm.set(hour=7)"
ROWS: Mapping[str, Mapping[str, Any]] = {
    "reasoning": {"inputs": "Do kites need wind?", "targets": "Lift needs moving air. The answer is yes."},
    "medical": {"instruction": DOCTOR, "input": "My knee aches. What helps?", "output": "Rest it."},
    "code": {"lang": "python", "problem": "Double a number.", "solution": "def double(x):\n    return 2 * x"},
    "tools": {"question": "Wake me at seven.", "function": SPECIFICATION, "model_answer": CALL},
}


def written(path: Path, *rows: Any) -> str:
    """The path of a JSON Lines file with these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def whole(file: str, **settings: Any) -> DataSettings:
    """All of a file, nothing held out."""
    return DataSettings(file=file, validation=0, num_examples=10**9, **settings)


@EACH_TASK
def test_presets_are_complete(task: Task) -> None:
    """Each is in the table under its own name, says where its data are and under which licence, and pins the hub's."""
    assert resolve(DATASETS, task.name)().name == task.name
    assert task.hub is None or (task.hub.revision and len(task.hub.revision) == 40)
    described = importlib.import_module(f"backmerge.finetuning.tasks.{task.name}").__doc__ or ""
    for part in ("licence" if task.name == "medical" else "(", "Worked example", "Source:", "The paper"):
        assert part in described
    assert all(task.system(family) for family in FAMILIES)
    assert set(ROWS[task.name]) <= {*task.columns, "instruction"}


@EACH_TASK
def test_worked_examples_work(task: Task) -> None:
    """The examples in the docstrings give what they say."""
    module = importlib.import_module(f"backmerge.finetuning.tasks.{task.name}")
    assert doctest.testmod(module).failed == 0


@EACH_TASK
@pytest.mark.parametrize("family", FAMILIES)
def test_system_prompts(task: Task, family: str, tmp_path: Path) -> None:
    """The preset's own stands in front, for every family; the user's replaces it, or takes it away."""
    file = written(tmp_path / "a.jsonl", ROWS[task.name])
    (own,) = load_training_data(task.name, whole(file), 0, family=family).training
    assert own.messages[0] == Message("system", DOCTOR if task.name == "medical" else HELPFUL)
    (other,) = load_training_data(task.name, whole(file, system="Be brief."), 0, family=family).training
    assert other.messages == (Message("system", "Be brief."), *own.messages[1:])
    (none,) = load_training_data(task.name, whole(file, system=""), 0, family=family).training
    assert none.messages == own.messages[1:]


def test_model_family_may_have_its_own_system_prompt() -> None:
    """Named families come before the entry for all others; with neither there is none."""
    task = Task("x", None, (), reasoning().draft, {"": "For all.", "gemma": ""})
    assert (task.system("llama"), task.system("gemma"), task.system("")) == ("For all.", "", "For all.")
    assert Task("x", None, (), reasoning().draft, {"gemma": "Hi."}).system("llama") == ""


@EACH_TASK
def test_other_column_names(task: Task, tmp_path: Path) -> None:
    """A copy whose columns have other names is read by a mapping; a misspelt name of ours is reported."""
    names = [name for name in ROWS[task.name] if name in task.columns]
    row = {f"my_{name}" if name in names else name: value for name, value in ROWS[task.name].items()}
    file = written(tmp_path / "a.jsonl", row)
    mapped = load_training_data(task.name, whole(file, columns={name: f"my_{name}" for name in names}), 0)
    straight = load_training_data(task.name, whole(written(tmp_path / "a.jsonl", ROWS[task.name])), 0)
    assert mapped.training == straight.training
    with pytest.raises(
        ConfigError, match=rf"maps '{names[0]}x', which is not a known column(.|\n)*did you mean '{names[0]}'"
    ):
        load_training_data(task.name, whole(file, columns={f"{names[0]}x": "y"}), 0)


@EACH_TASK
def test_blank_rows_of_published_data_are_left_out_and_counted(task: Task, tmp_path: Path) -> None:
    """A blank text drops the row, with a note; a missing column or another type is an error with its line."""
    good = ROWS[task.name]
    last = next(name for name in reversed(task.columns if task.name != "tools" else ("model_answer",)) if name in good)
    blank = {**good, last: " "}
    data = load_training_data(task.name, whole(written(tmp_path / "a.jsonl", good, blank, good, blank)), 0)
    assert [example.id for example in data.training] == ["a-1", "a-3"]
    assert "2 rows dropped, because a text is empty" in data.notes
    assert (data.source["num_rows"], data.source["num_dropped"], data.source["num_sampled"]) == (4, 2, 2)
    with pytest.raises(DataError, match="contains no rows"):
        load_training_data(task.name, whole(written(tmp_path / "a.jsonl", blank)), 0)
    for bad in ({"text": "a"}, {**good, last: {"a": "b"}}):
        with pytest.raises(DataError, match=r"a\.jsonl, line 2: "):
            load_training_data(task.name, whole(written(tmp_path / "a.jsonl", good, bad, blank)), 0)


def test_the_papers_sizes() -> None:
    """10,000 of each, uniform by language for code only; tools are taken whole, and have no hub to come from."""
    assert [task.num_examples for task in (reasoning(), medical(), code(), tools())] == [10_000, 10_000, 10_000, None]
    assert [task.name for task in TASKS if task.is_uniform_by_category] == ["code"]
    with pytest.raises(ConfigError, match=r"'tools' are not on the hub(.|\n)*data\.file"):
        load_training_data("tools", DataSettings(), 0)


# ------------------------------------------------------------------ reasoning


@NEEDS_FLAN
def test_flan_as_published() -> None:
    """Each of the 33,443 rows of the seven tables is a question and its chain of thought, ending in its answer."""
    data = load_training_data("reasoning", whole(str(SHARED / "flan_cot")), 0)
    assert len(data.training) == len({example.id for example in data.training}) == 33_443
    assert Counter(example.id.rpartition("-")[0] for example in data.training)["gsm8k_train"] == 7473
    for example in data.training:
        assert example.prompt.startswith("Q: ")
        assert example.prompt.endswith("\nLet's think step by step below.")
        assert example.reference is not None
        assert "\nThus, the answer is " in example.reference
        assert example.reference.endswith(".")
        assert not re.search(r"\\[n\n]", example.prompt + example.reference)


@NEEDS_FLAN
def test_a_row_of_flan_by_hand() -> None:
    """The first of GSM8K and of AQuA, whose line breaks are written out in the tables."""
    by_id = {e.id: e for e in load_training_data("reasoning", whole(str(SHARED / "flan_cot")), 0).training}
    first = by_id["gsm8k_train-1"]
    assert first.prompt == (
        "Q: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many "
        "clips did Natalia sell altogether in April and May?\nLet's think step by step below."
    )
    assert first.reference == (
        "Natalia sold 48 / 2 = 24 clips in May. Natalia sold 48 + 24 = 72 clips altogether in April and May.\n"
        "Thus, the answer is 72."
    )
    second = by_id["aqua_train-2"]
    assert second.prompt.splitlines()[:3] == [
        "Q: The edge of a cube is 7a cm. Find its surface?",
        "Options:",
        "(A) 24a8",
    ]
    assert second.reference == "6a2 = 6 * 7a * 7a = 294a2\nThus, the answer is (E)."


@NEEDS_FLAN
def test_the_papers_reasoning_data() -> None:
    """10,000 sampled, 9,000 to train on, 1,000 held out; one file alone will do too."""
    data = load_training_data("reasoning", DataSettings(file=str(SHARED / "flan_cot")), 42)
    assert (len(data.training), len(data.validation)) == (9000, 1000)
    assert "10,000 of 33,443 examples were sampled (seed 42)" in data.notes
    one = load_training_data("reasoning", DataSettings(file=str(SHARED / "flan_cot" / "qasc_train.tsv")), 42)
    assert len(one.training) + len(one.validation) == 1084
    assert set(one.source["files"]) == {"qasc_train.tsv"}


def test_flans_templates_are_kept(tmp_path: Path) -> None:
    """The hub's rows have been formed by Flan already, and are taken as they are, whatever else they hold."""
    row = {**ROWS["reasoning"], "_template_idx": 3, "_task_source": "CoT", "_task_name": "cot_kites"}
    (example,) = load_training_data("reasoning", whole(written(tmp_path / "cot_zs_submix_data.json", row)), 0).training
    assert (example.id, example.prompt, example.reference) == (
        "cot_zs_submix_data-1",
        "Do kites need wind?",
        "Lift needs moving air. The answer is yes.",
    )


def test_a_table_with_a_field_too_few(tmp_path: Path) -> None:
    """The file and the line are named, and the fields that there should be."""
    (tmp_path / "x_train.tsv").write_text("q\ta\tr\nq\ta\n", encoding="utf-8")
    words = r"x_train\.tsv, line 2: 2 fields between tabs, not 3 \(input, target, rationale\)"
    with pytest.raises(DataError, match=words):
        load_training_data("reasoning", whole(str(tmp_path)), 0)


# ------------------------------------------------------------- medical, code


def test_medical_rows() -> None:
    """The patient's words are the prompt; the instruction, which is the same everywhere, is the system prompt."""
    draft = medical().draft(ROWS["medical"])
    assert (draft.messages, draft.reference) == ((Message("user", "My knee aches. What helps?"),), "Rest it.")
    assert medical().system("llama") == ROWS["medical"]["instruction"]


def test_code_is_sampled_evenly_by_language(tmp_path: Path) -> None:
    """As many of each language, but for those that have fewer, whose share the others take over."""
    available = {"python": 60, "Java": 30, "java": 10, "rust": 5}
    rows = [{"lang": n, "problem": f"{n} {i}", "solution": "x"} for n, count in available.items() for i in range(count)]
    settings = DataSettings(file=written(tmp_path / "a.jsonl", *rows), num_examples=46, validation=0)
    data = load_training_data("code", settings, 1)
    assert Counter(example.category for example in data.training) == {"python": 20, "java": 21, "rust": 5}
    assert "sampled as evenly as the data allow: java 21, python 20, rust 5" in data.notes


# ---------------------------------------------------------------------- tools


@NEEDS_TOOLS
def test_openfunctions_as_published() -> None:
    """The 112 rows of the test file: the request, its function, and the call to learn."""
    file = SHARED / "openfunctions" / "gorilla_openfunctions_v1_test.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    data = load_training_data("tools", whole(str(file)), 0)
    assert len(data.training) == len(rows) == 112
    for example, row in zip(data.training, rows, strict=True):
        assert example.prompt == function_prompt(row["question"], row["function"])
        assert example.reference == row["model_answer"].strip()
    assert data.training[0].id == "gorilla_openfunctions_v1_test-1"


@pytest.mark.parametrize(
    "functions",
    [
        SPECIFICATION,
        [SPECIFICATION],
        json.dumps(SPECIFICATION),
        repr(SPECIFICATION),
        [repr(SPECIFICATION) + "\n"],
        json.dumps([SPECIFICATION]),
    ],
    ids=["mapping", "list", "JSON", "Python", "list of Python", "JSON list"],
)
def test_functions_in_any_writing(functions: Any) -> None:
    """Test and training files write functions differently; the prompt is the same, and is that of the evaluation."""
    expected = function_prompt("Wake me at seven.", SPECIFICATION)
    for row in (
        {"question": "Wake me at seven.", "function": functions, "model_answer": CALL},
        {"Instruction": "Wake me at seven.\n", "Functions": functions, "Output": CALL},
    ):
        draft = tools().draft(row)
        assert (draft.messages, draft.reference) == ((Message("user", expected),), CALL)
    assert expected.count("alarm.set") == 1


def test_several_answers_and_several_calls(tmp_path: Path) -> None:
    """Of several right answers the first is learned, of several calls all; a note says of how many rows."""
    either = {**ROWS["tools"], "model_answer": [CALL, "alarm.set(7)"]}
    one = {**ROWS["tools"], "model_answer": [CALL]}
    both = {
        "Instruction": "At seven and at eight.",
        "Functions": [SPECIFICATION],
        "Output": [CALL, "alarm.set(hour=8)"],
    }
    data = load_training_data("tools", whole(written(tmp_path / "a.jsonl", either, both, one, either)), 0)
    assert [e.reference for e in data.training] == [CALL, f"{CALL}\nalarm.set(hour=8)", CALL, CALL]
    assert "2 rows: there are several right answers; the first is used" in data.notes
    assert "1 row: there are several calls; all are used, one on each line" in data.notes


def test_prompts_that_were_formed_already() -> None:
    """Rows of instruction and output are taken as they are."""
    draft = tools().draft({"instruction": "Call alarm.set for seven.", "output": CALL})
    assert (draft.messages, draft.reference) == ((Message("user", "Call alarm.set for seven."),), CALL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"function": []}, "no function to call in 'function'"),
        ({"model_answer": []}, "'model_answer' is empty"),
        ({"model_answer": [{"call": "x"}]}, "'model_answer' is a mapping, not a text"),
        ({"question": ["a"]}, "'question' is a list, not a text"),
        ({"function": {"name": "\ud800"}}, "'function' contains half of a surrogate pair"),
    ],
)
def test_calls_that_cannot_be_learned(change: Mapping[str, Any], words: str) -> None:
    """No function, no answer, or something that is not text."""
    with pytest.raises(RowError, match=words):
        tools().draft({**ROWS["tools"], **change})
