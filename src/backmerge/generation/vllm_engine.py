"""Generation with vLLM's offline `LLM`: all prompts of all variants of a base at once.

A sweep over λ of a LoRA uses one engine, in which each λ is an adapter next to the base (λ=0 is the base without one).
Models that are served as checkpoints, such as SLERP or a tuned checkpoint, are loaded into the running engine as live
weights, one variant after the other. A variant that cannot be described to vLLM's workers (see `vllm_worker`) is
written as a checkpoint, and the engine is restarted with it.

The engine `transformers` has the same greedy completions on a CPU in float32. Differences: an answer ends at the end of
the model's context, rather than running beyond it; and random draws are seeded for each prompt, so that they do not
depend on the other prompts of the batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from backmerge import __version__
from backmerge.checkpoints.reader import Checkpoint, Weights, read_json
from backmerge.errors import GenerationError, MergeError
from backmerge.generation.chat import end_tokens, load_tokenizer, prompt_text, prompt_tokens
from backmerge.generation.completing import check_lengths, completion_of, cut_at_end
from backmerge.generation.likelihood import row_of
from backmerge.generation.protocol import EngineSettings, Generator, LogLikelihood, Request, Sampling, thinking_identity
from backmerge.generation.vllm_plan import (
    Together,
    VllmOptions,
    Way,
    as_weights,
    base_of,
    grouped,
    has_other_config,
    is_base,
    rank_of,
    realisation_of,
    variant_in,
)
from backmerge.generation.vllm_process import (
    Asked,
    Started,
    adapter_request,
    found,
    sampling_params,
    scoring_params,
)
from backmerge.generation.vllm_worker import described
from backmerge.merging.lowrank import write_adapters
from backmerge.merging.recipe import Variant
from backmerge.merging.to_disk import write_merged
from backmerge.progress import bar_of, say
from backmerge.records import Completion, Example
from backmerge.runs import key_of

NEEDS = "pip install 'backmerge[vllm]'"


class Asking(NamedTuple):
    """The tokenizer and end tokens that a model is used with.

    Attributes:
        tokenizer: The model's tokenizer.
        ends: Tokens that end an answer.
    """

    tokenizer: Any
    ends: set[int]


@dataclass
class Running:
    """A started engine and its state.

    Attributes:
        base: Fingerprint of the base that it serves.
        started: The engine.
        tokenizer: The base's tokenizer.
        ends: Tokens that end an answer.
        scratch: Folder for adapters; deleted with this object.
        rank: The largest rank of an adapter that it accepts; 0 for none.
        weights: Key of the variant in its memory; `None` while that changes.
        adapters: Adapters that it has next to the base, by the variants' keys.
        askings: Tokenizers of variants with other files than the base's, by the files' digest.
    """

    base: str
    started: Started
    tokenizer: Any
    ends: set[int]
    scratch: tempfile.TemporaryDirectory[str]
    rank: int
    weights: str | None
    adapters: dict[str, Any] = field(default_factory=dict)
    askings: dict[str, Asking] = field(default_factory=dict)

    def asking(self, variant: Variant) -> Asking:
        """Return how a variant is asked: with its tokenizer and chat template, which may differ from its base's."""
        files = variant.companions
        if files.digest == Variant(variant.base).companions.digest:
            return Asking(self.tokenizer, self.ends)
        if files.digest not in self.askings:
            folder = files.folder()
            tokenizer = load_tokenizer(folder)
            self.askings[files.digest] = Asking(tokenizer, _ends(folder, tokenizer))
        return self.askings[files.digest]


class VllmEngine(Generator):
    """Generates with vLLM; keeps one engine, and uses it for as many variants of a base as possible.

    Args:
        settings: Device, dtype and options (`VllmOptions`); vLLM decides how many prompts fit at once.

    Raises:
        GenerationError: vLLM is not installed, or does not support this device.
        ConfigError: an option is unknown or impossible.
    """

    gives_likelihoods = True

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.options = VllmOptions.read(settings.options)
        self.max_length = self.options.max_model_len
        self.version, self.device = found()
        if settings.device not in ("auto", self.device):
            raise GenerationError(
                f"this vLLM computes on '{self.device}', not on '{settings.device}'",
                remedy="use --device auto; CUDA_VISIBLE_DEVICES chooses among several GPUs.",
            )
        self._running: Running | None = None

    @property
    def identity(self) -> dict[str, str]:
        """Return what completions depend on apart from weights, prompt and sampling."""
        return {
            "engine": "vllm",
            "version": self.version,
            "backmerge": __version__,
            "torch": torch.__version__.partition("+")[0],
            "device": self.device,
            "dtype": self.settings.dtype,
            **self.options.identity,
            **thinking_identity(self.settings),
        }

    def realisation(self, variant: Variant) -> Literal["base"] | Way:
        """Return how a variant gets into vLLM.

        Raises:
            GenerationError: not in the way that the option `realisation` requires.
        """
        return realisation_of(variant, self.options, self.dtype_of(variant.base))

    def dtype_of(self, base: Weights) -> str:
        """Return the dtype in which vLLM stores a base's weights and computes, as torch names it."""
        return self._dtype(base.directory)

    def generate(
        self, variant: Variant | None, examples: Sequence[Example], sampling: Sampling, advance: Callable[[int], None]
    ) -> list[Completion]:
        """Return each example's completions, in order; see `generate_many`, which is faster for several variants."""
        ((_, completions),) = self.generate_many([Request(variant, examples, sampling)], advance)
        return completions

    def generate_many(
        self, requests: Sequence[Request], advance: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield each request's place and completions when it is done.

        Raises:
            GenerationError: a prompt leaves no room for an answer in the model's context, or vLLM fails.
            MergeError: a recipe is wrong, or its result is not finite.
        """
        ways = [self.realisation(variant_in(request)) for request in requests]
        running = self._running
        for together in grouped(requests, ways, running.base if running is not None and running.rank else None):
            if together.way == "adapter":
                ready = self._with_adapters(together.variants)
            else:
                ready = self._with_weights(together.variants[0], together.way)
            yield from self._answered(ready, together, advance)

    def log_likelihoods(
        self, variant: Variant, pairs: Sequence[tuple[str, str]], advance: Callable[[int], None]
    ) -> list[LogLikelihood]:
        """Return how likely each continuation is after its context; neither gets a chat template.

        It never uses adapters: with them, vLLM takes prompt tokens' log-probabilities from the wrong ones or fails
        (vllm-project/vllm issue 16668). If answers and likelihoods are needed in turn, the option `realisation: live`
        avoids starting an engine for each.
        """
        dtype = self.dtype_of(variant.base)
        if variant.served_as == "adapter" and dtype != "float32" and not is_base(variant):
            say(f"Likelihoods: vLLM computes them with the merged weights, rounded to {dtype}, not with the adapter.")
        running = self._with_weights(variant, _way_of_weights(variant))
        # there must be room for the token that vLLM always generates
        rows = [row_of(running.asking(variant).tokenizer, *pair, running.started.context - 1) for pair in pairs]
        scored: dict[int, LogLikelihood] = {}
        for place, output in self._finished(running, [Asked(ids, scoring_params()) for ids, _ in rows]):
            ids, count = rows[place]
            chosen = [output.prompt_logprobs[at][ids[at]] for at in range(len(ids) - count, len(ids))]
            total = sum(one.logprob for one in chosen)
            scored[place] = LogLikelihood(total, count, all(one.rank == 1 for one in chosen))
            advance(1)
        return [scored[place] for place in range(len(rows))]

    def release(self) -> None:
        """Stop vLLM and free the device's memory; the next call starts it again."""
        if self._running is not None:
            running, self._running = self._running, None
            running.started.close()
            running.scratch.cleanup()

    def _with_adapters(self, variants: Sequence[Variant]) -> Running:
        """Return an engine for these variants: adapters of one base, and perhaps that base."""
        base = variants[0].base
        merged = [variant for variant in variants if not is_base(variant)]
        if not merged and (self._running is None or self._running.base != base.fingerprint):
            return self._with_weights(variants[0], "live")
        new = {key_of(variant.identity): variant for variant in merged}
        if self.device == "cpu" and merged:
            # vLLM's CPU kernels treat "no adapter" (-1) as the last one, so that the base would answer with that; an
            # adapter of zeros is used instead
            new[_base_key(base)] = Variant(base, merged[0].tuned_models[0], lam=0.0)
        running = self._running
        rank = max((rank_of(variant) for variant in merged), default=1)
        if running is None or running.base != base.fingerprint or running.rank < rank:
            arguments = self.options.adapter_arguments(rank, len(new))
            running = self._start(base, arguments, arguments["max_lora_rank"], _base_key(base))
        self._add_adapters(running, {key: variant for key, variant in new.items() if key not in running.adapters})
        return running

    def _add_adapters(self, running: Running, new: dict[str, Variant]) -> None:
        """Write adapters, those of a recipe together; each gets a name that is unique in this engine."""
        recipes: list[dict[Path, Variant]] = []
        for key, variant in new.items():
            same = (recipe for recipe in recipes if next(iter(recipe.values())).at(None) == variant.at(None))
            recipe = next(same, None)
            if recipe is None:
                recipes.append(recipe := {})
            recipe[Path(running.scratch.name) / key] = variant
        for recipe in recipes:
            write_adapters(recipe)
        for key in new:
            number = len(running.adapters) + 1
            running.adapters[key] = adapter_request(key, number, Path(running.scratch.name) / key)

    def _with_weights(self, variant: Variant, way: Way) -> Running:
        """Return an engine without adapters that has a variant's weights."""
        asked = base_of(variant) if is_base(variant) else variant
        wanted, fingerprint = key_of(asked.identity), asked.base.fingerprint
        running = self._running
        if running is not None and (running.base != fingerprint or running.rank):
            running = None
        if running is not None and running.weights == wanted:
            return running
        if way == "checkpoint":
            self.release()
            with tempfile.TemporaryDirectory(prefix="backmerge-") as scratch:
                merged = Path(scratch) / "merged"
                write_merged(as_weights(asked), merged)
                running = self._start(Checkpoint(merged), {}, 0, wanted)
            if not has_other_config(variant):  # other variants of the base have the base's config
                running.base = fingerprint
            return running
        running = running or self._start(asked.base, {}, 0, _base_key(asked.base))
        if running.weights != wanted:
            self._set_weights(running, asked, wanted)
        return running

    def _set_weights(self, running: Running, variant: Variant, wanted: str) -> None:
        running.weights = None  # until they are complete again
        try:
            failures = running.started.call("set_merged_weights", described(as_weights(variant)))
            for failure in failures:
                if failure is not None:
                    raise MergeError(failure[0], remedy=failure[1])
        except (GenerationError, MergeError):
            self.release()
            raise
        running.weights = wanted

    def _start(self, weights: Weights, arguments: dict[str, Any], rank: int, key: str) -> Running:
        self.release()
        directory = weights.directory
        tokenizer = load_tokenizer(directory)
        ends = _ends(directory, tokenizer)
        common = self.options.start_arguments(self.device) | {"dtype": self._dtype(directory)}
        started = Started(directory, common | arguments, own_process=self.options.own_process)
        scratch = tempfile.TemporaryDirectory(prefix="backmerge-")
        self._running = Running(weights.fingerprint, started, tokenizer, ends, scratch, rank, key)
        return self._running

    def _dtype(self, directory: Path) -> str:
        if self.settings.dtype != "auto":
            return self.settings.dtype
        if self.device == "cpu":
            return "float32"
        config = read_json(directory / "config.json")  # vLLM's own `auto` would turn float32 into 16 bits
        return str(config.get("dtype") or config.get("torch_dtype") or "auto")

    def _adapter_of(self, running: Running, variant: Variant) -> Any:
        if not running.rank:
            return None
        if is_base(variant):
            return running.adapters.get(_base_key(variant.base))
        return running.adapters[key_of(variant.identity)]

    def _answered(
        self, running: Running, together: Together, advance: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Yield each request's completions when the last of its prompts is answered."""
        prompts: list[tuple[int, int, str]] = []
        asked: list[Asked] = []
        for place, request in together.requests.items():
            _, examples, sampling = request
            tokenizer, ends = running.asking(variant_in(request))
            texts = [prompt_text(tokenizer, example, thinking=self.settings.thinking) for example in examples]
            tokens = [prompt_tokens(tokenizer, e, text) for e, text in zip(examples, texts, strict=True)]
            check_lengths(examples, tokens, running.started.context)
            adapter = self._adapter_of(running, variant_in(request))
            for number, (example, text, ids) in enumerate(zip(examples, texts, tokens, strict=True)):
                prompts.append((place, number, text))
                seed = int(key_of(sampling.seed, example.id)[:8], 16)
                asked.append(Asked(ids, sampling_params(sampling, ends, seed), adapter))
        yield from ((place, []) for place, request in together.requests.items() if not request.examples)
        answers: dict[int, dict[int, list[Completion]]] = {}
        shown = bar_of(advance)
        shown.count()
        for at, output in self._finished(running, asked):
            place, number, text = prompts[at]
            _, examples, sampling = request = together.requests[place]
            of_request = answers.setdefault(place, {})
            asking = running.asking(variant_in(request))
            of_request[number] = _completions(asking, examples[number], text, output, sampling)
            shown.count(written=sum(one.num_tokens for one in of_request[number]))
            shown(1)
            if len(of_request) == len(examples):
                yield place, [one for n in range(len(examples)) for one in of_request[n]]
                del answers[place]

    def _finished(self, running: Running, asked: Sequence[Asked]) -> Iterator[tuple[int, Any]]:
        try:
            yield from running.started.finished(asked)
        except GenerationError:
            self.release()
            raise


def _way_of_weights(variant: Variant) -> Way:
    return "checkpoint" if has_other_config(variant) or described(as_weights(variant)) is None else "live"


def _base_key(base: Weights) -> str:
    return key_of(Variant(base).identity)


def _completions(asking: Asking, example: Example, prompt: str, output: Any, sampling: Sampling) -> list[Completion]:
    tokenizer, ends = asking
    drawn = [cut_at_end(one.token_ids, ends) for one in sorted(output.outputs, key=lambda one: one.index)]
    if sampling.temperature == 0:  # vLLM refuses several greedy answers to one prompt
        drawn *= sampling.num_samples
    return [
        completion_of(tokenizer, example, prompt, sample, ids, sampling, is_ended=is_ended)
        for sample, (ids, is_ended) in enumerate(drawn)
    ]


def _ends(directory: Path, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer: the same as in the engine `transformers`."""
    from transformers import AutoConfig, GenerationConfig

    if (directory / "generation_config.json").is_file():
        config = GenerationConfig.from_pretrained(directory)
    else:
        config = GenerationConfig.from_model_config(AutoConfig.from_pretrained(directory, trust_remote_code=False))
    return end_tokens(config, tokenizer)
