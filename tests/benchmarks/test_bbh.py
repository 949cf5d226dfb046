"""BIG-Bench Hard: the authors' rows, three shots each, the harness's answers, and both means."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from backmerge.benchmarks.bbh import GROUP, METRIC, TASKS, bbh, bbh_task, task_mean
from backmerge.benchmarks.lm_eval_bridge import LmEvalTask
from backmerge.benchmarks.protocol import BenchmarkSettings
from backmerge.benchmarks.scoring import score
from backmerge.errors import DataError
from backmerge.records import Completion, Example, Message

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "bbh"
# what the harness and its dependencies do that this Python calls old
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
FIRST = "bbh_cot_fewshot_boolean_expressions"


@pytest.fixture(scope="module")
def real() -> LmEvalTask:
    """All of BBH, from the authors' files."""
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    if not DATA.is_dir():
        pytest.skip("the folder shared/data, with BBH's files, is not beside the repository")
    return bbh_task(DATA)


@pytest.fixture(scope="module")
def invented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the authors' form with a few rows, two in most tasks and six in one."""
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")
    folder = tmp_path_factory.mktemp("bbh")
    for task in TASKS:
        rows = [{"input": f"{task} {i}", "target": f"({i})"} for i in range(6 if task == "snarks" else 2)]
        (folder / f"{task}.json").write_text(json.dumps({"canary": "none", "examples": rows}), encoding="utf-8")
    return folder


def answered(task: LmEvalTask, answer: Callable[[Example], str]) -> list[Completion]:
    """Answers by a rule."""
    return [Completion(example.id, "", answer(example), 1, True) for example in task.examples]


def test_all_rows_are_there(real: LmEvalTask) -> None:
    """27 tasks and 6,511 rows, each with the authors' target; four rows are there twice."""
    assert [part.name for part in real.parts] == [f"{GROUP}_{name}" for name in TASKS]
    assert len(real.examples) == len({example.id for example in real.examples}) == 6511
    for name in TASKS:
        rows = json.loads((DATA / "bbh" / f"{name}.json").read_text(encoding="utf-8"))["examples"]
        found = [e for e in real.examples if e.category == f"{GROUP}_{name}"]
        assert [e.reference for e in found] == [row["target"] for row in rows]
        assert [e.prompt for e in found] == [f"Q: {row['input']}\nA: Let's think step by step.\n" for row in rows]
    assert len({example.cluster for example in real.examples}) == 6507


def test_three_shots_and_one_question(real: LmEvalTask) -> None:
    """Each prompt is the task's description, three pairs of turns that end in an answer, and the row's question."""
    for example in real.examples:
        roles = [message.role for message in example.messages]
        assert roles == ["system", *["user", "assistant"] * 3, "user"], example.id
        for message in example.messages[2::2]:
            assert re.search(r"[Tt]he answer is .+\.$", message.content), example.id


def test_the_shots_are_the_authors(real: LmEvalTask) -> None:
    """The harness's shots are the authors' chain-of-thought prompts, white space apart."""
    differing = []
    for part in real.parts:
        text = (DATA / "cot-prompts" / f"{part.name.removeprefix(GROUP + '_')}.txt").read_text(encoding="utf-8")
        theirs = text.partition("-----\n")[2]
        ours = "".join(message.content for message in part.examples[0].messages[:-1])
        if "".join(theirs.split()) != "".join(ours.split()):
            differing.append(part.name)
    assert differing == []


def test_right_answers_are_right(real: LmEvalTask) -> None:
    """An answer that ends as the shots do gets every row right, and one without its full stop hardly any."""
    right = answered(real, lambda e: f"Let us see: 1 + 1 = 2. So the answer is {e.reference}.")
    found = real.score(real.examples, right)
    assert set(found.values[METRIC].values()) == {1.0}
    assert found.figures[GROUP] == {METRIC: 1.0}
    assert list(found.values) == [METRIC]
    cut = real.score(real.examples, answered(real, lambda e: f"So the answer is {e.reference}"))
    assert not any(cut.values[METRIC].values())
    none = real.score(real.examples, answered(real, lambda e: e.reference or ""))
    assert not any(none.values[METRIC].values())


def test_both_means_of_the_real_sizes(real: LmEvalTask) -> None:
    """Right in the three small tasks only: the harness's group figure weighs rows, the task mean weighs tasks."""
    small = {f"{GROUP}_{name}" for name in ("causal_judgement", "penguins_in_a_table", "snarks")}
    found = real.score(
        real.examples, answered(real, lambda e: f"So the answer is {e.reference if e.category in small else 'no'}.")
    )
    by_id = found.values[METRIC]
    chance = sum(value for e, value in zip(real.examples, by_id.values(), strict=True) if e.category not in small)
    assert found.figures[GROUP][METRIC] == pytest.approx((187 + 146 + 178 + chance) / 6511, rel=1e-12)
    mean = task_mean(real.examples, by_id)
    by_task = Counter(e.category for e in real.examples if by_id[e.id] and e.category not in small)
    assert mean.value == pytest.approx((3 + sum(n / 250 for n in by_task.values())) / 27, rel=1e-12)
    assert (mean.n, mean.num_tasks) == (6511, 27)
    assert mean.value > found.figures[GROUP][METRIC]


def test_as_a_benchmark(invented: Path) -> None:
    """By settings: the same examples and values, and the mean over tasks next to the one over rows."""
    found = bbh(BenchmarkSettings(name="bbh", data=str(invented), options={"as_turns": False}))
    assert found.examples == bbh_task(invented, as_turns=False).examples
    assert (found.name, found.kind, found.max_new_tokens) == ("bbh", "utility", 1024)
    assert found.scorer is not None
    assert found.scorer.metrics == (METRIC,)
    said = [[f"So the answer is {e.reference}." if "snarks" in e.id else "No."] for e in found.examples]
    values = found.scorer(found.examples, said, lambda _: None)[METRIC]
    by_id = dict(zip((e.id for e in found.examples), values, strict=True))
    got = score("base", "bbh", "all", METRIC, found.examples, by_id)
    assert got.value == pytest.approx(6 / 58)
    assert got.category_mean == pytest.approx(1 / 27)
    assert got.category_mean == pytest.approx(task_mean(found.examples, by_id).value)


def test_generation_is_the_harnesss(invented: Path) -> None:
    """Greedy, up to 1,024 tokens, to an empty line or the next question."""
    sampling = bbh_task(invented).sampling
    assert (sampling.temperature, sampling.max_new_tokens, sampling.num_samples) == (0.0, 1024, 1)
    assert sampling.stop == ("</s>", "Q", "\n\n")


def test_shots_in_one_turn_and_as_text(invented: Path) -> None:
    """In one turn the shots stand before the question with empty lines between; as text all is one."""
    turns, one, text = (
        bbh_task(invented, limit=1, **how).examples[0] for how in ({}, {"as_turns": False}, {"is_chat": False})
    )
    assert [len(e.messages) for e in (turns, one, text)] == [8, 2, 1]
    shots = [f"{q.content}{a.content}" for q, a in zip(turns.messages[1:-1:2], turns.messages[2::2], strict=True)]
    assert one.messages[0] == turns.messages[0]
    assert one.prompt == "\n\n".join([*shots, turns.prompt])
    assert text.prompt == turns.messages[0].content + one.prompt
    assert (text.is_raw, one.is_raw) == (True, False)
    assert bbh_task(invented, limit=1, system="Be brief.").examples[0].messages[0].content.startswith("Be brief.\n\n")


def test_the_way_of_asking_is_part_of_the_identity(invented: Path) -> None:
    """Shots as turns or not, chat or text: each is another evaluation, and says so."""
    ways = ({}, {"as_turns": False}, {"is_chat": False})
    identities = [dict(bbh_task(invented, limit=1, **how).identity) for how in ways]
    assert [(i["is_chat"], i.get("as_turns")) for i in identities] == [
        ("True", "True"),
        ("True", "False"),
        ("False", None),
    ]
    assert {i[FIRST] for i in identities} == {"4.0, 3 shots"}


def test_means_by_hand(invented: Path) -> None:
    """Six right rows in one task, one of two in another, nothing elsewhere."""
    task = bbh_task(invented)
    right = {f"{GROUP}_snarks": range(6), FIRST: range(1)}
    found = task.score(
        task.examples,
        answered(
            task,
            lambda e: f"So the answer is {e.reference if int(e.id[-1]) in right.get(e.category or '', ()) else '?'}.",
        ),
    )
    assert found.figures[GROUP][METRIC] == pytest.approx(7 / 58, rel=1e-15)
    mean = task_mean(task.examples, found.values[METRIC])
    assert mean.value == pytest.approx((1 + 0.5) / 27, rel=1e-15)
    assert mean.n_effective == pytest.approx(27**2 / (26 / 2 + 1 / 6), rel=1e-15)
    assert mean.low < mean.value < mean.high


def test_unscored_answers_are_left_out_of_the_task_mean() -> None:
    """`None` counts in no mean; a task of nothing else has none."""
    rows = [("a", 1.0), ("a", None), ("b", 0.0), ("b", 1.0)]
    examples = [Example(str(i), (Message("user", "?"),), category=task) for i, (task, _) in enumerate(rows)]
    values = {str(i): value for i, (_, value) in enumerate(rows)}
    found = task_mean(examples, values)
    assert (found.value, found.n, found.num_tasks, found.n_effective) == (0.75, 3, 2, 4 / (1 + 1 / 2))
    with pytest.raises(DataError, match="no answer of a was scored"):
        task_mean(examples, {**values, "0": None})
    with pytest.raises(DataError, match="no answer of any task"):
        task_mean([], {})


def test_equal_tasks_make_the_plain_mean() -> None:
    """With tasks of one size the mean over tasks is the mean over rows, and worth as much."""
    examples = [Example(str(i), (Message("user", "?"),), category="abc"[i % 3]) for i in range(30)]
    values = {str(i): float(i < 12) for i in range(30)}
    found = task_mean(examples, values)
    assert (found.value, found.n_effective) == (pytest.approx(0.4), pytest.approx(30))


FAULTS = {
    "missing": (None, "cannot be read"),
    "torn": ('{"examples": [{"input": "a"', "does not have the form"),
    "another form": ('[{"input": "a", "target": "b"}]', "does not have the form"),
    "no target": ('{"examples": [{"input": "a"}]}', "does not have the form.*'target'"),
    "no rows": ('{"examples": []}', "has no rows"),
    "a number": ('{"examples": [{"input": "a", "target": 3}]}', "is not a text"),
    "latin-1": (b'{"examples": [{"input": "caf\xe9", "target": "b"}]}', "does not have the form"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_files_that_are_not_bbh(tmp_path: Path, fault: str) -> None:
    """A file that is missing, damaged or of another form is named, before anything is loaded."""
    content, words = FAULTS[fault]
    (tmp_path / "bbh").mkdir()
    if content is not None:
        file = tmp_path / "bbh" / f"{TASKS[0]}.json"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=words) as caught:
        bbh_task(tmp_path)
    assert f"{TASKS[0]}.json" in str(caught.value)


def test_without_the_hub_the_authors_files_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, and with nothing in the cache, the way out is named."""
    pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(DataError, match="Couldn't reach the hub") as caught:
        bbh_task()
    assert "authors' JSON files" in str(caught.value.remedy)
