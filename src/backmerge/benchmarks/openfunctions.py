"""OpenFunctions: a request and the functions that may be called; the answer is the call.

Data: the test set of Gorilla OpenFunctions v1 (112 rows of `question`, `function`, `model_answer`),
`openfunctions/openfunctions-v1/gorilla_openfunctions_v1_test.json` of the repository ShishirPatil/gorilla, Apache-2.0.
The training set of the same release (JSON Lines of `Instruction`, `Functions`, `Output`) is read too.

Worked example: "Get weather information for Paris, France for the next 5 days." with the specification of
`weather.forecast(location, days)`; `weather.forecast(location="Paris, France", days=5)` is right, and so is
`weather.forecast(days=5, location="paris france")`: see `backmerge.benchmarks.function_calls`. The paper scores the
same answers by BERTScore F1.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from backmerge.benchmarks.bertscore import DEFAULT_MODEL, BertScorer
from backmerge.benchmarks.function_calls import is_right_call
from backmerge.benchmarks.metrics import BertScoreF1, PerAnswer, Together
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, Scorer, options_of
from backmerge.errors import DataError
from backmerge.records import Example, Message
from backmerge.rows import sound_rows

NEEDS = "openfunctions=gorilla_openfunctions_v1_test.json; an encoder for BERTScore"

SYSTEM = "You are a helpful assistant."
FUNCTIONS_LINE = "You may call these functions:"

QUESTION_COLUMNS = ("question", "Instruction")
FUNCTION_COLUMNS = ("function", "Functions")
# the meaning of a list in the column: other right answers (test set), or calls to make together (training set)
ALTERNATIVES_COLUMN, TOGETHER_COLUMN = "model_answer", "Output"


def openfunctions(settings: BenchmarkSettings) -> Benchmark:
    """Return requests, scored by whether the call is right and by BERTScore F1 against the first right answer.

    The limit is 256 tokens. The paper's script sets none, and so runs with 16, vLLM's default, which cuts off about
    half of the references: `max_new_tokens: 16`. Options: `model` and `layer` of BERTScore; `bertscore: false` omits
    it.

    Raises:
        DataError: see `openfunctions_examples`.
    """
    options = options_of(settings, {"bertscore": True, "model": DEFAULT_MODEL, "layer": None})
    examples = openfunctions_examples(None if settings.data is None else Path(settings.data).expanduser())
    scorer: Scorer = PerAnswer({"call_match": call_match})
    if options["bertscore"]:
        scorer = Together(scorer, BertScoreF1(BertScorer(options["model"], options["layer"])))
    return Benchmark(
        "openfunctions",
        "utility",
        tuple(replace(e, messages=(Message("system", SYSTEM), *e.messages)) for e in examples),
        max_new_tokens=256,
        scorer=scorer,
    )


def function_prompt(question: str, functions: Any) -> str:
    r"""Return the user's turn for a request and the functions that may be called, in evaluation and in fine-tuning.

    Three parts, each on its own lines: the question, `You may call these functions:`, and the specifications as
    one line of JSON, always a list, keys in the order of the data.

    >>> print(function_prompt("Find the time in Tokyo.", {"api_call": "time.now", "parameters": {}}))
    Find the time in Tokyo.
    You may call these functions:
    [{"api_call": "time.now", "parameters": {}}]

    Args:
        question: The request; white space at its ends is removed.
        functions: One specification or a list of them: mappings, or texts of JSON or of a Python literal (as in the
            training set). A text that is neither is kept as a text.
    """
    listed = json.dumps(specifications(functions), ensure_ascii=False)
    return f"{question.strip()}\n{FUNCTIONS_LINE}\n{listed}"


def specifications(functions: Any) -> list[Any]:
    """Return the functions' specifications as a list, parsed if they are texts."""
    if isinstance(functions, str):
        functions = _parsed(functions)
    return [_parsed(one) for one in functions] if isinstance(functions, list) else [functions]


def openfunctions_examples(path: Path | None) -> tuple[Example, ...]:
    """Return the rows of a file in the form of OpenFunctions, in its order.

    An example's reference is the first right answer; `facts["references"]` has all of them as a JSON list, and
    `facts["parameters"]` the parameters' names of each function, in order, as a JSON object.

    Args:
        path: A JSON list, JSON Lines, or another file of rows. We know of no copy of the test set on the hub.

    Raises:
        DataError: there is no file, or a row has no question, functions or answer; names the row.
    """
    if path is None:
        raise DataError(
            "OpenFunctions' test set is not on the hub, and no file was given",
            remedy="get openfunctions/openfunctions-v1/gorilla_openfunctions_v1_test.json from the repository "
            "ShishirPatil/gorilla, and give its path.",
        )
    examples = tuple(_example(i, row.place, row.values) for i, row in enumerate(sound_rows(path)))
    if not examples:
        raise DataError(f"{path} contains no rows", remedy="give OpenFunctions' test set, or a file in its form.")
    return examples


def call_match(example: Example, answer: str) -> float:
    """1 if the answer makes the call of one of the right answers, by the rules of `is_right_call`."""
    references = example.facts.get("references")
    parameters = example.facts.get("parameters", "{}")
    return float(
        is_right_call(
            answer,
            [example.reference or ""] if references is None else json.loads(references),
            json.loads(parameters),
        )
    )


def _example(index: int, place: str, row: Mapping[str, Any]) -> Example:
    question = _column(place, row, QUESTION_COLUMNS)
    if not isinstance(question, str):
        raise DataError(f"{place}: the question is not a text", remedy="write it in quotes.")
    functions = _column(place, row, FUNCTION_COLUMNS)
    references = _references(place, row)
    prompt = function_prompt(question, functions)
    if any("\ud800" <= character <= "\udfff" for text in (prompt, *references) for character in text):
        raise DataError(
            f"{place}: a text contains half of a surrogate pair, which UTF-8 files cannot store",
            remedy="write the character itself, or both halves of its escape.",
        )
    facts = {
        "references": json.dumps(references, ensure_ascii=False),
        "parameters": json.dumps(parameter_names(functions), ensure_ascii=False),
    }
    return Example(f"openfunctions-{index}", (Message("user", prompt),), references[0], facts=facts)


def _references(place: str, row: Mapping[str, Any]) -> list[str]:
    """Return every right answer."""
    value = _column(place, row, (ALTERNATIVES_COLUMN, TOGETHER_COLUMN))
    values = value if isinstance(value, list) else [value]
    texts = [one.strip() for one in values if isinstance(one, str) and one.strip()]
    if len(texts) < len(values):
        raise DataError(f"{place}: an answer is empty, or not a text", remedy="give each call as a text.")
    return texts if ALTERNATIVES_COLUMN in row else ["\n".join(texts)]


def _column(place: str, row: Mapping[str, Any], names: Sequence[str]) -> Any:
    value = next((row[name] for name in names if name in row), None)
    if value in (None, [], {}) or (isinstance(value, str) and not value.strip()):
        raise DataError(
            f"{place}: nothing in '{names[0]}'; its columns are {sorted(str(key) for key in row)}",
            remedy=f"call it '{names[0]}' or '{names[1]}', as OpenFunctions does.",
        )
    return value


def parameter_names(functions: Any) -> dict[str, list[str]]:
    """Return each function's name with the names of its parameters, in order, if its specification has them.

    The function's name in a call is `api_call` or `api_name`, else `name`. Parameters are read from JSON Schema's
    `properties`, or from a list of mappings with `name`; other forms are ignored.
    """
    names: dict[str, list[str]] = {}
    for one in specifications(functions):
        if not isinstance(one, Mapping):
            continue
        name = next((one[key] for key in ("api_call", "api_name", "name") if one.get(key)), None)
        parameters = one.get("parameters")
        if isinstance(parameters, Mapping):
            parameters = parameters.get("properties")
        if isinstance(parameters, Mapping):
            names[str(name)] = [str(key) for key in parameters]
        elif isinstance(parameters, list) and all(isinstance(each, Mapping) and "name" in each for each in parameters):
            names[str(name)] = [str(each["name"]) for each in parameters]
    return names


def _parsed(text: Any) -> Any:
    """Return the mapping or list in a text of JSON or of a Python literal; anything else unchanged."""
    if not isinstance(text, str):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about the data, not our code: "\\d" is an unknown escape
                value = parse(text.strip())
        # literal_eval raises TypeError for unhashable keys, MemoryError for text that is nested too deeply
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        if isinstance(value, dict | list) and _is_json(value):
            return value
    return text


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
