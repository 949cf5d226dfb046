"""A model for lm-evaluation-harness's own runner, answered by any of our engines.

For those who want `lm_eval.simple_evaluate` itself, with its reports. Inside our own runs `lm_eval_bridge` asks the
same questions, and keeps the answers.
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
    """One variant of a base, as the harness asks a model.

    A λ-sweep makes one of these for each λ, over one generator, which keeps its model in memory.

        for lam in (0.0, 0.5, 1.0):
            lm_eval.simple_evaluate(BackmergeLM(engine, variant.at(lam)), tasks=["gsm8k"], apply_chat_template=True)

    Args:
        generator: Answers, and for multiple-choice tasks has `log_likelihoods`.
        variant: Which weights.
        sampling: For what a task leaves open: the seed, the repetition penalty, and the limit where it gives none.
        advance: Told how many requests of each batch are done.
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
        """What the harness's cache of prompts is keyed by."""
        base = self.variant.base
        return f"{base.directory.name}-{base.fingerprint}".replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The base's own template, for the harness's record; none where none is asked for.

        Raises:
            GenerationError: a template is asked for by name, or there is none.
        """
        if not chat_template:
            return None
        if isinstance(chat_template, str):
            raise GenerationError(
                f"the chat template '{chat_template}' is asked for by name, and the base's own is always used",
                remedy="ask with apply_chat_template=True.",
            )
        return str(self._base_tokenizer.chat_template)

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; if no answer is to be generated anew, its last turn is the answer's beginning.

        A template without a system role gets the system's text in front of the first user turn, where the harness's
        own model would leave it out.

        Raises:
            GenerationError: the template refuses the conversation.
        """
        turns = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        if add_generation_prompt:
            return render(self._base_tokenizer, turns)
        return render(self._base_tokenizer, turns[:-1]) + turns[-1].content

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Each request's answer, up to its stop texts.

        Raises:
            GenerationError: a request asks for what engines here do not know, or exceeds the model's context.
        """
        places: dict[int, list[int]] = defaultdict(list)  # the harness repeats a request that is to be drawn again
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
        """How likely each continuation is after its context, and whether greedy decoding would write it.

        Raises:
            GenerationError: the engine gives no likelihoods.
        """
        found = self._likelihoods([(context, continuation) for context, continuation, *_ in (r.args for r in requests)])
        answers = [(one.total, one.is_greedy) for one in found]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """How likely each text is as a whole, from what texts begin with.

        Raises:
            GenerationError: the engine gives no likelihoods, or a text exceeds the model's context: it would have to
                be cut into windows of tokens, which no engine's interface here can say.
        """
        found = self._likelihoods([("", request.args[0]) for request in requests])
        for request, one in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, one.total)
        return [one.total for one in found]

    def _likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        if not self.generator.gives_likelihoods:
            raise GenerationError(
                f"the engine {self.generator.identity['engine']} gives no likelihoods, which this task compares",
                remedy="use the engine 'transformers', or a task that generates.",
            )
        return self.generator.log_likelihoods(self.variant, pairs, self.advance)

    @property
    def _base_tokenizer(self) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.variant.companions.folder())
        return self._tokenizer


def _example(request: Any, place: int) -> Example:
    """A request as an example; its text is rendered already."""
    name = f"{request.task_name}/{request.doc_id}/{place}"
    return Example(name, (Message("user", request.args[0]),), is_raw=True)
