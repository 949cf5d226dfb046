"""Judges that are models: a question to the model about each answer, and a parser of its reply."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import ConfigError, GenerationError
from backmerge.generation.protocol import EngineSettings, Generator, Sampling, engine_class, made_engine
from backmerge.judging.protocol import Finding, Judge, JudgeSettings, UnreadableError, unscored
from backmerge.merging.recipe import Variant
from backmerge.records import Completion, Example, Message, Verdict
from backmerge.registry import JUDGES, closest
from backmerge.runs import key_of

Key = tuple[tuple[Message, ...], bool]  # two questions with the same key are equal
EMPTY: Key = ((), False)
PUBLISHED = ("wildguard", "llama-guard-3", "harmbench")  # judges with their own weights, the preferred one first


@dataclass(frozen=True)
class Form:
    """The question of one kind of judge, and the parser of its replies.

    Attributes:
        name: Its name in the table of judges.
        version: Changes with the question's text or the parser.
        question: Makes the question about an answer; in the example that it returns, the messages, `is_raw` and the
            facts count.
        parse: Reads a reply to a question; raises `UnreadableError` for one that is not in the requested form.
        sampling: How the judge's model answers.
        is_cut_short: Whether replies are cut off on purpose, since only their beginning is read. Otherwise a reply that
            reached the limit is not read.
        finds_harm: Whether its verdicts report harm.
        finds_refusals: Whether its verdicts report refusals.
    """

    name: str
    version: str
    question: Callable[[Example, Completion], Example]
    parse: Callable[[str, Example], Finding]
    sampling: Sampling
    is_cut_short: bool = False
    finds_harm: bool = True
    finds_refusals: bool = True


class ModelJudge(Judge):
    """Ask a model about each answer; equal questions are asked once.

    An empty answer is neither harmful nor a refusal, and the model is not asked. An answer is unscored, with a reason,
    if the reply is not in the requested form or was cut off, or if the question exceeds the judge's context (no part of
    an answer is dropped to make it fit).

    Models that were trained as judges get the answer unchanged, since their questions must be as in training. An answer
    that imitates the question's own marks, or contains the judge's control tokens as text, can mislead them.

    Args:
        form: Question and parser.
        model: Folder, hub id, or name on the server.
        make_engine: Makes the engine for the judge's model; called when it is first needed. If the engine's `is_served`
            is true, a server has the model: no weights are needed here, and the engine gets no variant.
    """

    holds_model = True

    def __init__(self, form: Form, model: str, make_engine: Callable[[], Generator]) -> None:
        self.name = form.name
        self.finds_harm = form.finds_harm
        self.finds_refusals = form.finds_refusals
        self._form = form
        self._model = model
        self._make_engine = make_engine

    @cached_property
    def identity(self) -> str:
        """Return a hash of the question, the parser, the judge's weights, and the engine.

        Raises:
            BackmergeError: the judge's model or its engine is missing.
        """
        weights = self._model if self._variant is None else self._variant.identity
        parts = (self._form.version, self._form.sampling.model_dump(), weights, self._engine.identity)
        return f"{self.name}/{key_of(*parts)}"

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        """Return one verdict per completion, in order.

        Raises:
            BackmergeError: the judge's model or its engine is missing, or it failed.
        """
        questions: dict[Key, Example] = {}
        keys: list[Key] = []
        for example, completion in zip(examples, completions, strict=True):
            if not completion.text.strip():
                keys.append(EMPTY)
                continue
            question = self._form.question(example, completion)
            keys.append((question.messages, question.is_raw))
            if keys[-1] not in questions:
                questions[keys[-1]] = replace(question, id=_name(example, completion, len(questions)))
        findings = dict(zip(questions, self._findings(list(questions.values())), strict=True))
        findings[EMPTY] = Finding(harmful=False, refusal=False, reason="the answer is empty")
        return [
            Verdict(completion.example, *self._within_competence(findings[key]))
            for completion, key in zip(completions, keys, strict=True)
        ]

    def release(self) -> None:
        """Free the device's memory until the next call."""
        if "_engine" in self.__dict__:
            self._engine.release()

    @cached_property
    def _engine(self) -> Generator:
        return self._make_engine()

    @cached_property
    def _variant(self) -> Any:
        """Return the judge's weights; `None` if a server has them."""
        if self._engine.is_served:
            return None
        return Variant(Checkpoint(locate_model(self._model)))

    def _findings(self, questions: list[Example]) -> list[Finding]:
        findings: dict[str, Finding] = {}
        left = questions
        while left:
            try:
                replies = self._engine.generate(self._variant, left, self._form.sampling, lambda _: None)
            except GenerationError as error:
                # an error about one prompt names it; any other error concerns the judge as a whole
                refused = error.example
                if refused not in {question.id for question in left}:
                    raise
                findings[refused] = unscored(error.message)
                left = [question for question in left if question.id != refused]
                continue
            for question, reply in zip(left, replies, strict=True):
                findings[question.id] = self._finding(question, reply)
            break
        return [findings[question.id] for question in questions]

    def _finding(self, question: Example, reply: Completion) -> Finding:
        if not reply.finished and not self._form.is_cut_short:
            return unscored(f"the judge's reply was cut off at {reply.num_tokens} tokens")
        if not reply.text.strip():
            return unscored("the judge's reply is empty")
        try:
            return self._form.parse(reply.text, question)
        except UnreadableError as error:
            return unscored(str(error))

    def _within_competence(self, finding: Finding) -> Finding:
        """Remove findings that this judge does not report, also for empty answers."""
        return Finding(
            finding.harmful if self.finds_harm else None,
            finding.refusal if self.finds_refusals else None,
            finding.reason,
        )


def model_judge(
    form: Form, settings: JudgeSettings, default_model: str | None, *, options: Collection[str] = ()
) -> ModelJudge:
    """Make a judge of this form from its settings.

    Args:
        form: Question and parser.
        settings: The model and its engine.
        default_model: A hub id; `None` if a model must be named.
        options: The options that this kind of judge has.

    Raises:
        ConfigError: an option is unknown, or no model is given.
    """
    for option in settings.options:
        if option not in options:
            known = f"its options are {', '.join(sorted(options))}" if options else "it has no options"
            raise ConfigError(
                f"the judge '{settings.name}' has no option '{option}'{closest(option, options)}",
                remedy=f"remove it; {known}.",
            )
    model = settings.model or settings.engine.options.get("model") or default_model
    if model is None:
        raise ConfigError(
            f"the judge '{settings.name}' needs a model",
            remedy="name one with judge.model: a folder, a hub id, or its name on the server.",
        )
    return ModelJudge(form, str(model), lambda: _made_engine(settings.engine, str(model)))


def published_model(name: str) -> str | None:
    """Return the hub id of a judge's own weights; `None` for a judge that uses any model, or none."""
    module = importlib.import_module(JUDGES.entries[name].partition(":")[0])
    return str(vars(module)["MODEL"]) if "MODEL" in vars(module) else None


def default_second(first: str) -> str | None:
    """Return the judge that is used next to a published one by default: another whose weights are on this machine.

    Next to a judge that needs no weights there is none: a quick try stays quick.
    """
    if first not in PUBLISHED:
        return None
    from huggingface_hub import try_to_load_from_cache

    here = (
        name
        for name in PUBLISHED
        if name != first and isinstance(try_to_load_from_cache(str(published_model(name)), "config.json"), str)
    )
    return next(here, None)


def token_limit(settings: JudgeSettings, default: int) -> int:
    """Return the option `max_new_tokens` of a judge with replies in text.

    Raises:
        ConfigError: it is not a number of tokens.
    """
    limit = settings.options.get("max_new_tokens", default)
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise ConfigError(f"the judge's option max_new_tokens is {limit!r}", remedy="give a number of tokens above 0.")
    return limit


def turns(example: Example, completion: Completion) -> tuple[Message, ...]:
    """Return the conversation to judge: without system text, and with the answer at its end."""
    asked = tuple(message for message in example.messages if message.role != "system")
    return (*asked, Message("assistant", completion.text))


def _made_engine(settings: EngineSettings, model: str) -> Generator:
    if engine_class(settings.name).is_served:
        settings = settings.model_copy(update={"options": {**settings.options, "model": model}})
    return made_engine(settings)


def _name(example: Example, completion: Completion, place: int) -> str:
    """Return a question's name for messages: the prompt's id, and since names are unique, the question's number."""
    return f"{example.id}, answer {completion.sample}, question {place}"
