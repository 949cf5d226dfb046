"""The engine answers for the variant that it is asked for, greedily unless told otherwise, and to the end."""

from __future__ import annotations

import random
import shutil
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.reader import SINGLE, Checkpoint
from backmerge.demo import benchmarks, model_directory
from backmerge.errors import GenerationError
from backmerge.generation import transformers_engine
from backmerge.generation.loading import load_model
from backmerge.generation.protocol import EngineSettings, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.merging.live import LiveMerge
from backmerge.merging.recipe import Variant
from backmerge.merging.to_disk import write_merged
from backmerge.progress import Bar
from backmerge.records import Completion, Example, Message
from generation.tiny import embedded_copy, random_mixtral

GREEDY = Sampling(max_new_tokens=24)
EXAMPLES = (*benchmarks.plans().examples[:6], *benchmarks.harmful().examples[:6])
ARCHITECTURES = ("llama", "gemma", "qwen2")


def new_engine(batch_size: int = 64) -> TransformersEngine:
    """An engine on the CPU in float32."""
    return TransformersEngine(EngineSettings(device="cpu", dtype="float32", batch_size=batch_size))


def ask(
    engine: TransformersEngine,
    variant: Variant | Path,
    examples: Sequence[Example] = EXAMPLES,
    sampling: Sampling = GREEDY,
) -> list[Completion]:
    """Completions of a variant, or of the model in a directory."""
    asked = Variant(Checkpoint(variant)) if isinstance(variant, Path) else variant
    return engine.generate(asked, examples, sampling, lambda _: None)


def texts(completions: Sequence[Completion]) -> list[str]:
    """What was said."""
    return [completion.text for completion in completions]


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    """One engine for all tests that leave it as it is."""
    return new_engine()


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    """The embedded model."""
    return Checkpoint(model_directory())


@pytest.fixture(scope="module")
def sweep(
    base: Checkpoint, make_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Variant]:
    """Variants of one base: several λs of an adapter, and of a full checkpoint that another adapter made."""
    folder = tmp_path_factory.mktemp("sweep")
    # strong enough to change what is said at λ=0.4
    adapter, other = (open_weights(make_adapter(base.directory, seed=seed, lora_alpha=40), base) for seed in (1, 2))
    write_merged(Variant(base, other, lam=1.0), folder / "full")
    full = Checkpoint(folder / "full")
    return [Variant(base, tuned, lam=lam) for tuned in (adapter, full) for lam in (0.0, 0.4, 1.0)]


def test_live_sweep_gives_the_answers_of_the_written_models(
    engine: TransformersEngine, base: Checkpoint, sweep: list[Variant], tmp_path: Path
) -> None:
    """For every λ of an adapter and of a checkpoint, in one engine: the completions of the model as written."""
    of_base = ask(engine, Variant(base))
    said = [ask(engine, variant) for variant in sweep]
    assert engine._live.is_possible()
    for number, variant in enumerate(sweep):
        write_merged(variant, tmp_path / str(number))
        assert ask(new_engine(), tmp_path / str(number)) == said[number], variant.lam
    # λ=0 is the base; each other variant is a model of its own, or the test would show nothing
    assert said[0] == said[3] == of_base
    assert len({tuple(texts(one)) for one in said}) == 5


def test_back_at_the_base_it_is_the_base(engine: TransformersEngine, base: Checkpoint, sweep: list[Variant]) -> None:
    """After any number of variants, in any order, base and variants answer as they did at first."""
    of_base, at_40 = ask(engine, Variant(base)), ask(engine, sweep[1])
    assert texts(of_base) != texts(at_40)
    for variant in (*sweep[::-1], Variant(base), sweep[2]):
        ask(engine, variant, EXAMPLES[:1])
    assert ask(engine, sweep[1]) == at_40
    assert ask(engine, Variant(base)) == of_base


def test_another_base_is_loaded(engine: TransformersEngine, base: Checkpoint, tiny_base: Path) -> None:
    """An engine that is asked for another base loads it, and the first one again."""
    of_base = ask(engine, Variant(base))
    assert texts(ask(engine, tiny_base)) != texts(of_base)
    assert ask(engine, Variant(base)) == of_base


def test_a_model_is_freed_before_the_next_one_is_loaded(
    base: Checkpoint, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device need not have room for both: a sweep's base makes way for the checkpoint that is confirmed."""
    engine = new_engine()
    ask(engine, Variant(base), EXAMPLES[:1])
    before = weakref.ref(engine.model)
    alive: list[bool] = []

    def load(*arguments: Any) -> Any:
        alive.append(before() is not None)
        return load_model(*arguments)

    monkeypatch.setattr(transformers_engine, "load_model", load)
    ask(engine, tiny_base, EXAMPLES[:1])
    assert alive == [False]


def test_where_live_is_impossible_the_model_goes_by_way_of_the_disk(
    base: Checkpoint, sweep: list[Variant], engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base and variants answer the same through written files, which are gone afterwards."""
    live = [ask(engine, variant) for variant in (Variant(base), sweep[1], Variant(base), sweep[4])]
    written = new_engine()
    monkeypatch.setattr(LiveMerge, "is_possible", lambda _: False)
    monkeypatch.setattr(LiveMerge, "set", None)
    loaded: list[Path] = []
    load = written._load
    monkeypatch.setattr(
        written, "_load", lambda weights, *more: (loaded.append(weights.directory), load(weights, *more))
    )
    assert [ask(written, variant) for variant in (Variant(base), sweep[1], Variant(base), sweep[4])] == live
    assert len(loaded) == 4  # the base itself is not written again at first
    assert not [path for path in loaded[1:] if path.exists() and path != base.directory]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral"])
def test_architectures(architecture: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Tiny random models of each architecture, merged in memory, also where it stacks experts (Mixtral)."""
    if architecture == "mixtral":
        base, tuned = (Checkpoint(random_mixtral(tmp_path / str(seed), seed)) for seed in (1, 2))
    else:
        base, tuned = (Checkpoint(make_model(architecture, seed=seed)) for seed in (1, 2))
    engine = new_engine()
    sampling = Sampling(max_new_tokens=8, repetition_penalty=1.2)
    of_base = ask(engine, Variant(base), EXAMPLES, sampling)
    assert engine._live.is_possible()
    merged = Variant(base, tuned, lam=0.5)
    said = ask(engine, merged, EXAMPLES, sampling)
    write_merged(merged, tmp_path / "merged")
    assert ask(new_engine(), tmp_path / "merged", EXAMPLES, sampling) == said
    assert texts(said) != texts(of_base)
    assert ask(engine, Variant(base), EXAMPLES, sampling) == of_base


def test_the_models_own_sampling_does_not_leak(engine: TransformersEngine, base: Checkpoint, tmp_path: Path) -> None:
    """Whatever the generation config says of sampling, penalties and lengths, greedy is greedy."""
    own = {
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 3,
        "top_p": 0.5,
        "repetition_penalty": 3.0,
        "no_repeat_ngram_size": 2,
        "max_new_tokens": 2,
        "min_new_tokens": 20,
        "num_beams": 2,
        "suppress_tokens": [5, 6, 7],
    }
    wild = embedded_copy(tmp_path / "wild", {"generation_config.json": own})
    assert ask(new_engine(), wild) == ask(engine, Variant(base))


def test_every_listed_end_ends_an_answer(engine: TransformersEngine, base: Checkpoint, tmp_path: Path) -> None:
    """Where the generation config lists several end tokens, each ends an answer and is counted in it."""
    ask(engine, Variant(base), EXAMPLES[:1])
    comma = engine.tokenizer(",", add_special_tokens=False)["input_ids"]
    assert len(comma) == 1
    listed = embedded_copy(tmp_path / "listed", {"generation_config.json": {"eos_token_id": [2, *comma]}})
    for whole, cut in zip(ask(engine, Variant(base)), ask(new_engine(), listed), strict=True):
        assert "," in whole.text
        assert cut.text == whole.text[: whole.text.index(",") + 1]
        assert cut.finished
        assert cut.num_tokens < whole.num_tokens


def test_the_templates_own_end_ends_an_answer(engine: TransformersEngine, base: Checkpoint, tmp_path: Path) -> None:
    """A model whose files name another end of sequence than its template writes (Gemma) stops all the same."""
    other = {"eos_token_id": 3}
    directory = embedded_copy(
        tmp_path / "gemma-like",
        {
            "generation_config.json": other,
            "config.json": other,
            "tokenizer_config.json": {"eos_token": "<|system|>", "extra_special_tokens": ["</s>", "<|user|>"]},
        },
    )
    template = directory / "chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8").replace("{{ eos_token }}", "</s>"), encoding="utf-8")
    gemma_like = new_engine()
    assert ask(gemma_like, directory) == ask(engine, Variant(base))
    assert gemma_like._ends == {2, 3}


def test_an_end_of_sequence_that_pads_still_ends(engine: TransformersEngine, base: Checkpoint, tmp_path: Path) -> None:
    """Without a pad token of its own (Llama 3) the model gives the same answers, none cut short at the padding."""
    directory = embedded_copy(tmp_path / "m", {"tokenizer_config.json": {"pad_token": None}})
    assert ask(new_engine(), directory) == ask(engine, Variant(base))


def test_a_prompt_beyond_the_context_is_named_by_its_id(engine: TransformersEngine, base: Checkpoint) -> None:
    """The error gives the prompt's id and lengths, and not its text; nothing is generated before."""
    long = Example("too-long", (Message("user", "SECRET " * 300),))
    done: list[int] = []
    with pytest.raises(GenerationError, match=r"'too-long' has \d+ tokens, but the model's context is 256") as caught:
        engine.generate(Variant(base), [*EXAMPLES, long], GREEDY, done.append)
    assert "SECRET" not in str(caught.value)
    assert not done


def test_num_tokens_and_finished(engine: TransformersEngine, base: Checkpoint) -> None:
    """An answer that ends by itself counts its end token; one at the limit is as long as that, and unfinished."""
    for whole, cut in zip(
        ask(engine, Variant(base)), ask(engine, Variant(base), sampling=Sampling(max_new_tokens=3)), strict=True
    ):
        assert whole.finished
        assert whole.num_tokens == len(engine.tokenizer(whole.text, add_special_tokens=False)["input_ids"]) + 1
        assert (cut.finished, cut.num_tokens) == (False, 3)
        assert whole.text.startswith(cut.text)


def test_completions_come_in_order_with_their_prompts(engine: TransformersEngine, base: Checkpoint) -> None:
    """Each completion has its example's id and the rendered prompt, though prompts are asked longest first."""
    mixed = [*EXAMPLES[::-1], Example("long", (Message("user", "Say: " + "robot " * 30),))]
    said = ask(engine, Variant(base), mixed)
    assert [completion.example for completion in said] == [example.id for example in mixed]
    for completion, example in zip(said, mixed, strict=True):
        assert completion.prompt == f"<s><|user|>{example.prompt}<|assistant|>"
    assert ask(engine, Variant(base), []) == []


def test_text_is_not_stripped(
    engine: TransformersEngine, base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leading spaces, spaces before punctuation and line ends survive, also where the tokenizer asks to tidy up."""
    said = "    return [a , b] \n\n"
    tidy = {
        "clean_up_tokenization_spaces": True,
        "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True,
    }
    directory = embedded_copy(tmp_path / "tidy", {"tokenizer_config.json": tidy})
    tidying = new_engine()
    ask(tidying, directory, EXAMPLES[:1])
    ids = tidying.tokenizer(said, add_special_tokens=False)["input_ids"]
    assert tidying.tokenizer.decode(ids) != said  # the guard is real
    monkeypatch.setattr(tidying, "_batch", lambda prompts, *_: [([*ids, 2], True) for _ in prompts])
    assert texts(ask(tidying, directory, EXAMPLES[:2])) == [said, said]


def test_sampling_repeats_with_its_seed(engine: TransformersEngine, base: Checkpoint) -> None:
    """The same seed draws the same answers, another seed others, and greedy still is greedy afterwards."""
    greedy = ask(engine, Variant(base))
    hot = Sampling(max_new_tokens=24, temperature=3.0, top_p=0.95, top_k=100, seed=5)
    drawn = ask(engine, Variant(base), sampling=hot)
    assert ask(engine, Variant(base), sampling=hot) == drawn
    assert texts(ask(engine, Variant(base), sampling=hot.model_copy(update={"seed": 6}))) != texts(drawn)
    assert ask(engine, Variant(base)) == greedy
    assert texts(greedy) != texts(drawn)


def test_top_k_and_top_p_bound_the_draws(engine: TransformersEngine, base: Checkpoint) -> None:
    """At k=1, or with a nucleus that one token fills, sampling can only be greedy, however hot."""
    greedy = ask(engine, Variant(base))
    for bound in ({"top_k": 1}, {"top_p": 1e-6}):
        assert ask(engine, Variant(base), sampling=Sampling(max_new_tokens=24, temperature=9.0, **bound)) == greedy


def test_the_callers_random_state_is_kept(engine: TransformersEngine, base: Checkpoint) -> None:
    """Generating, greedily or not, moves none of the three global generators."""
    torch.manual_seed(3)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    for temperature in (0.0, 1.0):
        ask(engine, Variant(base), EXAMPLES[:2], Sampling(max_new_tokens=4, temperature=temperature))
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def failing_above(engine: TransformersEngine, size: int) -> tuple[Callable[..., Any], list[int]]:
    """A `_batch` whose device holds so many prompts, and the sizes that it was asked for."""
    batch, asked = engine._batch, []

    def short_of_memory(prompts: Sequence[list[int]], sampling: Sampling, shown: Bar) -> Any:
        asked.append(len(prompts))
        if len(prompts) > size:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch(prompts, sampling, shown)

    return short_of_memory, asked


def test_tokens_are_counted_step_by_step(engine: TransformersEngine, base: Checkpoint) -> None:
    """Prompts once with their padding, and one token of each answer in every step but the first, which reads."""
    counted: list[tuple[int, int]] = []

    class Counting(Bar):
        def count(self, read: int = 0, written: int = 0) -> None:
            counted.append((read, written))

    sampling = Sampling(max_new_tokens=7)
    completions = engine.generate(Variant(base), EXAMPLES, sampling, Counting())
    longest = max(completion.num_tokens for completion in completions)
    (num_read,) = {read for read, _ in counted if read}
    assert num_read % len(EXAMPLES) == 0
    assert [written for _, written in counted if written] == [len(EXAMPLES)] * (longest - 1)


def test_a_full_device_gets_smaller_batches(
    engine: TransformersEngine, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory, a batch is halved until it fits, later ones start smaller, and the answers are the same."""
    expected = ask(engine, Variant(base), EXAMPLES * 2)
    small = new_engine(batch_size=12)
    short_of_memory, asked = failing_above(small, 4)
    monkeypatch.setattr(small, "_batch", short_of_memory)
    done: list[int] = []
    assert small.generate(Variant(base), EXAMPLES * 2, GREEDY, done.append) == expected
    assert asked == [12, 6, 3, 3, 6, 3, 3, 3, 3, 3, 3]
    assert done == [12, 3, 3, 3, 3]


def test_a_device_too_small_for_one_prompt_is_an_error(base: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """If not even one prompt fits, the error says what to lower."""
    engine = new_engine(batch_size=3)
    short_of_memory, asked = failing_above(engine, 0)
    monkeypatch.setattr(engine, "_batch", short_of_memory)
    with pytest.raises(GenerationError, match=r"single prompt(.|\n)*max_new_tokens"):
        ask(engine, Variant(base))
    assert asked == [3, 1]


def test_an_unknown_architecture_is_a_clear_error(tmp_path: Path) -> None:
    """A model type that transformers does not know is named, with the version that does not know it."""
    directory = embedded_copy(tmp_path / "m", {"config.json": {"model_type": "nonesuch", "architectures": ["None"]}})
    with pytest.raises(GenerationError, match=r"transformers [\d.]+ cannot load the nonesuch model"):
        ask(new_engine(), directory)


def test_a_device_that_is_not_there_is_a_clear_error() -> None:
    """A misspelt device, or one that this build of torch lacks, is refused at once."""
    for name in ("cuba", "xpu:7"):
        with pytest.raises(GenerationError, match=rf"device '{name}' cannot be used"):
            TransformersEngine(EngineSettings(device=name))


def test_identity_names_what_completions_depend_on(engine: TransformersEngine) -> None:
    """Engine, versions, device and dtype are plain text."""
    assert engine.identity.keys() == {"engine", "version", "backmerge", "torch", "device", "dtype", "batch_size"}
    assert all(isinstance(value, str) and value for value in engine.identity.values())
    assert engine.identity["device"] == "cpu"


def test_it_works_in_silence(base: Checkpoint, capfd: pytest.CaptureFixture[str]) -> None:
    """Loading and generating, greedily or not, write nothing to standard output or standard error."""
    fresh = new_engine()
    ask(fresh, Variant(base), EXAMPLES[:2])
    ask(fresh, Variant(base), EXAMPLES[:2], Sampling(max_new_tokens=4, temperature=1.0))
    assert capfd.readouterr() == ("", "")


def test_a_streamed_answer_grows_into_the_generated_one(engine: TransformersEngine, base: Checkpoint) -> None:
    """Each piece begins as the last one goes on; the last is what `generate` gives, and nothing listens afterwards."""
    (whole,) = ask(engine, Variant(base), EXAMPLES[:1])
    pieces = list(engine.stream(Variant(base), EXAMPLES[0], GREEDY))
    assert pieces[-1] == whole
    assert len(pieces) == whole.num_tokens
    assert all(whole.text.startswith(piece.text) and not piece.finished for piece in pieces[:-1])
    assert ask(engine, Variant(base), EXAMPLES[:1]) == [whole]


def test_a_stream_that_is_closed_stops_generating(engine: TransformersEngine, base: Checkpoint) -> None:
    """Its thread ends at the next token, long before the limit."""
    stream = engine.stream(Variant(base), EXAMPLES[0], Sampling(max_new_tokens=200))
    next(stream)
    stream.close()
    assert not any(thread.name == "stream" for thread in threading.enumerate())
    assert len(ask(engine, Variant(base), EXAMPLES[:1])) == 1


def test_a_fault_in_a_stream_is_raised_where_it_is_read(engine: TransformersEngine, base: Checkpoint) -> None:
    """A prompt that leaves no room for an answer."""
    long = Example("long", (Message("user", "the red kettle " * 2000),))
    with pytest.raises(GenerationError, match="long"):
        list(engine.stream(Variant(base), long, GREEDY))


def test_nan_is_refused_and_not_read_as_empty_answers(base: Checkpoint, tmp_path: Path) -> None:
    """A model with one tensor of NaN gives no answer and no likelihood; the error names it."""
    broken = Path(shutil.copytree(base.directory, tmp_path / "broken"))
    tensors = load_file(broken / SINGLE)
    tensors["model.norm.weight"].fill_(torch.nan)
    save_file(tensors, broken / SINGLE, {"format": "pt"})
    engine, variant = new_engine(), Variant(Checkpoint(broken))
    with pytest.raises(GenerationError, match=f"NaN or infinite numbers .* {broken}"):
        engine.generate(variant, EXAMPLES, GREEDY, lambda _: None)
    with pytest.raises(GenerationError, match=f"NaN or infinite numbers .* {broken}"):
        engine.log_likelihoods(variant, [("a", " b")], lambda _: None)
