"""Where the examples to tune on come from, which of them are taken, and which are held out."""

from __future__ import annotations

import csv
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from backmerge.demo.benchmarks import plan_examples
from backmerge.errors import BackmergeError, ConfigError, DataError
from backmerge.finetuning.data_settings import DataSettings
from backmerge.finetuning.datasets import Task, load_training_data, sampled, split
from backmerge.finetuning.settings import FinetuneSettings, LoraSettings
from backmerge.finetuning.tasks.code import code
from backmerge.records import Example, Message
from backmerge.registry import DATASETS, NOTHING_ALLOWED, Permissions, resolve

ALL = DataSettings(validation=0)
SEED = 42
MADE_BY_CODE = [name for name in DATASETS.entries if not isinstance(resolve(DATASETS, name)(), Task)]

EXAMPLES = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from("xy"), st.sampled_from(["p", "q", "r"])), max_size=30
).map(lambda rows: [example(f"e{i}", *row) for i, row in enumerate(rows)])


def example(name: str, prompt: str, answer: str = "x", category: str | None = None) -> Example:
    """An example of one turn."""
    return Example(name, (Message("user", prompt),), answer, category)


def distinct(number: int) -> list[Example]:
    """Examples with prompts of their own."""
    return [example(f"e{i}", f"prompt {i}") for i in range(number)]


def written(path: Path, *rows: Mapping[str, Any]) -> str:
    """The path of a JSON Lines file with these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def everything(name: str, permissions: Permissions = NOTHING_ALLOWED) -> tuple[Example, ...]:
    """All examples of a data set, none held out."""
    return load_training_data(name, ALL, SEED, permissions).training


# --------------------------------------------------------------- the sample


@given(examples=EXAMPLES, size=st.none() | st.integers(1, 40), seed=st.integers(0, 3), even=st.booleans())
def test_a_sample_is_a_part_in_order(examples: list[Example], size: int | None, seed: int, even: bool) -> None:
    """So many as asked for, or all; none twice; in the order in which they came."""
    sample = sampled(iter(examples), size, seed, by_category=even)
    assert len(sample.examples) == (len(examples) if size is None else min(size, len(examples)))
    places = [examples.index(one) for one in sample.examples]
    assert places == sorted(set(places))
    assert sample.num_candidates == len(examples)
    assert sample == sampled(examples, size, seed, by_category=even)


@given(examples=EXAMPLES, size=st.integers(1, 40), seed=st.integers(0, 3))
def test_an_even_sample_is_as_even_as_can_be(examples: list[Example], size: int, seed: int) -> None:
    """A category has fewer than another by more than one only if all of it was taken."""
    sample = sampled(examples, size, seed, by_category=True)
    taken = Counter(one.category for one in sample.examples)
    assert {name: count for name, count in sample.by_category.items() if count} == taken
    for category, available in Counter(one.category for one in examples).items():
        assert taken[category] >= min(available, max(taken.values(), default=0) - 1)


@given(order=st.permutations(range(12)), seed=st.integers(0, 3))
def test_sampling_depends_only_on_the_texts(order: list[int], seed: int) -> None:
    """The same rows in another order, or under other ids, give the same sample and the same split."""
    examples = distinct(12)
    shuffled = [example(f"other-{i}", examples[i].prompt) for i in order]
    prompts = [{one.prompt for one in sampled(some, 5, seed).examples} for some in (examples, shuffled)]
    assert prompts[0] == prompts[1]
    held_out = [{one.prompt for one in split(some, 0.3, seed)[1]} for some in (examples, shuffled)]
    assert held_out[0] == held_out[1]


def test_seeds_sample_differently_and_evenly() -> None:
    """Over 200 seeds each of 20 rows is taken about half of the time: 100 times, within four sigmas of 7."""
    examples = distinct(20)
    samples = [sampled(examples, 10, seed).examples for seed in range(200)]
    assert len({tuple(one.id for one in sample) for sample in samples}) == 200
    counts = Counter(one.id for sample in samples for one in sample)
    assert all(72 <= counts[one.id] <= 128 for one in examples)


# ---------------------------------------------------------------- the split


@given(examples=EXAMPLES, share=st.floats(0, 0.99), seed=st.integers(0, 3))
def test_no_prompt_is_on_both_sides(examples: list[Example], share: float, seed: int) -> None:
    """Training and validation are all examples, each once and in order; examples of one prompt stay together."""
    training, validation = split(examples, share, seed)
    assert sorted([*training, *validation], key=examples.index) == examples
    assert list(training) == [one for one in examples if one in training]
    assert list(validation) == [one for one in examples if one in validation]
    assert not {one.prompt for one in training} & {one.prompt for one in validation}
    assert len(validation) <= max(1, share * len(examples) + 0.5)
    assert training or not examples
    assert (training, validation) == split(examples, share, seed)


@pytest.mark.parametrize(
    ("number", "share", "held_out"),
    [
        (10_000, 0.1, 1000),
        (2211, 0.1, 221),
        (100, 0, 0),
        (2, 0.99, 1),
        (5, 0.1, 1),
        (2, 0.1, 1),
        (1, 0.5, 0),
        (0, 0.1, 0),
    ],
)
def test_how_many_are_held_out(number: int, share: float, held_out: int) -> None:
    """The share, rounded; one at least of two or more; nothing where nothing is asked for."""
    training, validation = split(distinct(number), share, SEED)
    assert (len(training), len(validation)) == (number - held_out, held_out)


def test_seeds_hold_out_differently() -> None:
    """Another seed, another validation set; a system prompt changes nothing."""
    examples = distinct(100)
    under = [Example(e.id, (Message("system", "Be brief."), *e.messages), e.reference) for e in examples]
    ids = [{one.id for one in split(some, 0.1, seed)[1]} for some, seed in ((examples, 1), (examples, 2), (under, 1))]
    assert ids[0] != ids[1]
    assert ids[0] == ids[2]


def test_global_randomness_is_neither_used_nor_moved(tmp_path: Path) -> None:
    """Whatever was drawn before, the data are the same, and what is drawn after is what would have been."""
    file = written(tmp_path / "a.jsonl", *({"prompt": f"p{i}", "completion": "x"} for i in range(50)))
    settings = DataSettings(num_examples=20)
    random.seed(1)
    first = load_training_data(file, settings, SEED)
    drawn = random.random()  # noqa: S311 - no secret
    random.seed(1)
    assert random.random() == drawn  # noqa: S311 - no secret
    assert load_training_data(file, settings, SEED) == first


# ------------------------------------------------------------- a user's file


def test_a_users_file(tmp_path: Path) -> None:
    """All rows, a tenth held out, and where they came from."""
    file = written(tmp_path / "mine.jsonl", *({"prompt": f"p{i}", "completion": f"c{i}"} for i in range(20)))
    data = load_training_data(file, DataSettings(), SEED)
    assert (len(data.training), len(data.validation)) == (18, 2)
    both = sorted([*data.training, *data.validation], key=lambda one: int(one.id.rpartition("-")[2]))
    assert both == [example(f"mine-{i + 1}", f"p{i}", f"c{i}") for i in range(20)]
    assert data.notes == ("2 of 20 examples are held out for validation",)
    assert json.loads(json.dumps(data.source)) == {
        "dataset": "mine.jsonl",
        "files": {"mine.jsonl": data.source["files"]["mine.jsonl"]},
        "num_rows": 20,
        "num_dropped": 0,
        "num_sampled": 20,
        "num_training": 18,
        "num_validation": 2,
        "seed": SEED,
        "system": None,
    }
    other = load_training_data(written(tmp_path / "mine.jsonl", {"prompt": "p", "completion": "c"}), DataSettings(), 1)
    assert other.source["files"] != data.source["files"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "plain"])
def test_files(tmp_path: Path, name: str) -> None:
    """JSON Lines, also without a suffix, and CSV give prompts, answers and system texts."""
    lines = '{"system": "Be brief.", "instruction": "Hi", "output": "Ho"}\n\n{"instruction": "λ?", "output": " 0"}\n'
    rows = 'system,instruction,output\nBe brief.,Hi,Ho\n,λ?," 0"\n'
    path = tmp_path / name
    path.write_text(rows if name.endswith(".csv") else lines, encoding="utf-8")
    first, second = everything(str(path))
    assert first.messages == (Message("system", "Be brief."), Message("user", "Hi"))
    assert (first.reference, second.reference) == ("Ho", " 0")
    assert second.messages == (Message("user", "λ?"),)


def test_one_set_in_every_format(tmp_path: Path) -> None:
    """JSON Lines, a JSON list, CSV, TSV and Parquet of the same rows sample and hold out the same ones."""
    rows = [{"prompt": f'What, "is" {i}?\nSay.', "completion": f"It\tis {i}."} for i in range(30)]
    written(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.json").write_text(json.dumps(rows), encoding="utf-8")
    for name, delimiter in (("c.csv", ","), ("d.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0].keys(), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "e.parquet")
    found = set()
    for name in ("a.jsonl", "b.json", "c.csv", "d.tsv", "e.parquet"):
        data = load_training_data(str(tmp_path / name), DataSettings(num_examples=20), SEED)
        found.add(
            tuple(tuple((one.prompt, one.reference) for one in part) for part in (data.training, data.validation))
        )
    assert len(found) == 1
    assert [len(part) for part in found.pop()] == [18, 2]


def test_columns_of_other_names(tmp_path: Path) -> None:
    """Mapped by setting; one that the file does not have is reported with the row."""
    file = written(tmp_path / "a.jsonl", {"query": "Hi", "reply": "Ho", "messages": "no"})
    settings = DataSettings(validation=0, columns={"prompt": "query", "completion": "reply"})
    assert load_training_data(file, settings, SEED).training == (example("a-1", "Hi", "Ho"),)
    with pytest.raises(DataError, match="line 1: no column 'qeury' among"):
        load_training_data(file, DataSettings(columns={"prompt": "qeury"}), SEED)
    with pytest.raises(ConfigError, match=r"maps 'promt', which is not a known column(.|\n)*did you mean 'prompt'"):
        load_training_data(file, DataSettings(columns={"promt": "query"}), SEED)


def test_a_system_prompt_for_a_users_file(tmp_path: Path) -> None:
    """The setting replaces the rows' own, or takes them away."""
    file = written(tmp_path / "a.jsonl", {"system": "Own.", "prompt": "Hi", "completion": "Ho"})
    for system, expected in ((None, "Own."), ("Mine.", "Mine."), ("", None)):
        (one,) = load_training_data(file, DataSettings(system=system), SEED).training
        assert one.messages == (*((Message("system", expected),) if expected else ()), Message("user", "Hi"))


def test_several_files_in_a_folder(tmp_path: Path) -> None:
    """A folder's data files are one data set, with ids by file, and the hash of each in the card."""
    written(tmp_path / "a.jsonl", {"prompt": "p", "completion": "c"})
    (tmp_path / "b.csv").write_text("question,answer\nq,r\n", encoding="utf-8")
    data = load_training_data(str(tmp_path), ALL, SEED)
    assert [one.id for one in data.training] == ["a-1", "b-2"]
    assert list(data.source["files"]) == ["a.jsonl", "b.csv"]


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    """A link in the folder that leads nowhere is named."""
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match=r"cannot read .*gone\.jsonl"):
        load_training_data(str(tmp_path), ALL, SEED)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "a.jsonl contains no rows"),
        ('{"prompt": "Hi"}\n', "line 1: no answer"),
        ('{"prompt": "Hi", "answer": "Ho"}\n{"answer": "Ho"}\n', "line 2: no prompt"),
        ('{"prompt": "Hi", "answer": "Ho"}\nnonsense\n', "line 2: not JSON"),
        ('{"prompt": "Hi", "answer": ""}\n', "line 1: 'answer' is empty"),
        ('{"prompt": "Hi", "answer": "\\ud800"}\n', "line 1: 'answer' contains half of a surrogate pair"),
    ],
)
def test_rows_that_cannot_be_learned_are_errors(tmp_path: Path, text: str, reason: str) -> None:
    """The file and the line are named."""
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=reason) as caught:
        everything(str(path))
    assert "a.jsonl" in caught.value.message
    assert caught.value.remedy


def test_bad_rows_are_reported_together(tmp_path: Path) -> None:
    """Up to five with their lines, and how many there are in all; nothing of their texts."""
    path = tmp_path / "a.jsonl"
    good, no_answer, torn = (
        '{"prompt": "SECRET", "answer": "SECRET"}\n',
        '{"prompt": "SECRET"}\n',
        '{"prompt": "SECRET"\n',
    )
    path.write_text(good + no_answer + torn + good + no_answer * 1200, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        everything(str(path))
    lines = caught.value.message.splitlines()
    assert lines[0] == "1,202 rows cannot be used for training:"
    assert lines[1].endswith("a.jsonl, line 2: no answer in the columns ['prompt']")
    assert lines[2].endswith("a.jsonl, line 3: not JSON: Expecting ',' delimiter")
    assert [line.rpartition(", line ")[2][:2] for line in lines[3:6]] == ["5:", "6:", "7:"]
    assert lines[6] == "  and 1,197 more"
    assert "SECRET" not in str(caught.value)


def test_a_bad_row_outside_the_sample_is_found(tmp_path: Path) -> None:
    """Whatever is sampled, all rows are looked at, so that one seed does not fail where another did not."""
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(50)]
    file = written(tmp_path / "a.jsonl", *rows, {"prompt": "p"})
    for seed in range(5):
        with pytest.raises(DataError, match="line 51"):
            load_training_data(file, DataSettings(num_examples=1), seed)


# ------------------------------------------------------------------ the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """`hub(*rows)`: a hub that gives these rows for whatever is asked, and remembers what was."""

    def give(*rows: Mapping[str, Any]) -> list[dict[str, Any]]:
        asked: list[dict[str, Any]] = []

        def load_dataset(name: str, **arguments: Any) -> datasets.Dataset:
            asked.append({"name": name, **arguments})
            return datasets.Dataset.from_list(list(rows))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return give


def test_a_users_data_set_on_the_hub(hub: Callable[..., list[dict[str, Any]]]) -> None:
    """Its shape is recognised as a file's is; without a revision it may be another tomorrow, which is said."""
    asked = hub({"instruction": "Hi", "input": "", "output": "Ho"}, {"instruction": "So", "input": "?", "output": "No"})
    data = load_training_data("someone/some-data", ALL, SEED)
    assert [(one.id, one.prompt) for one in data.training] == [("some-data-1", "Hi"), ("some-data-2", "So\n\n?")]
    assert data.notes == ("someone/some-data is not pinned: set data.revision to get the same rows later",)
    pinned = load_training_data("someone/some-data", DataSettings(validation=0, revision="abc"), SEED)
    assert pinned.notes == ()
    assert [request["revision"] for request in asked] == [None, "abc"]
    expected = {"hub": "someone/some-data", "revision": "abc", "file": None, "split": "train"}
    assert expected.items() <= pinned.source.items()


def test_a_bad_row_on_the_hub(hub: Callable[..., list[dict[str, Any]]]) -> None:
    """It is named by its row."""
    hub({"prompt": "Hi", "completion": "Ho"}, {"prompt": "Hi", "completion": None})
    with pytest.raises(DataError, match="someone/some-data, row 2: 'completion' is empty"):
        load_training_data("someone/some-data", ALL, SEED)


def test_a_preset_comes_from_its_pinned_place(hub: Callable[..., list[dict[str, Any]]]) -> None:
    """Revision and file are the preset's own, unless the user names another revision."""
    asked = hub({"inputs": "Hi", "targets": "Ho"})
    load_training_data("reasoning", DataSettings(), SEED)
    load_training_data("reasoning", DataSettings(revision="abc"), SEED)
    assert [(r["name"], r["data_files"], r["split"]) for r in asked] == [
        ("Open-Orca/FLAN", "cot_zs_submix_data.json", "train")
    ] * 2
    assert [request["revision"] for request in asked] == ["77ed2d7ab8b1c73a1c888fa80e231d17d334e57b", "abc"]


def test_a_copy_gives_the_examples_of_the_hub(tmp_path: Path, hub: Callable[..., list[dict[str, Any]]]) -> None:
    """The same rows from a file of the user's are sampled and held out alike; only the ids tell them apart."""
    rows = [{"lang": "ab"[i % 2], "problem": f"p{i}", "solution": f"s{i}"} for i in range(60)]
    hub(*rows)
    settings = DataSettings(num_examples=20)
    there = load_training_data("code", settings, SEED)
    here = load_training_data(
        "code", settings.model_copy(update={"file": written(tmp_path / "a.jsonl", *rows)}), SEED, family="gemma"
    )
    for ours, theirs in ((here.training, there.training), (here.validation, there.validation)):
        assert [one.prompt for one in ours] == [one.prompt for one in theirs]
    assert here.training[0].id.startswith("a-")
    assert there.training[0].id.startswith("Magicoder-OSS-Instruct-75K-")
    published = code().hub
    assert published is not None
    assert (there.source["hub"], there.source["revision"]) == published[:2]


# -------------------------------------------------------------------- names


@pytest.mark.parametrize("name", MADE_BY_CODE)
def test_named_data_sets_have_answers(name: str) -> None:
    """Every data set that is made by code has unique ids, ends with the user's turn, and has answers."""
    examples = everything(name)
    assert examples
    assert len({example.id for example in examples}) == len(examples)
    assert all(example.reference and example.messages[-1].role == "user" for example in examples)


def test_the_demos_set_goes_by_its_name() -> None:
    """`demo-plans` is the demonstration's tuning set, to the letter and in its order."""
    assert everything("demo-plans") == plan_examples()
    some = load_training_data("demo-plans", DataSettings(num_examples=100, system="Be brief."), SEED)
    assert (len(some.training), len(some.validation)) == (90, 10)
    clusters = {one.id: one.cluster for one in plan_examples()}
    assert all(one.messages[0].content == "Be brief." for one in some.training)
    assert all(one.cluster == clusters[one.id] for one in some.training)


@pytest.mark.parametrize(
    ("name", "settings", "kind", "reason"),
    [
        ("missing.jsonl", {}, DataError, "there is no file"),
        ("folder/missing.parquet", {}, DataError, "there is no file"),
        ("no/such/file", {}, DataError, "there is no file"),
        ("./no/file", {}, DataError, "there is no file"),
        ("demo-plan", {}, ConfigError, "did you mean 'demo-plans'"),
        ("resoning", {}, ConfigError, "did you mean 'reasoning'"),
        ("my_code:examples", {}, ConfigError, "--allow-plugins"),
        ("demo-plans", {"file": "a.jsonl"}, ConfigError, r"data\.file cannot be used with 'demo-plans'"),
        ("demo-plans", {"revision": "a"}, ConfigError, r"data\.revision cannot be used"),
        ("demo-plans", {"columns": {"prompt": "q"}}, ConfigError, r"data\.columns cannot be used"),
        ("a.jsonl", {"file": "b.jsonl"}, ConfigError, r"data\.file is your own copy of a preset's data"),
        ("code", {"file": "missing.jsonl"}, DataError, "there is no file 'missing.jsonl'"),
        ("code", {"file": "a.jsonl", "revision": "a"}, ConfigError, r"data\.revision is for the hub"),
    ],
)
def test_names_that_lead_nowhere_are_errors(
    name: str, settings: dict[str, Any], kind: type[BackmergeError], reason: str
) -> None:
    """A missing file, a misspelt name, code without leave, and settings that mean nothing there are distinguished."""
    with pytest.raises(kind, match=reason) as caught:
        load_training_data(name, DataSettings(**settings), SEED)
    assert caught.value.remedy


def test_a_users_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With leave, `module:function` gives the examples, or a preset; what is neither is refused."""
    code = (
        "from backmerge.demo.benchmarks import plan_examples\n\n"
        "def few():\n    return plan_examples()[:3]\n\ndef wrong():\n    return ['a']\n\n"
        "def task():\n    from backmerge.finetuning.tasks.code import code\n    return code()\n"
    )
    (tmp_path / "my_examples.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_examples", raising=False)
    assert everything("my_examples:few", permissions=Permissions(plugins=True)) == plan_examples()[:3]
    with pytest.raises(DataError, match="returned a str, not an Example"):
        everything("my_examples:wrong", permissions=Permissions(plugins=True))
    file = written(tmp_path / "a.jsonl", {"lang": "python", "problem": "Hi", "solution": "Ho"})
    settings = DataSettings(file=file, validation=0)
    (one,) = load_training_data("my_examples:task", settings, SEED, permissions=Permissions(plugins=True)).training
    assert (one.prompt, one.reference, one.category) == ("Hi", "Ho", "python")
    monkeypatch.delitem(sys.modules, "my_examples")


# ----------------------------------------------------------------- settings


def test_the_defaults_are_the_papers() -> None:
    """LoRA of rank 8 and alpha 16, learning rate 1e-4, three epochs, the paper's seeds, a tenth held out."""
    settings = FinetuneSettings(dataset="x")
    assert settings.lora == LoraSettings(r=8, alpha=16, dropout=0)
    assert (settings.learning_rate, settings.epochs, settings.steps) == (1e-4, 3, None)
    assert (settings.batch_size, settings.warmup, settings.cutoff) == (8, 0.1, 1024)
    assert settings.seeds == (42, 1024, 48763)
    assert DataSettings().validation == 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"seeds": ()},
        {"steps": 0},
        {"epochs": 0},
        {"learning_rate": 0},
        {"warmup": 1},
        {"weight_decay": -1},
        {"cutoff": 0},
        {"lora": {"r": 0}},
        {"lora": {"dropout": 1}},
        {"learning_rte": 1},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    """Values out of range, and names that are none, are refused before anything is loaded."""
    with pytest.raises(ValidationError):
        FinetuneSettings.model_validate({"dataset": "x", **wrong})


@pytest.mark.parametrize(
    "wrong", [{"validation": 1}, {"validation": -0.1}, {"num_examples": 0}, {"columns": ["a"]}, {"colums": {}}]
)
def test_data_settings_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    """Nothing left to train on, no examples, columns that map nothing, a name that is none."""
    with pytest.raises(ValidationError):
        DataSettings.model_validate(wrong)
