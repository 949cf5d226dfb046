"""Tools: requests answered by a function call, Gorilla's OpenFunctions.

Data (Apache-2.0): its authors keep no copy of the training set on the hub, so a file must be given. Three kinds of rows
are supported:

- `Instruction`, `Functions`, `Output`: `gorilla_openfunctions_v1_train.json`, which is JSON Lines; each function is a
  Python dict written as text.
- `question`, `function`, `model_answer`: the test set's form, a JSON list.
- `instruction`, `output`: prompts that are already complete, as in the copy in the repository sail-sg/sdft.

Prompt: the request and its functions as `backmerge.benchmarks.openfunctions.function_prompt` writes them, so that
training and evaluation use the same prompts. Answer: the call. If there are several right answers (a list in
`model_answer`), the first is used. If there are several calls (a list in `Output`, for requests that need more than
one), all are used, one on each line.

The paper uses the whole set (2,211 by the authors' scripts), and holds a tenth out. The system prompt is "You are a
helpful assistant.".

Worked example: the request "Wake me at seven." and the function `{"name": "Alarm", "api_call": "alarm.set"}` with the
answer `alarm.set(hour=7)`:

>>> row = {"question": "Wake me at seven.", "function": {"api_call": "alarm.set"}, "model_answer": "alarm.set(hour=7)"}
>>> draft = tools().draft(row)
>>> print(draft.messages[0].content)
Wake me at seven.
You may call these functions:
[{"api_call": "alarm.set"}]
>>> draft.reference
'alarm.set(hour=7)'

Source: Patil et al., Gorilla (arXiv 2305.15334), and its repository, ShishirPatil/gorilla.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backmerge.benchmarks.openfunctions import function_prompt
from backmerge.finetuning.datasets import HELPFUL, Task
from backmerge.finetuning.shapes import Draft, RowError, as_text, needed_text
from backmerge.records import Message

NEEDS = "--data FILE"

TRAINING_COLUMNS = ("Instruction", "Functions", "Output")
TEST_COLUMNS = ("question", "function", "model_answer")
FORMED_COLUMNS = ("instruction", "output")

_FIRST_LEARNED = "there are several right answers; the first is used"
_ALL_LEARNED = "there are several calls; all are used, one on each line"


def _draft(values: Mapping[str, Any]) -> Draft:
    columns = next((names for names in (TRAINING_COLUMNS, TEST_COLUMNS) if names[0] in values), None)
    if columns is None:
        prompt, reference = (needed_text(values, name) for name in FORMED_COLUMNS)
        return Draft((Message("user", prompt),), reference)
    request, functions, answer = columns
    if not values.get(functions):
        raise RowError(f"no function to call in '{functions}'", is_empty=functions in values)
    prompt = as_text(function_prompt(needed_text(values, request), values[functions]), functions)
    reference, remark = _answer(values, answer)
    return Draft((Message("user", prompt),), reference, remark=remark)


def _answer(values: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Return the call to train on, and a remark about rows like this."""
    given = values.get(name)
    if not isinstance(given, list):
        return needed_text(values, name).strip(), ""
    answers = [text for text in (as_text(one, name).strip() for one in given) if text]
    if not answers:
        raise RowError(f"'{name}' is empty", is_empty=True)
    if len(answers) == 1:
        return answers[0], ""
    return ("\n".join(answers), _ALL_LEARNED) if name == TRAINING_COLUMNS[2] else (answers[0], _FIRST_LEARNED)


def tools() -> Task:
    """Return OpenFunctions' requests and calls."""
    return Task(
        name="tools",
        hub=None,
        columns=(*TRAINING_COLUMNS, *TEST_COLUMNS, *FORMED_COLUMNS),
        draft=_draft,
        systems={"": HELPFUL},
        num_examples=None,
    )
