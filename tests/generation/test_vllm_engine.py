"""The engine vllm with a stand-in for vLLM: what is started and asked, and what becomes of faults."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import BackmergeError, GenerationError, MergeError
from backmerge.generation import vllm_engine, vllm_process
from backmerge.generation.protocol import EngineSettings, Request, Sampling
from backmerge.generation.vllm_engine import VllmEngine
from backmerge.merging.recipe import Variant
from backmerge.records import Example, Message
from generation.vllm_cases import EXAMPLES, GREEDY, OPTIONS, moved, said, sweep_of


@pytest.fixture(scope="module")
def full(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tuned checkpoint in which every tensor changed, embeddings too."""
    return Checkpoint(moved(base, tmp_path_factory.mktemp("full") / "model", 0.3))


class StandIn:
    """Answers each prompt by what it was asked with, last prompts first, and keeps a log of its life."""

    log: list[tuple[str, Any]] = []  # noqa: RUF012 - reset for each test
    fails_after: int | None = None
    context = 256

    def __init__(self, directory: Path, arguments: Any, **_: Any) -> None:
        self.log.append(("start", (directory, arguments)))

    def finished(self, asked: Sequence[vllm_process.Asked]) -> Iterator[tuple[int, Any]]:
        """Tokens that spell the adapter's number, and the end."""
        self.log.append(("ask", [one.adapter for one in asked]))
        for count, place in enumerate(reversed(range(len(asked)))):
            if count == self.fails_after:
                raise GenerationError("it died")
            tokens = [10 + (asked[place].adapter or ("", 0, ""))[1], 2, 9]
            outputs = [SimpleNamespace(index=i, token_ids=[20 + i, *tokens]) for i in (1, 0)]
            many = asked[place].params[0].temperature > 0
            yield place, SimpleNamespace(outputs=outputs if many else outputs[1:])

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """As a worker that did it."""
        self.log.append((method, arguments))
        return [None]

    def close(self) -> None:
        """Gone."""
        self.log.append(("close", None))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    """In vLLM's place."""

    class Fresh(StandIn):
        log: list[tuple[str, Any]] = []  # noqa: RUF012

    monkeypatch.setattr(vllm_engine, "found", lambda: ("0.0", "cuda"))
    monkeypatch.setattr(vllm_engine, "Started", Fresh)
    monkeypatch.setattr(vllm_engine, "adapter_request", lambda name, number, path: (name, number, path))
    monkeypatch.setattr(vllm_engine, "sampling_params", lambda *given: given)
    return Fresh


def vllm_of(**options: Any) -> VllmEngine:
    """An engine in this process, small."""
    return VllmEngine(EngineSettings(name="vllm", options={**OPTIONS, **options}))


def events(stand_in: type[StandIn]) -> list[str]:
    """What happened, by name."""
    return [name for name, _ in stand_in.log]


def test_a_sweep_is_one_engine_with_an_adapter_for_each_lam(
    stand_in: type[StandIn], base: Checkpoint, adapter: Any
) -> None:
    """All prompts of all λs are submitted together, once; λ=0 goes without an adapter, on a GPU."""
    engine = vllm_of()
    done: list[int] = []
    found = said(engine, [*sweep_of(base, adapter), Request(Variant(base), EXAMPLES, GREEDY)], done.append)
    assert events(stand_in) == ["start", "ask"]
    (_, (directory, arguments)), (_, asked) = stand_in.log
    assert directory == base.directory
    assert (arguments["enable_lora"], arguments["max_loras"], arguments["max_lora_rank"]) == (True, 5, 8)
    assert arguments["dtype"] == "float32"  # the checkpoint's own
    numbers = [None if one is None else one[1] for one in asked]
    assert numbers == [n for n in (None, 1, 2, 3, 4, 5, None) for _ in EXAMPLES]
    assert len({one[0] for one in asked if one}) == 5
    assert sum(done) == 7 * len(EXAMPLES)
    for completions in found:
        assert [one.example for one in completions] == [example.id for example in EXAMPLES]
        assert all(one.finished and one.num_tokens == 3 for one in completions)
        assert completions[0].prompt == f"<s><|user|>{EXAMPLES[0].prompt}<|assistant|>"
    # the same again: the adapters are there
    said(engine, sweep_of(base, adapter, (0.4,)))
    assert events(stand_in) == ["start", "ask", "ask"]
    assert stand_in.log[-1][1][0][1] == 2
    written = Path(stand_in.log[-1][1][0][2])
    assert (written / "adapter_model.safetensors").is_file()
    engine.release()
    assert events(stand_in)[-1] == "close"
    assert not written.exists()
    engine.release()
    assert events(stand_in).count("close") == 1


def test_on_a_cpu_the_base_is_an_adapter_of_zeros(
    stand_in: type[StandIn], base: Checkpoint, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No prompt goes without an adapter to vLLM's CPU kernels, which would take the last one for it."""
    from safetensors.numpy import load_file

    monkeypatch.setattr(vllm_engine, "found", lambda: ("0.0", "cpu"))
    engine = vllm_of()
    said(engine, sweep_of(base, adapter, (0.0, 1.0)))
    said(engine, [Request(Variant(base), EXAMPLES[:1], GREEDY)])
    (first, *_), (last,) = (asked for name, asked in stand_in.log if name == "ask")
    assert events(stand_in).count("start") == 1
    assert first == last
    factors = load_file(Path(last[2]) / "adapter_model.safetensors")
    assert not any(value.any() for name, value in factors.items() if "lora_B" in name)
    assert stand_in.log[0][1][1]["max_loras"] == 2
    engine.release()


def test_when_an_engine_is_restarted(
    stand_in: type[StandIn], base: Checkpoint, adapter: Any, wide_adapter: Any, full: Checkpoint
) -> None:
    """For a larger rank, for weights after adapters, for another base; not for a smaller rank nor for other weights."""
    engine = vllm_of()
    linear, wide = Variant(base, adapter, lam=0.5), Variant(base, wide_adapter, lam=0.5)
    live = Variant(base, full, lam=0.5)

    def ask(variant: Variant) -> list[str]:
        before = len(stand_in.log)
        said(engine, [Request(variant, EXAMPLES[:1], GREEDY)])
        return [name for name, _ in stand_in.log[before:]]

    assert ask(linear) == ["start", "ask"]
    assert ask(wide) == ["close", "start", "ask"]
    assert ask(linear) == ["ask"]
    assert ask(Variant(base)) == ["ask"]
    assert ask(live) == ["close", "start", "set_merged_weights", "ask"]
    assert ask(live) == ["ask"]
    assert ask(live.at(0.7)) == ["set_merged_weights", "ask"]
    assert ask(Variant(base)) == ["set_merged_weights", "ask"]
    assert ask(Variant(base, full, lam=0.0)) == ["ask"]
    assert ask(Variant(full)) == ["close", "start", "ask"]
    assert ask(linear) == ["close", "start", "ask"]
    engine.release()


def test_a_checkpoint_is_written_for_a_while(stand_in: type[StandIn], base: Checkpoint, full: Checkpoint) -> None:
    """Where a checkpoint is wanted, the engine starts with the merge, whose folder is gone after that."""
    engine = vllm_of(realisation="checkpoint")
    request = Request(Variant(base, full, lam=0.5), EXAMPLES[:2], GREEDY)
    said(engine, [request])
    said(engine, [request])
    assert events(stand_in) == ["start", "ask", "ask"]
    started = stand_in.log[0][1][0]
    assert started.name == "merged"
    assert not started.exists()
    engine.release()


def test_several_samples_are_in_order(stand_in: type[StandIn], base: Checkpoint) -> None:
    """Above temperature 0 vLLM draws them, in the order of their numbers; a greedy answer is said again."""
    for temperature, firsts in ((1.0, [20, 21]), (0.0, [20, 20])):
        engine = vllm_of()
        sampling = Sampling(num_samples=2, temperature=temperature, max_new_tokens=4)
        (found,) = said(engine, [Request(Variant(base), EXAMPLES[:3], sampling)])
        assert [(one.example, one.sample) for one in found] == [(e.id, n) for e in EXAMPLES[:3] for n in (0, 1)]
        assert [one.text for one in found[:2]] == [engine._running.tokenizer.decode([n, 10]) for n in firsts]
        engine.release()


def test_no_prompts_give_no_answers(stand_in: type[StandIn], base: Checkpoint) -> None:
    """A request without examples is answered too."""
    engine = vllm_of()
    none, some = said(engine, [Request(Variant(base), [], GREEDY), Request(Variant(base), EXAMPLES[:1], GREEDY)])
    assert none == []
    assert len(some) == 1
    engine.release()


def test_a_long_prompt_is_found_before_anything_is_asked(stand_in: type[StandIn], base: Checkpoint) -> None:
    """One prompt beyond the context, in the last of the requests, and no other is sent off."""
    engine = vllm_of()
    long = Example("too-long", (Message("user", "robot " * 300),))
    requests = [Request(Variant(base), EXAMPLES, GREEDY), Request(Variant(base, lam=0.0), [long], GREEDY)]
    with pytest.raises(GenerationError, match="'too-long' has"):
        said(engine, requests)
    assert "ask" not in events(stand_in)
    engine.release()


def test_finished_answers_are_kept_if_vllm_dies(
    stand_in: type[StandIn], base: Checkpoint, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests that were answered have been handed out; the engine is closed, and starts again when asked again."""
    monkeypatch.setattr(stand_in, "fails_after", len(EXAMPLES) + 3)
    engine = vllm_of()
    found: list[int] = []
    with pytest.raises(GenerationError, match="it died"):  # noqa: PT012 - what was handed out before is looked at
        for place, _ in engine.generate_many(sweep_of(base, adapter, (0.0, 0.5)), lambda _: None):
            found.append(place)
    assert found == [1]
    assert events(stand_in) == ["start", "ask", "close"]
    monkeypatch.setattr(stand_in, "fails_after", None)
    assert len(said(engine, sweep_of(base, adapter, (0.0, 0.5)))) == 2
    engine.release()


def test_a_merge_that_fails_in_a_worker_is_our_error(
    stand_in: type[StandIn], base: Checkpoint, full: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Message and remedy come back from the worker; weights that may be half changed are not used."""
    engine = vllm_of()
    monkeypatch.setattr(stand_in, "call", lambda *_: [None, ["tensor 'x' holds NaN", "mend it"]])
    with pytest.raises(MergeError, match="tensor 'x' holds NaN") as caught:
        said(engine, [Request(Variant(base, full, lam=0.5), EXAMPLES[:1], GREEDY)])
    assert caught.value.remedy == "mend it"
    assert engine._running is None


def test_another_device_than_vllms_is_an_error(stand_in: type[StandIn]) -> None:
    """The device is vLLM's own; others are refused."""
    assert VllmEngine(EngineSettings(device="cuda")).identity["device"] == "cuda"
    with pytest.raises(GenerationError, match="computes on 'cuda', not on 'cpu'"):
        VllmEngine(EngineSettings(device="cpu"))


def test_identity_names_what_completions_depend_on(stand_in: type[StandIn]) -> None:
    """Engine, versions, device, dtype, context; not how much memory it takes."""
    identity = vllm_of(max_model_len=99).identity
    assert identity == {**identity, "engine": "vllm", "version": "0.0", "max_model_len": "99", "dtype": "auto"}
    assert vllm_of(gpu_memory_utilization=0.5).identity == vllm_of(max_loras=3, kv_cache_gb=2).identity
    assert vllm_of(realisation="live").identity != vllm_of().identity


def test_missing_vllm_error_names_the_install_command() -> None:
    """The extra is named; a vLLM that does not load is another matter."""
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from backmerge.generation.vllm_process import found\n"
        "from backmerge.errors import GenerationError\n"
        "try: found()\nexcept GenerationError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "vLLM is not installed\n  → pip install 'backmerge[vllm]'\n"


def test_a_vllm_that_does_not_load_says_why(tmp_path: Path) -> None:
    """Where vLLM lacks something itself, that is what the error names."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("import torchvision_of_another_time\n")
    code = "from backmerge.generation.vllm_process import found; found()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert "cannot be imported: No module named 'torchvision_of_another_time'" in done.stderr


def test_vllm_errors_are_reported_in_one_line() -> None:
    """Whatever it raises becomes an error that a user can read; our own pass."""
    with (
        pytest.raises(GenerationError, match=r"^vLLM failed while answering: out of memory\n") as caught,
        vllm_process.boundary("answering", "buy more"),
    ):
        raise Exception("out of memory\nat line 5")
    assert caught.value.remedy == "buy more"
    with pytest.raises(BackmergeError, match=r"^ours$"), vllm_process.boundary("answering", "buy more"):
        raise GenerationError("ours")
