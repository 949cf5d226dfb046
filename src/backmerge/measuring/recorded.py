"""Answers of a finished run, read from its records: to be judged, scored or labelled without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from backmerge.benchmarks.protocol import Benchmark, Kind
from backmerge.errors import RunError
from backmerge.measuring.answer import Answered
from backmerge.merging.served import Realisation
from backmerge.planning.points import BASE, Member
from backmerge.records import Completion, Verdict, from_dict, to_json
from backmerge.runs import check_digests, key_of

EARLIER = Realisation("earlier", None, None, None)


class Recorded(NamedTuple):
    """A model's answers to one benchmark's split, with the judge's verdicts.

    Attributes:
        questions: The user's last turn, for each completion.
        clusters: The cluster of near-duplicate prompts, for each completion.
        verdicts: One for each completion; empty for utility.
    """

    model: str
    benchmark: str
    split: str
    kind: Kind
    completions: list[Completion]
    questions: list[str]
    clusters: list[str]
    verdicts: list[Verdict]

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
            remedy="run the command of that run again: it writes them again from its units.",
        ) from error


def _recorded(run: Path) -> list[Recorded]:
    found: dict[tuple[str, str, str], Recorded] = {}
    for name in ("completions", "verdicts"):
        # line by line as they were written: an answer may contain other characters that count as a line's end
        for line in (run / "records" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n"):
            if not line:
                continue
            values = json.loads(line)
            place = (values["model"], values["benchmark"], values["split"])
            recorded = found.setdefault(place, Recorded(*place, values["kind"], [], [], [], []))
            if name == "verdicts":
                recorded.verdicts.append(from_dict(Verdict, values))
            else:
                recorded.completions.append(from_dict(Completion, values))
                recorded.questions.append(values["question"])
                recorded.clusters.append(values["cluster"])
    for recorded in found.values():
        judged = [(verdict.example, verdict.sample) for verdict in recorded.verdicts]
        answered = [(completion.example, completion.sample) for completion in recorded.completions]
        if judged != answered and (judged or recorded.kind in ("safety", "over_refusal")):
            raise ValueError(f"{recorded.model} on {recorded.benchmark}: the verdicts do not belong to its answers")
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
