"""Serves the page of `chat --web` without an engine, in a separate process: Gradio leaves sockets open."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from backmerge.errors import GenerationError
from backmerge.generation.protocol import Sampling
from backmerge.merging.recipe import Variant
from backmerge.pipeline.chat_page import page_of, serve
from backmerge.pipeline.chatting import Chat, triple_of
from backmerge.records import Completion, Example

HOSTILE = (
    "<script>document.title='broken'</script></textarea><img src=x onerror=\"document.title='broken'\">"
    "\"'><svg onload=alert(1)>{{7*7}} **bold** \u202e $x$"
)


def answering(variant: Variant, example: Example, sampling: Sampling) -> Iterator[Completion]:
    """In an engine's place: an answer in two pieces, with a model's idea of HTML in it."""
    if "too long" in example.prompt:
        raise GenerationError("the prompt is too long", example=example.id)
    lam = variant.lam if variant.tuned_models else 0
    for text in (HOSTILE[:5], f"{HOSTILE} to {example.prompt} at {lam}"):
        yield Completion(example.id, "", text, 1, finished=len(text) > 5)


if __name__ == "__main__":
    base, tuned, run = sys.argv[1:]
    session = Chat(None, triple_of(base, tuned), Sampling(max_new_tokens=8))  # type: ignore[arg-type]
    page = page_of(session, answering, Path(run))
    print(serve(page, block=False), flush=True)  # noqa: T201 - what the test reads
    page.block_thread()
