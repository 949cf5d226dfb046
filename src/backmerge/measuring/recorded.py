"""Answers of a finished run, read from its records: to be judged, scored or labelled without a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.benchmarks.protocol import Benchmark, Kind
from backmerge.errors import RunError
from backmerge.measuring.answer import Answered
from backmerge.merging.served import Realisation
from backmerge.outputs import check_digests
from backmerge.planning.points import BASE, Member
from backmerge.records import Completion, Verdict, from_dict, to_json
from backmerge.runs import key_of

EARLIER = Realisation("earlier", None, None, None)
REMEDY = "run the command of that run again: it writes them again from its units."


class Recorded(NamedTuple):
    """A model's answers to one benchmark's split, with the judge's verdicts.

    Attributes:
        questions: The user's last turn, for each completion.
        clusters: The cluster of near-duplicate prompts, for each completion.
        verdicts: One for each completion; empty for utility.
        second_verdicts: Those of the second judge; empty without one.
    """

    model: str
    benchmark: str
    split: str
    kind: Kind
    completions: list[Completion]
    questions: list[str]
    clusters: list[str]
    verdicts: list[Verdict]
    second_verdicts: Sequence[Verdict] = ()

    @property
    def by_example(self) -> dict[str, list[Completion]]:
        """The answers to each example: its samples."""
        found: dict[str, list[Completion]] = {}
        for completion in self.completions:
            found.setdefault(completion.example, []).append(completion)
        return found

    def as_answered(
        self, member: Member, benchmark: Benchmark, *, remedy: str = "restore the earlier data, or evaluate again."
    ) -> Answered:
        """Return the answers as those of a model to a benchmark.

        Args:
            member: The model that they count for.
            benchmark: The benchmark, as it is now.
            remedy: What to do if its prompts are not those that were answered.

        Raises:
            RunError: the benchmark has no prompt, or another one, with the id of an answered one.
        """
        by_id = {example.id: example for example in benchmark.examples}
        for completion, question in zip(self.completions, self.questions, strict=True):
            name = completion.example
            if name not in by_id:
                raise RunError(
                    f"there are answers of {self.model} to '{name}' of {self.benchmark}, which is no longer in that "
                    "benchmark",
                    remedy=remedy,
                )
            if by_id[name].prompt != question:
                raise RunError(
                    f"the prompt '{name}' of {self.benchmark} has changed since {self.model} answered it: answers to "
                    "another question cannot be judged",
                    remedy=remedy,
                )
        examples = [by_id[name] for name in dict.fromkeys(completion.example for completion in self.completions)]
        key = key_of("earlier", self.model, self.benchmark, self.split, [to_json(one) for one in self.completions])
        return Answered(member, benchmark, self.split, examples, self.completions, key, EARLIER)


def read_records(run: Path) -> list[Recorded]:
    """Return a finished run's answers with their verdicts.

    Raises:
        RunError: it is not finished, or damaged.
    """
    if not (run / "results.json").is_file():
        raise RunError(f"{run} is not a finished run", remedy="run its command again: it continues where it stopped.")
    check_digests(run)
    try:
        return _recorded(run)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise RunError(
            f"the records of {run} are missing or damaged: {error}",
            remedy=REMEDY,
        ) from error


def _recorded(run: Path) -> list[Recorded]:
    found: dict[tuple[str, str, str], Recorded] = {}
    seconds: dict[tuple[str, str, str], list[Verdict]] = {}
    for name in ("completions", "verdicts", "second_verdicts"):
        for values in _lines(run, name, is_optional=name == "second_verdicts"):
            place = (values["model"], values["benchmark"], values["split"])
            recorded = found.setdefault(place, Recorded(*place, values["kind"], [], [], [], []))
            if name == "second_verdicts":
                seconds.setdefault(place, []).append(from_dict(Verdict, values))
            elif name == "verdicts":
                recorded.verdicts.append(from_dict(Verdict, values))
            else:
                recorded.completions.append(from_dict(Completion, values))
                recorded.questions.append(values["question"])
                recorded.clusters.append(values["cluster"])
    for place, recorded in found.items():
        answered = [(completion.example, completion.sample) for completion in recorded.completions]
        for verdicts, is_needed in (
            (recorded.verdicts, recorded.kind in ("safety", "over_refusal")),
            (seconds.get(place, []), False),
        ):
            judged = [(verdict.example, verdict.sample) for verdict in verdicts]
            if judged != answered and (judged or is_needed):
                raise ValueError(f"{recorded.model} on {recorded.benchmark}: the verdicts do not belong to its answers")
    return [recorded._replace(second_verdicts=seconds.get(place, ())) for place, recorded in found.items()]


def _lines(run: Path, view: str, *, is_optional: bool = False) -> Iterator[dict[str, Any]]:
    file = run / "records" / f"{view}.jsonl"
    if is_optional and not file.exists():
        return
    # line by line as they were written: an answer may contain other characters that count as a line's end
    for line in file.read_text(encoding="utf-8").split("\n"):
        if line:
            yield json.loads(line)


class RecordedValues(NamedTuple):
    """A model's values on one split of a benchmark without a judge.

    Attributes:
        clusters: Each example's cluster of near-duplicate prompts, by its id.
        values: By metric and example.
    """

    model: str
    benchmark: str
    split: str
    kind: Kind
    clusters: dict[str, str]
    values: dict[str, dict[str, float | None]]


def read_values(run: Path) -> list[RecordedValues]:
    """Return a finished run's values of utility and of what is to be kept, which need no judge.

    Raises:
        RunError: they are damaged.
    """
    found: dict[tuple[str, str, str], RecordedValues] = {}
    try:
        for row in _lines(run, "values", is_optional=True):
            place = (row["model"], row["benchmark"], row["split"])
            recorded = found.setdefault(place, RecordedValues(*place, row["kind"], {}, {}))
            recorded.clusters[row["example"]] = row["cluster"]
            for metric, value in row["values"].items():
                recorded.values.setdefault(metric, {})[row["example"]] = value
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunError(f"the values in the records of {run} are damaged: {error}", remedy=REMEDY) from error
    return list(found.values())


def answers_of_base(run: Path, benchmarks: Sequence[Benchmark], member: Member, split: str) -> list[Answered]:
    """Return the answers of a finished run's base, for each benchmark; both halves of a benchmark together.

    Args:
        run: Its directory.
        benchmarks: The benchmarks that it must have; answers are used for the prompts that both have.
        member: The model that they count for.
        split: The split's name in the scores.

    Raises:
        RunError: the run is unfinished, has no answers of a base to one of them, or used another prompt with the same
            id.
    """
    found: dict[str, list[Recorded]] = {}
    for recorded in read_records(run):
        if recorded.model == BASE.name:
            found.setdefault(recorded.benchmark, []).append(recorded)
    answered = []
    for benchmark in benchmarks:
        halves = found.get(benchmark.name, [])
        if not any(half.completions for half in halves):
            raise RunError(
                f"{run} has no answers of a model 'base' to {benchmark.name}",
                remedy="give a run that measured the base on it, of `backmerge check`, `restore` or `evaluate BASE`. "
                "Benchmarks that compare likelihoods have no answers: remove them with --set.",
            )
        by_example: dict[str, list[Completion]] = {}
        for half in halves:
            half.as_answered(member, benchmark, remedy="restore the earlier data, or give the base with --against.")
            # with `split: whole`, both halves are the same answers
            by_example |= half.by_example
        examples = [example for example in benchmark.examples if example.id in by_example]
        completions = [completion for example in examples for completion in by_example[example.id]]
        key = key_of("earlier", [to_json(completion) for completion in completions])
        answered.append(Answered(member, benchmark, split, examples, completions, key, EARLIER))
    return answered
