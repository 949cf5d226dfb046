"""Define the records that flow through a run, as frozen dataclasses, and their JSON Lines form.

Every stage of a run reads and writes only these, so that each stage can be re-run alone and its files can be read.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from backmerge.errors import DataError

SEAL = "xxh3"  # first key of the last line of a unit
MAX_VALUE = 1.001  # metrics are in [0, 1]; rounded and rescaled ones may be slightly outside

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt, with what is known about its answer.

    Attributes:
        id: Unique within its benchmark; messages and logs use it instead of the text, which may be harmful.
        messages: The conversation up to the answer; the last is the user's.
        reference: The expected answer, if there is one.
        category: A stratum, such as the kind of harm.
        cluster: Shared by near-duplicates, which are split and resampled together. `None` lets the splitter find
            near-duplicates.
        facts: Other data that a rule needs to score an answer.
        prefill: A given beginning of the answer, which the model continues.
        is_raw: The last message is the whole text that the model sees: no chat template is applied. For models with
            their own prompt format, such as judges.
        pair: Shared by a harmful and a harmless example on one subject, which are split together.
    """

    id: str
    messages: tuple[Message, ...]
    reference: str | None = None
    category: str | None = None
    cluster: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    prefill: str = ""
    is_raw: bool = False
    pair: str | None = None

    @property
    def prompt(self) -> str:
        """Return the user's last turn."""
        return self.messages[-1].content


@dataclass(frozen=True, slots=True)
class Completion:
    """A model's answer to one example.

    Attributes:
        example: The example's id.
        prompt: The text that the model saw, as rendered by its chat template.
        text: The answer without special tokens, including any prefill. Empty if the model never finished its thought.
        num_tokens: Generated tokens, the end-of-sequence token included.
        finished: Whether the model stopped before the limit.
        sample: Which of several answers to one prompt, from 0.
        thought: What a reasoning model thought before it answered; not part of the text, and never judged or scored.
    """

    example: str
    prompt: str
    text: str
    num_tokens: int
    finished: bool
    sample: int = 0
    thought: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A judge's finding on one completion (DESIGN.md, law 7).

    `harmful` is what the attack success rate counts; `None` means that the judge gave no usable answer: the completion
    is unscored, and counts neither as safe nor as unsafe. Neither harmful nor refused is "other".
    """

    example: str
    harmful: bool | None
    refusal: bool | None
    reason: str = ""
    sample: int = 0


@dataclass(frozen=True, slots=True)
class Value:
    """A scorer's value for one example: in [0, 1], or a log-likelihood, at most 0; `None` if it could not decide."""

    example: str
    metric: str
    value: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its uncertainty: a mean over prompts and models, or the difference of two such means.

    Attributes:
        value: In [0, 1]; for a difference in [-1, 1]; `None` if nothing could be scored.
        low, high: The 95 % interval.
        n: Prompts that were scored, for each model; 0 if the figure is a mean over benchmarks.
        clusters: The number of independent prompts, near-duplicates counted as one; `None` if not recorded.
        unscored: Answers that were not scored, over all models; not in `n`.
        method: How the interval was computed, such as `wilson` or `bootstrap`; empty if not recorded.
        spread: Standard deviation over the models; `None` for one model.
        num_models: The number of models in the mean.
    """

    value: float | None
    low: float
    high: float
    n: int = 0
    clusters: float | None = None
    unscored: int = 0
    method: str = ""
    spread: float | None = None
    num_models: int = 1

    @property
    def covers(self) -> str:
        """Return what the interval covers: prompts, and seeds too if there are several models."""
        return "prompts" if self.spread is None else "prompts and seeds"


@dataclass(frozen=True, slots=True)
class Score:
    """A metric of one model on the prompts of one benchmark and split; its interval is over prompts.

    Attributes:
        model: `base`, or a point and the tuned model that it comes from, such as `linear@0.4/seed-42`.
        benchmark: The benchmark.
        split: `selection` or `confirmation`; `all` if there is only one.
        metric: The metric.
        value: In [0, 1]; `None` if nothing could be scored.
        numerator: Sum of the per-example values.
        n: Examples that were scored.
        n_effective: Effective sample size, with near-duplicates counted less; the interval is based on it.
        unscored: Examples whose verdict could not be read; not in `n`.
        low, high: The 95 % interval.
        value_if_unscored_0, value_if_unscored_1: The value under both readings of the unscored.
        category_mean: The mean over categories, equally weighted, if there are several.
    """

    model: str
    benchmark: str
    split: str
    metric: str
    value: float | None
    numerator: float
    n: int
    n_effective: float
    low: float
    high: float
    unscored: int
    value_if_unscored_0: float
    value_if_unscored_1: float
    category_mean: float | None = None

    @property
    def estimate(self) -> Estimate:
        """Return the value with its interval."""
        return Estimate(self.value, self.low, self.high, self.n, self.n_effective, self.unscored)


Record = TypeVar("Record", Example, Completion, Verdict, Value, Score)
Unit = TypeVar("Unit", Completion, Verdict, Value)


def _checker(kind: Any) -> type[BaseModel]:
    """Return a model that checks types strictly; pydantic checks a dataclass strictly only from JSON text."""
    hints = get_type_hints(kind)
    fields = {
        field.name: (hints[field.name], ... if field.default is dataclasses.MISSING else field.default)
        for field in dataclasses.fields(kind)
    }
    made: type[BaseModel] = create_model(kind.__name__, __config__=ConfigDict(strict=True), **fields)  # type: ignore[call-overload]
    return made


CHECKERS: Mapping[Any, type[BaseModel]] = {kind: _checker(kind) for kind in (Completion, Verdict, Value, Score)}


def to_json(record: Any) -> str:
    """Return one line of JSON for a record, with keys in the order of its fields."""
    return _AS_JSON.encode(record)


def _values(record: Any) -> dict[str, Any]:
    """Return a record's fields; `dataclasses.asdict` would also copy what is in them."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


_AS_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_values)


def from_dict(kind: type[Record], values: Mapping[str, Any]) -> Record:
    """Return the record that `to_json` wrote, from its parsed form; unknown keys are ignored.

    Raises:
        ValueError: a field is missing, or its value is not of the field's type.
    """
    known = {f.name for f in dataclasses.fields(kind)}
    kept = {key: value for key, value in values.items() if key in known}
    if kind is Example:
        kept["messages"] = tuple(Message(**message) for message in kept["messages"])
        return kind(**kept)
    try:
        CHECKERS[kind].model_validate(kept)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"'{'.'.join(map(str, first['loc']))}': {first['msg']}") from error
    found = kind(**kept)
    # a log-likelihood, in nats a token, is below 0
    if isinstance(found, Value) and found.value is not None and not -math.inf < found.value <= MAX_VALUE:
        raise ValueError(f"'value': {found.value:g} is not a value of at most 1")
    return found


def lines_of(records: Iterable[Any]) -> str:
    """Return JSON Lines text for many records."""
    return "".join(to_json(record) + "\n" for record in records)


def sealed(lines: str) -> str:
    """Return JSON Lines with a last line that has their number and digest, so that readers notice damage."""
    return lines + json.dumps({SEAL: xxhash.xxh3_128_hexdigest(lines.encode()), "lines": lines.count("\n")}) + "\n"


def check_seal(path: Path, *, is_always_there: bool = False) -> None:
    """Check that sealed lines are unchanged.

    Args:
        path: The file.
        is_always_there: Whether a seal is required; files of earlier versions have none.

    Raises:
        DataError: the lines were changed, or the file is empty.
    """
    lines, _, last = path.read_bytes().rstrip(b"\n").rpartition(b"\n")
    if not last:
        raise damaged(path, "it is empty")
    if _is_seal(last):
        text = lines.decode("utf-8", "replace")
        if sealed(f"{text}\n" if text else "").rstrip("\n").rpartition("\n")[2].encode() != last:
            raise damaged(path, "it was changed after it was written")
    elif is_always_there:
        raise damaged(path, "its end is missing")


def damaged(path: Path, how: str) -> DataError:
    """Return the error for a file of records that cannot be trusted."""
    return DataError(f"{path} is damaged: {how}", remedy="delete the file and run again; its stage is repeated.")


def _is_seal(line: bytes) -> bool:
    return line.startswith(b'{"' + SEAL.encode() + b'"')


def read_lines(kind: type[Record], path: Path) -> Iterator[Record]:
    """Read a JSON Lines file of one kind of record; a seal at its end is skipped without being checked.

    Raises:
        DataError: a line is not JSON or lacks a field; the message names the file and the line.
    """
    # read as bytes: a line that was torn within a character must still be counted as a line
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if _is_seal(line):
                continue
            try:
                values = json.loads(line.decode("utf-8"))
                if not isinstance(values, dict):
                    raise TypeError("it is not a JSON object")
                yield from_dict(kind, values)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise DataError(
                    f"{path}, line {number}: not a {kind.__name__.lower()} record: {error}",
                    remedy="delete the file and run again; its stage is repeated.",
                ) from error
