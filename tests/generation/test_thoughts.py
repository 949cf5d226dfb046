"""A reasoning model's thought is distinguished from its answer, in every form that models have for it."""

from __future__ import annotations

import pytest

from backmerge.generation.thoughts import MARKS, opens_thought, separated

HARMONY = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes."


@pytest.mark.parametrize(("opening", "closing"), MARKS)
def test_every_pair_of_marks_is_known(opening: str, closing: str) -> None:
    """Closed, never closed, and opened by the prompt."""
    assert separated(f"{opening}\nHm.\n{closing}\n\nYes.") == ("Hm.", "Yes.")
    assert separated(f"{opening}\nHm. I cannot") == ("Hm. I cannot", "")
    assert separated(f"Hm.\n{closing}\n\nYes.") == ("Hm.", "Yes.")
    assert separated(f"Hm.\n{closing}\n\nYes.", f"Is it so?\n{opening}\n") == ("Hm.", "Yes.")
    assert separated("Hm. I cannot", f"Is it so?\n{opening}\n") == ("Hm. I cannot", "")


@pytest.mark.parametrize(
    ("text", "thought", "answer"),
    [
        ("Yes.", "", "Yes."),
        ("", "", ""),
        ("<think></think>Yes.", "", "Yes."),
        ("<think>\n\n</think>\n\n    return 1\n", "", "    return 1\n"),
        ("<think>a</think><think>b</think>c", "a\n\nb", "c"),
        (HARMONY, "Hm.", "Yes."),
        (HARMONY + "<|return|>", "Hm.", "Yes."),
        ("<|channel|>analysis<|message|>Hm.", "Hm.", ""),
        ("<|channel|>final<|message|>Yes.", "", "Yes."),
        ("analysisHm.assistantfinalYes.", "Hm.", "Yes."),
        ("analysis of the text: assistantfinal", "", "analysis of the text: assistantfinal"),
        ("<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Yes.<|END_RESPONSE|>", "Hm.", "Yes."),
    ],
)
def test_a_reply_is_split(text: str, thought: str, answer: str) -> None:
    """Values written by hand; white space that begins an answer's first line stays."""
    assert separated(text) == (thought, answer)


def test_a_mark_behind_an_answer_hides_nothing() -> None:
    """Where the prompt is known and opened no thought, all of a reply that begins without a mark is its answer."""
    text = "Take the lamp.</think>I cannot help."
    assert separated(text, "<|user|>How?<|assistant|>") == ("", text)
    assert separated("<think>Hm.</think>Take it. <think>x</think> No.").answer == "Take it. <think>x</think> No."


def test_only_an_open_mark_at_the_end_of_a_prompt_opens_a_thought() -> None:
    """A template that is switched off closes what it opens."""
    assert opens_thought("...<think>\n")
    assert not opens_thought("...<think>\n\n</think>\n\n")
    assert not opens_thought("What does <think> mean?")
