"""An engine on the stand-in server, and what it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backmerge.generation.openai_engine import OpenAIEngine
from backmerge.generation.protocol import EngineSettings, Sampling
from backmerge.merging.recipe import Variant
from backmerge.records import Completion, Example, Message
from generation.local_server import LocalServer

GREEDY = Sampling(max_new_tokens=24)
EXAMPLES = tuple(Example(f"e{i}", (Message("user", f"Where is kite number {i}?"),)) for i in range(6))


def new_engine(local: LocalServer, **options: Any) -> OpenAIEngine:
    """An engine that asks a server for its model `model`."""
    given = {"url": local.url, "model": "model", "server": "openai", **options}
    return OpenAIEngine(EngineSettings(name="openai", options=given))


def ask(
    engine: OpenAIEngine,
    examples: Sequence[Example] = EXAMPLES,
    sampling: Sampling = GREEDY,
    variant: Variant | None = None,
) -> list[Completion]:
    """Completions, whoever waits."""
    return engine.generate(variant, examples, sampling, lambda _: None)


def messages(example: Example) -> list[dict[str, str]]:
    """As the chat API takes them."""
    return [{"role": message.role, "content": message.content} for message in example.messages]
