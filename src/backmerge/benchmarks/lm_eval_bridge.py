"""Any task of lm-evaluation-harness by name, asked and scored through our own records.

The harness makes the prompts and finds the scores; between them stand examples and completions as everywhere here, so
that units, cache, resuming, clusters and paired statistics work on its tasks too. The figures are those of
`lm_eval.simple_evaluate`, number for number.

Worked example: `gsm8k` gives 1,319 examples, a `Sampling` with the task's stop texts, and after generation
`exact_match,strict-match` and `exact_match,flexible-extract` of each example.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backmerge.benchmarks.lm_eval_scores import LmEvalPart, LmEvalResults, averaged, results
from backmerge.benchmarks.lm_eval_tasks import (
    HarnessTasks,
    Rows,
    as_the_harness_runs,
    harness_version,
    load_harness_tasks,
)
from backmerge.errors import DataError, GenerationError
from backmerge.generation.chat import prompt_text
from backmerge.generation.protocol import LogLikelihood, Sampling
from backmerge.records import Completion, Example, Message
from backmerge.registry import NOTHING_ALLOWED, Permissions

# the harness's default limit, for tasks that give no other
DEFAULT = Sampling(max_new_tokens=256)
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True)
class LmEvalTask:
    """A task of the harness, or a group or tag of them.

    Attributes:
        name: As asked for.
        parts: One for each task.
        groups: Group name to `lm_eval.api.group.Group`.
        identity: What prompts and scores depend on: the harness's version, the tasks' own, and how they are asked.
    """

    name: str
    parts: tuple[LmEvalPart, ...]
    groups: Mapping[str, Any]
    identity: Mapping[str, str]

    @property
    def examples(self) -> tuple[Example, ...]:
        """Every document's, in the harness's order; `category` is the task."""
        return tuple(example for part in self.parts for example in part.examples)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What every one of the tasks averages, first what is better when higher: metric and filter, as in `values`."""
        first, *others = [averaged(part) for part in self.parts]
        return tuple(key for key in first if all(key in other for other in others))

    @property
    def wants_likelihoods(self) -> bool:
        """Whether `pairs` and `score_likelihoods` are to be used, rather than completions.

        Raises:
            DataError: a group holds tasks of both kinds.
        """
        kinds = {part.sampling is None for part in self.parts}
        if len(kinds) > 1:
            raise DataError(
                f"'{self.name}' holds tasks that generate and tasks that compare likelihoods",
                remedy="name its tasks one at a time.",
            )
        return kinds.pop()

    @property
    def sampling(self) -> Sampling:
        """Stop texts, limit, and how many answers to each prompt.

        Raises:
            DataError: the tasks of a group differ in them, or ask for likelihoods.
        """
        asked = {part.sampling.model_dump_json(): part.sampling for part in self.parts if part.sampling is not None}
        if self.wants_likelihoods or len(asked) > 1:
            raise DataError(
                f"the tasks of '{self.name}' ask for no answers, or for answers of {len(asked)} kinds",
                remedy="name its tasks one at a time.",
            )
        return next(iter(asked.values()))

    def pairs(self, tokenizer: Any, examples: Sequence[Example] | None = None) -> list[tuple[str, str]]:
        """What `Generator.log_likelihoods` is asked: contexts, rendered once, and continuations; several per example.

        Raises:
            GenerationError: the tokenizer's chat template refuses a context.
        """
        rendered: dict[int, str] = {}  # a document's choices share one context
        pairs = []
        for of in self.requests_of(self.examples if examples is None else examples).values():
            for request in of:
                context, continuation = _context(request), request.args[-1]
                if id(context) not in rendered:
                    rendered[id(context)] = prompt_text(tokenizer, _example("", context))
                pairs.append((rendered[id(context)], continuation))
        return pairs

    def score(self, examples: Sequence[Example], completions: Sequence[Completion]) -> LmEvalResults:
        """Score answers by the task's own filters and metrics.

        Args:
            examples: All of the task's examples, or some.
            completions: `sampling.num_samples` for each of them.

        Raises:
            DataError: an example has fewer answers, or more.
        """
        answers: dict[str, list[str]] = {example.id: [] for example in examples}
        for completion in completions:
            answers[completion.example].append(completion.text)
        return self.score_answers(examples, [answers[example.id] for example in examples])

    def score_answers(self, examples: Sequence[Example], answers: Sequence[Sequence[str]]) -> LmEvalResults:
        """The same, from the texts: `answers[i]` are those to `examples[i]`."""
        wanted = self.sampling.num_samples
        responses = {}
        for example, given in zip(examples, answers, strict=True):
            if len(given) != wanted:
                raise DataError(
                    f"'{example.id}' has {len(given)} answers, and '{self.name}' is scored by {wanted}",
                    remedy="generate again, with the task's own sampling.",
                )
            # the harness's filters see what the model wrote, not what was put into its mouth
            responses[example.id] = [[text.removeprefix(example.prefill) for text in given]]
        return results(self.parts, self.groups, examples, responses)

    def score_likelihoods(self, examples: Sequence[Example], found: Sequence[LogLikelihood]) -> LmEvalResults:
        """Score by likelihoods, one for each of `pairs(tokenizer, examples)`.

        Raises:
            DataError: there are fewer, or more.
        """
        requests = self.requests_of(examples)
        if len(found) != sum(map(len, requests.values())):
            raise DataError(
                f"{len(found)} likelihoods were found, and '{self.name}' compares {sum(map(len, requests.values()))}"
            )
        in_order = iter(found)
        responses = {name: [[_response(r, next(in_order))] for r in of] for name, of in requests.items()}
        return results(self.parts, self.groups, examples, responses)

    def requests_of(self, examples: Sequence[Example]) -> dict[str, tuple[Any, ...]]:
        """Each example's requests, in the order of the examples."""
        known = {name: of for part in self.parts for name, of in part.requests.items()}
        return {example.id: known[example.id] for example in examples}


def load_lm_eval_task(
    name: str,
    *,
    as_turns: bool,
    is_chat: bool = True,
    system: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    task_path: Path | None = None,
    rows: Mapping[str, Rows] | None = None,
    permissions: Permissions = NOTHING_ALLOWED,
) -> LmEvalTask:
    """A task of lm-evaluation-harness, or a group or tag of them.

    Args:
        name: As the harness names it, such as `gsm8k`, `mmlu` or `bbh_cot_fewshot`.
        as_turns: Whether shots are turns of the conversation (the harness's default since 0.4.11, its
            `fewshot_as_multiturn`), or stand before the question in one turn (its default before).
        is_chat: Whether the model's chat template is applied, as the harness's `apply_chat_template`; the raw text is
            shown otherwise, and `as_turns` has no effect.
        system: A system message, before the task's description.
        num_fewshot: Shots; by default what the task says.
        limit: Only the first documents of each task.
        task_path: A YAML file, or a folder of them, of the user's own.
        rows: Task name to split to rows, in place of what the task would fetch from the hub.
        permissions: Leave to run the code that a task file of the user's own may hold.

    Raises:
        ConfigError: no such task, lm-eval is missing or old, or leave for code is.
        DataError: the task's data cannot be had, or it is of a kind that is not run here.
    """
    harness_version()  # where lm-eval is missing, that is said before anything of it is imported
    with as_the_harness_runs():
        found = load_harness_tasks(
            name, num_fewshot=num_fewshot, task_path=task_path, rows=rows, permissions=permissions
        )
        clusters: dict[tuple[Any, ...], str] = {}
        parts = tuple(
            _built(task_name, task, clusters, as_turns=as_turns, is_chat=is_chat, system=system, limit=limit)
            for task_name, task in found.tasks.items()
        )
    how = {"as_turns": str(as_turns)} if is_chat else {}
    return LmEvalTask(name, parts, found.groups, {**_versions(found), "is_chat": str(is_chat), **how})


def sampling_of(asked: Mapping[str, Any], default: Sampling = DEFAULT) -> Sampling:
    """The harness's `generation_kwargs` as a `Sampling`; what they leave open is the default's.

    Greedy unless `do_sample` or, where that is not given, a temperature above 0 says otherwise.

    Raises:
        GenerationError: they ask for what no `Sampling` can say, such as beams.
    """
    left = dict(asked)
    limits = [left.pop(name) for name in LIMITS if left.get(name) is not None]
    until = left.pop("until", None) or []
    temperature = left.pop("temperature", None)
    draws = left.pop("do_sample", None)
    if draws is None:
        draws = bool(temperature)
    changes: dict[str, Any] = {
        "stop": tuple(dict.fromkeys(stop for stop in ([until] if isinstance(until, str) else until) if stop)),
        # transformers' own default, where only drawing is asked for
        "temperature": float(1.0 if temperature is None else temperature) if draws else 0.0,
        **({"max_new_tokens": int(limits[0])} if limits else {}),
        **{name: left.pop(name) for name in ("top_p", "top_k", "repetition_penalty") if name in left},
    }
    if left.get("num_beams") == 1:
        left.pop("num_beams")
    if left:
        raise GenerationError(
            f"a task asks to generate with {', '.join(f'{key}={value}' for key, value in sorted(left.items()))}, "
            "which engines here do not know",
            remedy="take it out of a task file of your own.",
        )
    return Sampling.model_validate({**default.model_dump(), **changes})


class _Conversation(str):
    """What stands where the harness expects a rendered prompt: the turns themselves, to be rendered once, by us."""

    __slots__ = ("turns",)
    turns: tuple[Message, ...]


def _conversation(turns: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> _Conversation:
    """In the place of a tokenizer's `apply_chat_template`; an answer's given beginning is the last turn."""
    found = _Conversation("\n".join(turn["content"] for turn in turns))
    found.turns = tuple(Message(turn["role"], turn["content"]) for turn in turns)  # type: ignore[arg-type]
    assert add_generation_prompt == (found.turns[-1].role != "assistant")
    return found


def _built(
    name: str,
    task: Any,
    clusters: dict[tuple[Any, ...], str],
    *,
    as_turns: bool,
    is_chat: bool,
    system: str | None,
    limit: int | None,
) -> LmEvalPart:
    """A task's examples; `clusters` remembers who first asked what, over all tasks."""
    # the harness draws a progress bar for what takes milliseconds
    with contextlib.redirect_stderr(io.StringIO()):
        task.build_all_requests(
            limit=limit,
            system_instruction=system,
            apply_chat_template=is_chat,
            fewshot_as_multiturn=is_chat and as_turns,
            chat_template=_conversation if is_chat else None,
        )
    requests: dict[str, tuple[Any, ...]] = defaultdict(tuple)
    for request in sorted(task.instances, key=lambda request: (request.doc_id, request.idx)):
        requests[f"{name}/{request.doc_id}"] += (request,)
    examples = []
    for identity, of in requests.items():
        target = task.doc_to_target(of[0].doc)
        example = replace(
            _example(identity, _context(of[0]) or of[0].args[-1]),
            reference=target if isinstance(target, str) else None,
            category=name,
            # a task's rows share a template, which makes no near-duplicates of them; a row that is there twice is one
            cluster=clusters.setdefault(tuple(_asked(request) for request in of), identity),
        )
        examples.append(example)
    sampling = None
    if task.instances[0].request_type == "generate_until":
        sampling = sampling_of(task.config.generation_kwargs or {}, DEFAULT)
        sampling = sampling.model_copy(update={"num_samples": task.instances[0].repeats or 1})
    return LmEvalPart(name, task, tuple(examples), dict(requests), sampling)


def _context(request: Any) -> str:
    """What a request's text goes on from; nothing where a text is scored as a whole."""
    context: str = "" if request.request_type == "loglikelihood_rolling" else request.args[0]
    return context


def _asked(request: Any) -> tuple[Any, ...]:
    """All that a model is shown of a request."""
    context = _context(request)
    shown = context.turns if isinstance(context, _Conversation) else context
    return (shown,) if request.request_type == "generate_until" else (shown, request.args[-1])


def _example(identity: str, context: str) -> Example:
    if not isinstance(context, _Conversation):
        return Example(identity, (Message("user", context),), is_raw=True)
    if context.turns[-1].role == "assistant":
        return Example(identity, context.turns[:-1], prefill=context.turns[-1].content)
    return Example(identity, context.turns)


def _response(request: Any, found: LogLikelihood) -> Any:
    """A likelihood in the form that the harness expects for this kind of request."""
    return found.total if request.request_type == "loglikelihood_rolling" else (found.total, found.is_greedy)


def _versions(found: HarnessTasks) -> dict[str, str]:
    return {
        "lm-eval": harness_version(),
        **{name: f"{task.VERSION}, {task.config.num_fewshot} shots" for name, task in found.tasks.items()},
    }
