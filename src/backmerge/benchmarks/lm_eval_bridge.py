"""Run any task of lm-evaluation-harness by name, asked and scored through our own records.

Record, then replay. The harness makes the prompts, which become examples. Our engines answer them like any others, so
that units, cache, resuming, clusters and paired statistics work for its tasks too. Then the harness's own `evaluate`
asks a model that repeats these answers. The figures equal those of `lm_eval.simple_evaluate`, number for number.

Worked example: `gsm8k` gives 1,319 examples, a `Sampling` with the task's stop texts, and after generation
`exact_match,strict-match` and `exact_match,flexible-extract` of each example.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backmerge.benchmarks.lm_eval_scores import LmEvalPart, LmEvalResults, results
from backmerge.benchmarks.lm_eval_tasks import (
    Rows,
    as_the_harness_runs,
    harness_version,
    load_harness_tasks,
    no_progress_bars,
)
from backmerge.errors import DataError, GenerationError
from backmerge.generation.chat import prompt_text
from backmerge.generation.protocol import LogLikelihood, Sampling
from backmerge.records import Completion, Example, Message
from backmerge.registry import NOTHING_ALLOWED, Permissions

# the harness's default limit, for tasks without their own
DEFAULT = Sampling(max_new_tokens=256)
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Conversations:
    """Replaces a chat template while the harness makes prompts, to render their turns ourselves, once."""

    def __init__(self) -> None:
        self._turns: dict[str, tuple[Message, ...]] = {}

    def render(self, turns: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a text in place of the turns; a given beginning of the answer is the last of them."""
        assert add_generation_prompt == (turns[-1]["role"] != "assistant")
        text = json.dumps(turns, ensure_ascii=False)
        self._turns[text] = tuple(Message(turn["role"], turn["content"]) for turn in turns)  # type: ignore[arg-type]
        return text

    def example(self, identity: str, context: str) -> Example:
        """Return what the model is asked for the harness's context: a conversation, or plain text."""
        turns = self._turns.get(context)
        if turns is None:
            return Example(identity, (Message("user", context),), is_raw=True)
        if turns[-1].role == "assistant":
            return Example(identity, turns[:-1], prefill=turns[-1].content)
        return Example(identity, turns)


@dataclass(frozen=True)
class LmEvalTask:
    """A task of the harness, or a group or tag of them.

    Attributes:
        name: The requested name.
        parts: One for each task.
        groups: Group name to `lm_eval.api.group.Group`.
        conversations: The texts of its requests that mean conversations.
        identity: What prompts and scores depend on: the versions of harness and tasks, and how they are asked.
    """

    name: str
    parts: tuple[LmEvalPart, ...]
    groups: Mapping[str, Any]
    conversations: Conversations
    identity: Mapping[str, str]

    @property
    def examples(self) -> tuple[Example, ...]:
        """The examples of all documents, in the harness's order; `category` is the task."""
        return tuple(example for part in self.parts for example in part.examples)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that every task averages, those where higher is better first; named as in `values`."""
        first, *others = [part.metrics for part in self.parts]
        return tuple(key for key in first if all(key in other for other in others))

    @property
    def wants_likelihoods(self) -> bool:
        """Return whether `pairs` and `score_likelihoods` are used, rather than completions.

        Raises:
            DataError: a group contains tasks of both kinds.
        """
        kinds = {part.sampling is None for part in self.parts}
        if len(kinds) > 1:
            raise DataError(
                f"'{self.name}' contains tasks that generate and tasks that compare likelihoods",
                remedy="give its tasks one at a time.",
            )
        return kinds.pop()

    @property
    def sampling(self) -> Sampling:
        """Stop texts, limit, and number of answers to each prompt.

        Raises:
            DataError: the tasks of a group differ in them, or need likelihoods.
        """
        asked = {part.sampling.model_dump_json(): part.sampling for part in self.parts if part.sampling is not None}
        if self.wants_likelihoods or len(asked) > 1:
            raise DataError(
                f"the tasks of '{self.name}' do not all need the same kind of answer, or need none",
                remedy="give its tasks one at a time.",
            )
        return next(iter(asked.values()))

    def check_documents(self) -> None:
        """Check that the tasks read the documents that their prompts were made of, before anything is generated.

        Raises:
            DataError: they read others.
        """
        with as_the_harness_runs():
            for part in self.parts:
                for number, document in part.task.doc_iterator(limit=len(part.examples)):
                    part.check(f"{part.name}/{number}", document)

    def pairs(self, tokenizer: Any, examples: Sequence[Example] | None = None) -> list[tuple[str, str]]:
        """Return the input of `Generator.log_likelihoods`: contexts, rendered once, and continuations.

        Raises:
            GenerationError: the tokenizer's chat template refuses a context.
        """
        rendered: dict[str, str] = {}  # a document's choices share one context
        pairs = []
        for of in self.requests_of(self.examples if examples is None else examples).values():
            for request in of:
                context, continuation = _context(request), request.args[-1]
                if context not in rendered:
                    rendered[context] = prompt_text(tokenizer, self.conversations.example("", context))
                pairs.append((rendered[context], continuation))
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
        """Return the same from texts: `answers[i]` are those to `examples[i]`."""
        wanted = self.sampling.num_samples
        responses = {}
        for example, given in zip(examples, answers, strict=True):
            if len(given) != wanted:
                raise DataError(
                    f"'{example.id}' has {len(given)} answers, but '{self.name}' needs {wanted}",
                    remedy="generate again, with the task's own sampling.",
                )
            # the harness's filters get the model's own text, without the given beginning of the answer
            responses[example.id] = [[text.removeprefix(example.prefill) for text in given]]
        return results(self.parts, self.groups, responses)

    def score_likelihoods(self, examples: Sequence[Example], found: Sequence[LogLikelihood]) -> LmEvalResults:
        """Score by likelihoods, one for each of `pairs(tokenizer, examples)`.

        Raises:
            DataError: there are fewer, or more.
        """
        requests = self.requests_of(examples)
        if len(found) != sum(map(len, requests.values())):
            raise DataError(
                f"{len(found)} likelihoods were given, but '{self.name}' compares {sum(map(len, requests.values()))}"
            )
        in_order = iter(found)
        responses = {name: [[_response(r, next(in_order))] for r in of] for name, of in requests.items()}
        return results(self.parts, self.groups, responses)

    def requests_of(self, examples: Sequence[Example]) -> dict[str, tuple[Any, ...]]:
        """Return each example's requests, in the order of the examples."""
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
    """Load a task of lm-evaluation-harness, or a group or tag of them.

    Args:
        name: Its name in the harness, such as `gsm8k`, `mmlu` or `bbh_cot_fewshot`.
        as_turns: Whether shots are turns of the conversation (the harness's default since 0.4.11, its
            `fewshot_as_multiturn`), or come before the question in one turn (its earlier default).
        is_chat: Whether the model's chat template is applied, as by the harness's `apply_chat_template`; otherwise the
            prompt is the raw text, and `as_turns` has no effect.
        system: A system message, before the task's description.
        num_fewshot: Number of shots; by default the task's own.
        limit: Only the first documents of each task.
        task_path: A YAML file, or a folder of them, of the user's own.
        rows: Task name to split to rows, instead of the task's data from the hub.
        permissions: Whether code in the user's own task files may run.

    Raises:
        ConfigError: unknown task, lm-eval is missing or old, or code is not allowed.
        DataError: the task's data is not available, or the task is of a kind that is not supported.
    """
    version = harness_version()  # a missing lm-eval is reported before anything of it is imported
    conversations = Conversations()
    clusters: dict[tuple[tuple[str, ...], ...], str] = {}
    with as_the_harness_runs():
        found = load_harness_tasks(
            name, num_fewshot=num_fewshot, task_path=task_path, rows=rows, permissions=permissions
        )
        with no_progress_bars():
            for task in found.tasks.values():
                task.build_all_requests(
                    limit=limit,
                    system_instruction=system,
                    apply_chat_template=is_chat,
                    fewshot_as_multiturn=is_chat and as_turns,
                    chat_template=conversations.render if is_chat else None,
                )
        parts = tuple(_part(task_name, task, conversations, clusters) for task_name, task in found.tasks.items())
    how = {"is_chat": str(is_chat), **({"as_turns": str(as_turns)} if is_chat else {})}
    shots = {part.name: f"{part.task.VERSION}, {part.task.config.num_fewshot} shots" for part in parts}
    for part in parts:
        part.task.set_config("num_fewshot", 0)  # scoring makes the prompts again, and does not look at them
    return LmEvalTask(name, parts, found.groups, conversations, {"lm-eval": version, **shots, **how})


def sampling_of(asked: Mapping[str, Any], default: Sampling = DEFAULT) -> Sampling:
    """Return the harness's `generation_kwargs` as a `Sampling`; `default` sets what they leave open.

    Greedy unless `do_sample` or, if that is not given, a temperature above 0 says otherwise.

    Raises:
        GenerationError: they need something that `Sampling` does not have, such as beams.
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
        # transformers' own default, if only sampling is requested
        "temperature": float(1.0 if temperature is None else temperature) if draws else 0.0,
        **({"max_new_tokens": int(limits[0])} if limits else {}),
        **{name: left.pop(name) for name in ("top_p", "top_k", "repetition_penalty") if name in left},
    }
    if left.get("num_beams") == 1:
        left.pop("num_beams")
    if left:
        raise GenerationError(
            f"a task asks to generate with {', '.join(f'{key}={value}' for key, value in sorted(left.items()))}, "
            "which the engines here do not support",
            remedy="remove it, if the task file is your own.",
        )
    return Sampling.model_validate({**default.model_dump(), **changes})


def _part(
    name: str, task: Any, conversations: Conversations, clusters: dict[tuple[tuple[str, ...], ...], str]
) -> LmEvalPart:
    """Return a task's examples; `clusters` records which example first asked what, over all tasks."""
    requests: dict[str, tuple[Any, ...]] = defaultdict(tuple)
    for request in sorted(task.instances, key=lambda request: (request.doc_id, request.idx)):
        requests[f"{name}/{request.doc_id}"] += (request,)
    examples = []
    for identity, of in requests.items():
        target = task.doc_to_target(of[0].doc)
        example = replace(
            conversations.example(identity, _context(of[0]) or of[0].args[-1]),
            reference=target if isinstance(target, str) else None,
            category=name,
            # a task's rows share a template, which does not make them near-duplicates; repeated rows count as one
            # cluster
            cluster=clusters.setdefault(tuple(_asked(request) for request in of), identity),
        )
        examples.append(example)
    sampling = None
    if task.instances[0].request_type == "generate_until":
        sampling = sampling_of(task.config.generation_kwargs or {}, DEFAULT)
        sampling = sampling.model_copy(update={"num_samples": task.instances[0].repeats or 1})
    return LmEvalPart(name, task, tuple(examples), dict(requests), sampling)


def _context(request: Any) -> str:
    """Return the text that a request's continuation follows; empty if a text is scored as a whole."""
    context: str = "" if request.request_type == "loglikelihood_rolling" else request.args[0]
    return context


def _asked(request: Any) -> tuple[str, ...]:
    """Return everything that a model sees of a request."""
    return tuple(request.args[:1] if request.request_type == "generate_until" else request.args)


def _response(request: Any, found: LogLikelihood) -> Any:
    """Return a likelihood in the form that the harness expects for this kind of request."""
    return found.total if request.request_type == "loglikelihood_rolling" else (found.total, found.is_greedy)
