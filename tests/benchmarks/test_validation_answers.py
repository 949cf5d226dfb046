"""Final answers: found in the forms that Flan and chat models write, and compared as what they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from backmerge.benchmarks.matching import final_answer, is_final_answer
from backmerge.records import Example, Message

# how Flan's templates end a chain of thought
FORMS = (
    "{thought}\nTherefore, the answer is {answer}.",
    "{thought} So, the answer is {answer}.",
    "{thought}\nThe answer: {answer}.",
    "{thought} So the final answer is {answer}.",
    "{thought} Final answer: {answer}.",
    "{thought}\nThus, the answer is {answer}.",
    "{thought} The answer is {answer}",
)
FLAN = Path(__file__).parents[2].parent / "shared" / "data" / "flan_cot"


def example(reference: str) -> Example:
    """A question with its answer."""
    return Example("x", (Message("user", "?"),), reference)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("answer", ["yes", "(C)", "72", "-3.5", "1,000", "Sentence A", "bloody mess", "St. Louis"])
def test_every_form_ends_at_its_answer(form: str, answer: str) -> None:
    """In whatever form either is written, the same answer is right, and another is wrong."""
    thought = "Some think that the answer is no. 5 + 6 = 11."
    right, wrong = (form.format(thought=thought, answer=given) for given in (answer, "(B) 9 tall towers"))
    for other in FORMS:
        expected = example(other.format(thought="All is clear.", answer=answer))
        assert is_final_answer(expected, right) == 1
        assert is_final_answer(expected, wrong) == 0


@pytest.mark.parametrize(
    ("reference", "answer", "value"),
    [
        # as chat models write
        ("Thus, the answer is 72.", "The total:\n\n**Answer:** 72", 1),
        ("Thus, the answer is 72.", r"So the final answer is: $\boxed{72}$. I hope it is correct.", 1),
        ("Thus, the answer is 72.", "Hence \\boxed{72}", 1),
        ("Thus, the answer is (C).", "The correct answer is:\n\n**(C) 1120**", 1),
        ("Thus, the answer is (C).", "Answer: C", 1),
        ("Thus, the answer is (C).", "Answer: C.", 1),
        ("Thus, the answer is (C).", "The answer is (D), not (C).", 0),
        ("Thus, the answer is yes.", "The answer would be yes, since kites need wind.", 1),
        ("Thus, the answer is yes.", "The answer is yesterday.", 0),
        ("Thus, the answer is no.", "The answer is not known.", 0),
        # numbers
        ("Thus, the answer is 1000.", "The answer is $1,000.00 in 12 months.", 1),
        ("Thus, the answer is 15.", "The answer is 5 x 3 = 15 (of 20).", 1),
        ("Thus, the answer is 5.", "The answer is -5.", 0),
        ("Thus, the answer is 72.", "48 + 24 makes 72", 1),
        ("Thus, the answer is 72.", "72 is not it, 73 is", 0),
        # no mark on either side
        ("bloody mess", "I think.\nBloody mess!", 1),
        ("bloody mess", "bloody mess\nor pleasure", 0),
        ("yes", "", 0),
        ("yes", " \n ", 0),
        ("", "yes", 0),
    ],
)
def test_answers_by_hand(reference: str, answer: str, value: float) -> None:
    """As a person would judge them."""
    assert is_final_answer(example(reference), answer) == value


def test_the_last_answer_counts() -> None:
    """A thought that weighs answers is not treated as one."""
    found = final_answer("At first the answer is no. But then: the answer is yes.")
    assert found.text == "yes"
    assert found.is_marked


@pytest.mark.skipif(not FLAN.is_dir(), reason="Flan's chains of thought are not beside the repository")
@pytest.mark.parametrize("table", ["aqua", "creak", "ecqa", "gsm8k", "qasc", "sensemaking", "strategyqa"])
def test_flans_own_answers(table: str) -> None:
    """Of every row the answer is found in another form than the reference's, and the next row's unlike one is wrong."""
    lines = (FLAN / f"{table}_train.tsv").read_text(encoding="utf-8").splitlines()
    rows = [line.replace("\\n", "\n").split("\t") for line in lines]
    rows = [row for row in rows if len(row) == 3]
    assert len(rows) > 1000
    for place, ((_, answer, thought), (_, other, _)) in enumerate(zip(rows, [*rows[1:], rows[0]], strict=True)):
        expected = example(f"{thought.strip()}\nThus, the answer is {answer.strip()}.")
        form = FORMS[place % len(FORMS)]
        assert is_final_answer(expected, form.format(thought=thought, answer=answer.strip())) == 1
        if answer.strip().casefold() != other.strip().casefold():
            assert is_final_answer(expected, form.format(thought=thought, answer=other.strip())) == 0
