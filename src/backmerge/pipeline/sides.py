"""Two models that are not asked in one place: one here, one on a server, or one that answered in an earlier run.

To what measures them they are one engine, which asks for each where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from backmerge.benchmarks.protocol import Benchmark
from backmerge.errors import RunError
from backmerge.generation.protocol import Generator, Sampling, realised
from backmerge.merging.recipe import Variant
from backmerge.merging.served import Realisation
from backmerge.pipeline.given import GivenAnswers, read_records
from backmerge.records import Completion, Example, to_json
from backmerge.runs import key_of

BASE_MODEL = "base"  # what a run's records call it


@dataclass(frozen=True)
class _There:
    """In a variant's place: a model that is somewhere else."""

    identity: Mapping[str, Any]


class Route(NamedTuple):
    """Where a model is asked.

    Attributes:
        engine: What answers for it.
        variant: What that engine is asked for; `None` for the model that a server has.
    """

    engine: Generator
    variant: Variant | None


class Sides(Generator):
    """In an engine's place: asks each model where it is."""

    def __init__(self) -> None:
        self._routes: dict[str, Route] = {}

    @property
    def identity(self) -> dict[str, str]:
        """That each variant's identity says which engine answers: one side's change keeps the other's answers."""
        return {"engine": "sides"}

    def add(self, route: Route) -> Variant:
        """Take up a model; gives what stands for it."""
        weights = None if route.variant is None else route.variant.identity
        variant = _There({"weights": weights, "asked": route.engine.identity})
        self._routes[key_of(variant.identity)] = route
        return cast("Variant", variant)

    def generate(
        self, variant: Variant | None, examples: Sequence[Example], sampling: Sampling, advance: Callable[[int], None]
    ) -> list[Completion]:
        """Each example's completions, in order, from where the model is."""
        assert variant is not None
        route = self._routes[key_of(variant.identity)]
        return route.engine.generate(route.variant, examples, sampling, advance)

    def realised(self, variant: Variant) -> Realisation:
        """How the model is measured that stands for a variant."""
        route = self._routes[key_of(variant.identity)]
        if isinstance(route.engine, EarlierAnswers):
            return Realisation("earlier", None, None, None)
        return realised(route.engine, route.variant)

    def release(self) -> None:
        """Free what the engines hold."""
        for route in self._routes.values():
            route.engine.release()


class EarlierAnswers(GivenAnswers):
    """In an engine's place: what the base of an earlier run answered to one benchmark.

    Args:
        answers: Example id to completions.
    """

    def __init__(self, answers: Mapping[str, Sequence[Completion]]) -> None:
        super().__init__(answers)
        told = key_of([to_json(completion) for found in answers.values() for completion in found])
        self._told = told

    @property
    def identity(self) -> dict[str, str]:
        """A hash of the answers."""
        return {"engine": "given", "answers": self._told}


class Asked(NamedTuple):
    """A benchmark, as far as an earlier run's base has answered it.

    Attributes:
        examples: The prompts with an answer, in the benchmark's order.
        answers: Gives them.
    """

    examples: list[Example]
    answers: EarlierAnswers


def earlier_answers(run: Path, benchmarks: Sequence[Benchmark]) -> dict[str, Asked]:
    """What a finished run's base answered, by benchmark; the halves of a benchmark together.

    Raises:
        RunError: the run is unfinished, has no answers of a base to one of them, or was asked something else under the
            same name.
    """
    found: dict[str, dict[str, list[Completion]]] = {}
    asked: dict[tuple[str, str], str] = {}
    for recorded in read_records(run):
        if recorded.model != BASE_MODEL:
            continue
        by_example: dict[str, list[Completion]] = {}
        for completion, question in zip(recorded.completions, recorded.questions, strict=True):
            by_example.setdefault(completion.example, []).append(completion)
            asked[recorded.benchmark, completion.example] = question
        found.setdefault(recorded.benchmark, {}).update(by_example)
    matched = {}
    for benchmark in benchmarks:
        answers = found.get(benchmark.name, {})
        if not answers:
            raise RunError(
                f"{run} has no answers of a model 'base' to {benchmark.name}",
                remedy="give a run that measured the base on it, as `backmerge check`, `restore` and `evaluate BASE` "
                "do; what compares likelihoods keeps no answers: leave it out with --set.",
            )
        examples = [example for example in benchmark.examples if example.id in answers]
        prompts = {example.id: example.prompt for example in examples}
        lost = next((name for name in answers if prompts.get(name) != asked[benchmark.name, name]), None)
        if lost is not None:
            raise RunError(
                f"the base in {run} answered another prompt as '{lost}' of {benchmark.name} than there is now",
                remedy="put the data back as they were, or give the base itself with --against.",
            )
        matched[benchmark.name] = Asked(examples, EarlierAnswers(answers))
    return matched
