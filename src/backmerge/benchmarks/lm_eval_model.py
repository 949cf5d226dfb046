"""A model for lm-evaluation-harness's own runner, with answers from any of our engines.

For users of `lm_eval.simple_evaluate` itself, with its reports. Inside our own runs `lm_eval_bridge` asks the same
questions, and stores the answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm_eval.api.model import LM

from backmerge.benchmarks.lm_eval_bridge import DEFAULT, sampling_of
from backmerge.errors import GenerationError
from backmerge.generation.chat import load_tokenizer, render
from backmerge.generation.protocol import Generator, LogLikelihood, Sampling
from backmerge.merging.recipe import Variant
from backmerge.records import Example, Message


class BackmergeLM(LM):  # type: ignore[misc]  # lm-eval has no types
    """One variant of a base as a model of the harness.

    A λ-sweep makes one of these for each λ, over one generator, which keeps its model in memory.

        for lam in (0.0, 0.5, 1.0):
            lm_eval.simple_evaluate(BackmergeLM(engine, variant.at(lam)), tasks=["gsm8k"], apply_chat_template=True)

    Args:
        generator: Answers, and for multiple-choice tasks has `log_likelihoods`.
        variant: The variant.
        sampling: For settings that a task leaves open: the seed, the repetition penalty, and the limit.
        advance: Progress callback with the number of finished requests of each batch.
    """

    def __init__(
        self,
        generator: Generator,
        variant: Variant,
        sampling: Sampling = DEFAULT,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.variant = variant
        self.sampling = sampling
        self.advance = advance
        self._tokenizer: Any = None

    @property
    def tokenizer_name(self) -> str:
        """The key of the harness's cache of prompts."""
        base = self.variant.base
        return f"{base.directory.name}-{base.fingerprint}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the base's own template, for the harness's record; empty if none is requested.

        Raises:
            GenerationError: a template is requested by name, or there is none.
        """
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise GenerationError(
                f"the chat template '{chat_template}' was requested by name, but the base's own is always used",
                remedy="use apply_chat_template=True.",
            )
        return str(self._base_tokenizer.chat_template)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the conversation as text; without a new answer to generate, its last turn is the answer's beginning.

        If a template has no system role, the system text goes to the start of the first user turn, while the harness's
        own model would drop it.

        Raises:
            GenerationError: the template refuses the conversation.
        """
        turns = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        if add_generation_prompt:
            return render(self._base_tokenizer, turns)
        return render(self._base_tokenizer, turns[:-1]) + turns[-1].content

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Return each request's answer, up to its stop texts.

        Raises:
            GenerationError: a request needs something that the engines here do not support, or exceeds the model's
                context.
        """
        places: dict[int, list[int]] = defaultdict(list)  # the harness repeats a request to sample it again
        for place, request in enumerate(requests):
            places[id(request)].append(place)
        batches: dict[str, tuple[Sampling, list[list[int]]]] = {}
        for of in places.values():
            sampling = sampling_of(requests[of[0]].args[1], self.sampling)
            draws = 1 if sampling.temperature == 0 else len(of)
            sampling = sampling.model_copy(update={"num_samples": draws})
            batches.setdefault(sampling.model_dump_json(), (sampling, []))[1].append(of)
        answers: dict[int, str] = {}
        for sampling, batch in batches.values():
            examples = [_example(requests[of[0]], of[0]) for of in batch]
            found = iter(self.generator.generate(self.variant, examples, sampling, self.advance))
            for of in batch:
                texts = [next(found).text for _ in range(sampling.num_samples)]
                answers.update((place, texts[i % len(texts)]) for i, place in enumerate(of))
                self.cache_hook.add_partial("generate_until", requests[of[0]].args, texts[0])
        return [answers[place] for place in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Return how likely each continuation is after its context, and whether greedy decoding would produce it.

        Raises:
            GenerationError: the engine provides no likelihoods.
        """
        found = self._likelihoods([(context, continuation) for context, continuation, *_ in (r.args for r in requests)])
        answers = [(one.total, one.is_greedy) for one in found]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Return how likely each text is as a whole, after the token that starts texts.

        Raises:
            GenerationError: the engine provides no likelihoods, or a text exceeds the model's context: it would have to
                be cut into windows of tokens, which no engine's interface supports.
        """
        found = self._likelihoods([("", request.args[0]) for request in requests])
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, one.total)
        return [one.total for one in found]

    def _likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        if not self.generator.gives_likelihoods:
            raise GenerationError(
                f"the engine {self.generator.identity['engine']} provides no likelihoods, which this task compares",
                remedy="use the engine 'transformers', or a task that generates.",
            )
        return self.generator.log_likelihoods(self.variant, pairs, self.advance)

    @property
    def _base_tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.variant.companions.folder())
        return self._tokenizer


class Replay(LM):  # type: ignore[misc]  # lm-eval has no types
    """A model of the harness that gives recorded answers.

    Args:
        answers: Task, number of the document and of its request, to the answers to it.
    """

    def __init__(self, answers: Mapping[tuple[str, int, int], Sequence[Any]]) -> None:
        super().__init__()
        self.answers = answers

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Return each request's next answer; the harness repeats a request that it wants several answers to."""
        left = {key: iter(of) for key, of in self.answers.items()}
        return [next(left[request.task_name, request.doc_id, request.idx]) for request in requests]

    loglikelihood = loglikelihood_rolling = generate_until


def _example(request: Any, place: int) -> Example:
    """Return a request as an example; its text is already rendered."""
    name = f"{request.task_name}/{request.doc_id}/{place}"
    return Example(name, (Message("user", request.args[0]),), is_raw=True)
