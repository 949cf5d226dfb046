"""ChatDoctor: from a file or the hub to queries with references."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backmerge.benchmarks.chatdoctor import chatdoctor_examples
from backmerge.errors import DataError
from backmerge.records import Example, Message

ROWS = [
    {"input": f" I have slept badly for {i} days, doctor. ", "answer_icliniq": f"Rest, and come in {i} days.\n",
     "answer_chatgpt": "not this", "answer_chatdoctor": "nor this"}
    for i in range(30)
]  # fmt: skip


def as_csv(rows: list[dict[str, str]]) -> str:
    """The rows with every value in quotes."""
    return "\r\n".join([",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)])


def written(path: Path, content: Any) -> Path:
    """The file; what is not text is written as JSON."""
    path.write_bytes((content if isinstance(content, str) else json.dumps(content)).encode())
    return path


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.json", list),
        ("a.jsonl", lambda rows: "".join(json.dumps(row) + "\n" for row in rows)),
        ("a.CSV", as_csv),
        ("a.csv", lambda rows: "\ufeff" + as_csv(rows)),
    ],
)
def test_rows_by_hand(tmp_path: Path, name: str, form: Callable[[list[dict[str, str]]], Any]) -> None:
    """The same in each form: the query alone is the prompt, and the doctor's answer the reference."""
    found = chatdoctor_examples(written(tmp_path / name, form(ROWS)))
    assert len(found) == 30
    assert found[3] == Example(
        "chatdoctor-3", (Message("user", "I have slept badly for 3 days, doctor."),), "Rest, and come in 3 days."
    )


def test_the_training_datas_columns(tmp_path: Path) -> None:
    """A held-out part of it can be scored; the instruction is the system prompt, set elsewhere."""
    row = {"instruction": "If you are a doctor, …", "input": "a", "output": "b"}
    assert chatdoctor_examples(written(tmp_path / "a.json", [row])) == (
        Example("chatdoctor-0", (Message("user", "a"),), "b"),
    )


def test_first_and_sampled(tmp_path: Path) -> None:
    """The first so many, or a sample in the order of the data that its seed decides."""
    path = written(tmp_path / "a.json", ROWS)
    whole = chatdoctor_examples(path)
    assert chatdoctor_examples(path, 5) == whole[:5]
    samples = [chatdoctor_examples(path, 5, seed) for seed in (0, 1)]
    assert samples[0] == chatdoctor_examples(path, 5, 0)
    assert samples[0] != samples[1]
    for sample in samples:
        assert len(set(sample_ids := [whole.index(one) for one in sample])) == 5
        assert sample_ids == sorted(sample_ids)
    for wrong in (0, -1, 31):
        with pytest.raises(DataError, match="30") as caught:
            chatdoctor_examples(path, wrong)
        assert caught.value.remedy == "ask for 1 to 30."


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 1,000 with query and answer, each named by its row."""
    rows = [{**ROWS[0], "input": f"query {i}"} for i in range(1100)]
    rows[2]["input"], rows[4]["answer_icliniq"] = " ", None  # type: ignore[assignment]
    asked: list[tuple[str, str]] = []

    def load_dataset(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        return rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = chatdoctor_examples()
    assert asked == [("lavita/ChatDoctor-iCliniq", "train")]
    assert len(found) == 1000
    assert [one.id for one in found[:4]] == ["chatdoctor-0", "chatdoctor-1", "chatdoctor-3", "chatdoctor-5"]
    assert len(chatdoctor_examples(num_queries=1098)) == 1098


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error that asks for a file."""

    def load_dataset(name: str, split: str) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match="could not be downloaded from the hub: no network") as caught:
        chatdoctor_examples()
    assert "at all" not in caught.value.message
    assert "path" in (caught.value.remedy or "")


FAULTS: dict[str, tuple[str, Any, str]] = {
    "no query": ("a.json", [ROWS[0], ROWS[0] | {"input": " "}], r"row 2 \(line 1\): no text in input; its columns"),
    "query no text": ("a.json", [{"input": 3, "output": "b"}], r"row 1 \(line 1\): no text in input"),
    "no answer": ("a.jsonl", '{"input": "SECRET"}\n', "line 1: no text in answer_icliniq"),
    "csv without answer": ("a.csv", "input,output\na,b\nSECRET\n", "line 3: no text in answer_icliniq"),
    "csv row too long": ("a.csv", "input,output\na,b,SECRET\n", "line 2: 3 fields, but the header has 2"),
    "csv quote left open": ("a.csv", 'input,output\n"a\n', "line 2: unexpected end"),
    "empty csv": ("a.csv", "", "contains no rows"),
    "empty list": ("a.json", "[]", "contains no rows"),
    "not JSON": ("a.json", "input", "line 1: not JSON"),
    "surrogate": ("a.json", [{"input": "a\ud83d", "output": "b"}], "half of a surrogate pair"),
}


@pytest.mark.parametrize(("name", "content", "words"), FAULTS.values(), ids=FAULTS.keys())
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, content: Any, words: str) -> None:
    """Each fault is an error with file and place, and shows no text of a patient."""
    path = written(tmp_path / name, content)
    with pytest.raises(DataError, match=words) as caught:
        chatdoctor_examples(path)
    assert name in caught.value.message
    assert caught.value.remedy
    assert "SECRET" not in str(caught.value)
