"""`transformers serve`, a real server, says what the engine `transformers` says, token for token."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest

from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import benchmarks, model_directory
from backmerge.errors import GenerationError
from backmerge.generation.openai_engine import OpenAIEngine
from backmerge.generation.protocol import EngineSettings, Request, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.merging.recipe import Variant
from backmerge.merging.to_disk import write_merged
from backmerge.records import Completion, Example
from generation.local_server import free_port

NEEDS = ("fastapi", "openai", "uvicorn")
MISSING = [name for name in NEEDS if find_spec(name) is None]
GREEDY = Sampling(max_new_tokens=24)
EXAMPLES = (*benchmarks.plans().examples[:12], *benchmarks.harmful().examples[:12])

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"transformers[serving] is not installed: no {', '.join(MISSING)}"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the server listens; it loads whatever folder it is asked for."""
    port = free_port()
    log = tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu", "--dtype", "float32"]
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            wait_until_it_answers(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def wait_until_it_answers(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the server does; fail with what it wrote if it ends or takes a minute."""
    for _ in range(600):
        assert process.poll() is None, log.read_text(encoding="utf-8")
        try:
            if httpx2.get(address).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(log.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sweep(make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Variant]:
    """The base and two λs of an adapter, by the folder that the server serves each from."""
    base = Checkpoint(model_directory())
    adapter = open_weights(make_adapter(base.directory, seed=1, lora_alpha=40), base)
    found = {str(base.directory): Variant(base)}
    for lam in (0.4, 1.0):
        folder = tmp_path_factory.mktemp("served") / f"lam-{lam}"
        write_merged(Variant(base, adapter, lam=lam), folder)
        found[str(folder)] = Variant(base, adapter, lam=lam)
    return found


def new_engine(url: str, sweep: dict[str, Variant], **options: Any) -> OpenAIEngine:
    """An engine that knows each variant's folder."""
    names = dict(zip(("base", "0.4", "tuned"), sweep, strict=True))
    given = {"url": url, "models": names, "server": "transformers", "concurrency": 4, **options}
    return OpenAIEngine(EngineSettings(name="openai", options=given))


@pytest.fixture(scope="module")
def reference() -> TransformersEngine:
    """Answers in this process."""
    return TransformersEngine(EngineSettings(device="cpu", dtype="float32"))


def expected(engine: TransformersEngine, variant: Variant, sampling: Sampling = GREEDY) -> list[Completion]:
    """What the engine in this process says."""
    return engine.generate(variant, EXAMPLES, sampling, lambda _: None)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_base_and_merges_answer_as_in_transformers(
    url: str, sweep: dict[str, Variant], reference: TransformersEngine, api: str
) -> None:
    """Greedy completions of the base and of two λs are equal in text, tokens and end; by completions in prompt too."""
    engine = new_engine(url, sweep, api=api, prompt_as="text")
    variants = list(sweep.values())
    said = dict(engine.generate_many([Request(v, EXAMPLES, GREEDY) for v in variants], lambda _: None))
    for place, variant in enumerate(variants):
        for here, there in zip(expected(reference, variant), said[place], strict=True):
            assert (there.example, there.text, there.num_tokens, there.finished) == (
                here.example,
                here.text,
                here.num_tokens,
                here.finished,
            )
            assert (there.prompt == here.prompt) == (api == "completions")
    assert len({tuple(c.text for c in said[place]) for place in said}) == 3


def test_penalty_stop_and_prefill_are_the_same(
    url: str, sweep: dict[str, Variant], reference: TransformersEngine
) -> None:
    """What has another name there, or is done by us, has the same effect."""
    engine = new_engine(url, sweep, api="completions", prompt_as="text")
    variant = next(iter(sweep.values()))
    penalised = GREEDY.model_copy(update={"repetition_penalty": 1.3})
    assert engine.generate(variant, EXAMPLES, penalised, lambda _: None) == expected(reference, variant, penalised)
    stopped = GREEDY.model_copy(update={"stop": (",", ".")})
    here = expected(reference, variant, stopped)
    there = engine.generate(variant, EXAMPLES, stopped, lambda _: None)
    assert [(c.text, c.finished) for c in there] == [(c.text, c.finished) for c in here]
    prefilled = [Example("p", EXAMPLES[0].messages, prefill="To paint")]
    here = reference.generate(variant, prefilled, GREEDY, lambda _: None)
    assert engine.generate(variant, prefilled, GREEDY, lambda _: None) == here


def test_refusals_are_clear_errors(url: str, sweep: dict[str, Variant]) -> None:
    """Token ids and unknown fields are refused by the server, with its own words and what to do."""
    variant = next(iter(sweep.values()))
    with pytest.raises(GenerationError, match=r"prompt must be a string(.|\n)*prompt_as: text"):
        new_engine(url, sweep, api="completions").generate(variant, EXAMPLES[:1], GREEDY, lambda _: None)
    with pytest.raises(GenerationError, match=r"HTTP 422: Unexpected fields(.|\n)*top_k"):
        new_engine(url, sweep, extra={"top_k": 3}).generate(variant, EXAMPLES[:1], GREEDY, lambda _: None)
