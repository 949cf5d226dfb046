"""A generator that answers from a script, and short ways to examples, completions and judges over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from backmerge.generation.protocol import EngineSettings, Generator, Sampling
from backmerge.judging.model_judge import Form, ModelJudge
from backmerge.judging.protocol import Finding, UnreadableError
from backmerge.records import Completion, Example, Message

PROMPT = "How do I mend a kite?"


class Scripted(Generator):
    """Answers each question by a function of it, and remembers what it was asked; as an engine, serves its model."""

    is_served = True

    def __init__(self, settings: EngineSettings | Callable[[Example], str]) -> None:
        self.settings = settings if isinstance(settings, EngineSettings) else EngineSettings()
        self.answer: Callable[[Example], str] = (lambda _: "yes") if isinstance(settings, EngineSettings) else settings
        self.calls: list[tuple[Any, list[Example], Sampling]] = []
        self.num_released = 0

    @property
    def identity(self) -> dict[str, str]:
        """What it is, with the model that it was told."""
        return {"engine": "scripted", "model": str(self.settings.options.get("model"))}

    def generate(
        self,
        variant: Any,
        examples: Sequence[Example],
        sampling: Sampling,
        advance: Callable[[int], None],  # noqa: ARG002 - what engines are called with
    ) -> list[Completion]:
        """One answer per question; one that ends in … was cut off."""
        self.calls.append((variant, list(examples), sampling))
        replies = [self.answer(example) for example in examples]
        return [
            Completion(example.id, example.prompt, reply.removesuffix("…"), 3, not reply.endswith("…"))
            for example, reply in zip(examples, replies, strict=True)
        ]

    def release(self) -> None:
        """Count it."""
        self.num_released += 1

    @property
    def questions(self) -> list[str]:
        """Every question's last message, in order."""
        return [example.prompt for _, examples, _ in self.calls for example in examples]


def asked(number: int = 0, prompt: str = PROMPT, **fields: Any) -> Example:
    """An example with one user turn."""
    return Example(f"the-{number}", (Message("user", prompt),), **fields)


def answered(text: str, number: int = 0, sample: int = 0) -> Completion:
    """A completion of that example."""
    return Completion(f"the-{number}", "", text, 1, finished=True, sample=sample)


def echo_form(**fields: Any) -> Form:
    """A judge of one word, which asks for the answer itself."""

    def question(example: Example, completion: Completion) -> Example:
        return Example("any", (Message("user", completion.text),), is_raw=True)

    def parse(reply: str, asked: Example) -> Finding:
        if reply not in {"yes", "no"}:
            raise UnreadableError(f"not a word: {reply}")
        return Finding(reply == "yes", refusal=reply == "no", reason=f"{reply} to {asked.prompt}")

    return Form("echo", "1", question, parse, Sampling(max_new_tokens=4), **fields)


def judge_over(engine: Scripted, **fields: Any) -> ModelJudge:
    """The judge of one word over a scripted generator."""
    return ModelJudge(echo_form(**fields), "some-model", lambda: engine)
