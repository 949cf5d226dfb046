"""The rows that the tuning held out, on which rule `paper` chooses λ, and the models that they are for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from backmerge.benchmarks.split import limited
from backmerge.errors import ConfigError
from backmerge.finetuning.validation import Measure, measure_of
from backmerge.generation.protocol import Generator
from backmerge.planning.points import ALL, Member, Point
from backmerge.records import Example

if TYPE_CHECKING:
    from backmerge.planning.prepare import Plan

ENOUGH = 100  # rows: a share's standard error is 5 points at most


class HeldOut(NamedTuple):
    """Rows to validate on.

    Attributes:
        source: The tuned model that held them out, or `all`.
        examples: The rows.
        note: A remark about them.
    """

    source: str
    examples: tuple[Example, ...]
    note: str = ""


def check_validation(plan: Plan, engine: Generator | type[Generator]) -> None:
    """Check that the values that λ is chosen by can be measured, before anything is tuned.

    Raises:
        ConfigError: the engine provides no likelihoods; or no prompts are left for the confirmation, since λ would be
            chosen on held-out rows and there are none.
    """
    measure = measure_for(plan)
    if measure is None:
        if plan.experiment.choice.rule == "paper" and plan.experiment.evaluate.split == "whole":
            raise ConfigError(
                "no row of the tuning data is held out to choose λ on, and split 'whole' leaves no prompts for it",
                remedy="increase finetune.data.validation, give more rows, or set evaluate.split to 'halves'.",
            )
        return
    if measure.metric == "loss" and not engine.gives_likelihoods:
        raise ConfigError(
            "choice.validation 'loss' compares likelihoods, which the engine "
            f"{plan.experiment.evaluate.engine.name} does not provide",
            remedy="use the engine transformers or vllm, or set choice.validation to accuracy, bertscore or none.",
        )


def num_validation_answers(plan: Plan, points: Iterable[Point]) -> int:
    """Return the number of rows to answer or read, over all models at the points."""
    if measure_for(plan) is None:
        return 0
    sizes = {seeds: sum(len(rows.examples) for rows in _rows(plan, seeds)) for seeds in ("each", ALL)}
    return sum(sizes[ALL if point.is_joint else "each"] for point in points)


def measure_for(plan: Plan) -> Measure | None:
    """Return the measure; `None` if the rule does not need one, or no row was held out."""
    settings, choice = plan.experiment.finetune, plan.experiment.choice
    if settings is None or choice.rule != "paper":
        return None
    if not plan.training or not all(data.validation for data in plan.training.values()):
        return None
    return measure_of(settings.dataset, choice.validation)


def held_out_from(plan: Plan, member: Member) -> list[HeldOut]:
    """Return the rows that a model is validated on: its own seed's; for the base, each seed's."""
    if member.tuned == ALL:
        return _rows(plan, ALL)
    return [rows for rows in _rows(plan, "each") if member.tuned in (None, rows.source)]


def _rows(plan: Plan, seeds: str) -> list[HeldOut]:
    """Return the rows held out from each seed, or those for a merge of all seeds' models."""
    if seeds == ALL:
        return [held_out_from_all(plan)]
    return [HeldOut(f"seed-{seed}", _limited(plan, data.validation)) for seed, data in plan.training.items()]


def held_out_from_all(plan: Plan) -> HeldOut:
    """Return the rows for a model that is merged from all seeds' models.

    Rows that one seed held out are mostly training rows of another. So the rows are those that no seed was tuned on, if
    they are 100 or half of all; otherwise all that any seed held out, which favours such merges over others, and is
    noted.
    """
    held_out = {(e.id, _asked(e)): e for data in plan.training.values() for e in data.validation}
    tuned_on = {_asked(example) for data in plan.training.values() for example in data.training}
    unseen = [example for example in held_out.values() if _asked(example) not in tuned_on]
    if len(unseen) == len(held_out):
        return HeldOut(ALL, _limited(plan, unseen))
    if len(unseen) >= min(ENOUGH, len(held_out) / 2):
        note = "merged from all tuned models, and validated on held-out rows that none was tuned on"
        return HeldOut(ALL, _limited(plan, unseen), note)
    examples = _limited(plan, list(held_out.values()))
    seen = sum(_asked(example) in tuned_on for example in examples)
    note = (
        f"merged from all tuned models; {seen:,} of its {len(examples):,} rows were held out from one and trained on "
        "by another, which favours it"
    )
    return HeldOut(ALL, examples, note)


def _limited(plan: Plan, examples: Sequence[Example]) -> tuple[Example, ...]:
    """Return at most as many as a split of a benchmark may have, with unique ids."""
    return tuple(limited(_with_unique_ids(examples), plan.experiment.evaluate.limit))


def _asked(example: Example) -> tuple[tuple[str, str], ...]:
    """Return the prompt without system prompt, which training and held-out rows never share."""
    return tuple((message.role, message.content) for message in example.messages if message.role != "system")


def _with_unique_ids(examples: Sequence[Example]) -> list[Example]:
    """Make ids unique: plugins may give several examples the same id."""
    seen: dict[str, int] = {}
    found = []
    for example in examples:
        number = seen[example.id] = seen.get(example.id, 0) + 1
        found.append(example if number == 1 else replace(example, id=f"{example.id}#{number}"))
    return found
