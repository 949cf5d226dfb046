r"""Whether a chain of thought ends at the right answer: what λ is validated with where reasoning was tuned for.

Flan's chains of thought end in one of a few forms ("Thus, the answer is yes.", "Final answer: (C).", "So the final
answer is 72."), and chat models have some of their own ("**Answer:** 72", "\boxed{72}"). The final answer is what
follows the last "answer is" or "answer:" on its line; without one, the last line, and of numbers the last one.

Worked example: with the reference "Lift needs moving air.\nThus, the answer is yes.", the answer "Kites need lift. So
the answer is Yes." is right.

Source: the forms are those of google-research/FLAN, flan/v2/templates.py (Longpre et al., arXiv 2301.13688).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

from backmerge.benchmarks.matching import NUMBER, final_number
from backmerge.records import Example

_MARK = re.compile(r"\banswer\b[\s*_]*(?:(?:is|would\s+be)\b[\s*_]*:?|:)[\s*_]*", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_OPTION = re.compile(r"\(?([a-z])(?:\)|[.:]?$)")
_AROUND = " \t*_`\"'$“”‘’"  # marks, quotes and signs of money or mathematics


class FinalAnswer(NamedTuple):
    """Where a text arrives.

    Attributes:
        text: In lower case, without the marks around it and the full stop.
        is_marked: Whether the text says that it is the answer.
    """

    text: str
    is_marked: bool


def final_answer(text: str) -> FinalAnswer:
    r"""What a text gives as its answer.

    >>> final_answer("Lift needs air. Thus, the answer is yes.")
    FinalAnswer(text='yes', is_marked=True)
    >>> final_answer("48 + 24 = 72\n72 clips")
    FinalAnswer(text='72 clips', is_marked=False)
    """
    marks = list(_MARK.finditer(text))
    rest = text[marks[-1].end() :] if marks else ""
    lines = [line for line in (rest if marks else text).splitlines() if line.strip()]
    line = "" if not lines else lines[0] if marks else lines[-1]
    boxed = _BOXED.findall(line)
    return FinalAnswer(_bare(boxed[-1] if boxed else line), bool(marks or boxed))


def is_final_answer(example: Example, answer: str) -> float:
    """1 if the answer arrives where the reference does.

    Numbers are compared as such ("1,000" is "1000.0"), options by their letter ("C" is "(C) 1120"), other texts
    without regard to letter case; what follows the answer after a comma or a full stop does not count.
    """
    expected, found = final_answer(example.reference or "").text, final_answer(answer)
    if not expected or not answer.strip():
        return 0.0
    number = NUMBER.fullmatch(expected.rstrip("% "))
    if number is not None:
        return final_number(
            replace(example, reference=expected), _up_to_number(found.text) if found.is_marked else answer
        )
    option = _OPTION.fullmatch(expected)
    if option is not None:
        chosen = _OPTION.match(found.text)
        return float(chosen is not None and chosen[1] == option[1])
    if not found.text.startswith(expected):
        return 0.0
    after = found.text[len(expected) :]
    return float(not after or (after[0] in ".,;:!?" and not after[1:2].isalnum()))


def _up_to_number(text: str) -> str:
    """The beginning of a text, to the first number of its result: "5 x 3 = 15 (of 20)" is "15"."""
    result = text.rpartition("=")[2]
    first = NUMBER.search(result)
    return text if first is None else result[: first.end()]


def _bare(text: str) -> str:
    """Lower case, without what stands around an answer."""
    bare = text.strip(_AROUND).rstrip(".").strip(_AROUND)
    return re.sub(r"\s+", " ", bare).casefold()
