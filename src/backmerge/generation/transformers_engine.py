"""Batched generation with transformers, on CPU or GPU; variants of a base are made by overwriting its weights."""

from __future__ import annotations

import math
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from backmerge import __version__
from backmerge.checkpoints.companions import Companions
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.errors import GenerationError
from backmerge.generation.chat import end_tokens, load_tokenizer, max_positions, prompt_text, prompt_tokens
from backmerge.generation.completing import check_lengths, check_tokens, completion_of, cut_at_end
from backmerge.generation.likelihood import likelihoods
from backmerge.generation.loading import PutOn, device_of, load_model
from backmerge.generation.protocol import EngineSettings, Generator, LogLikelihood, Sampling, thinking_identity
from backmerge.merging.live import LiveMerge
from backmerge.merging.recipe import Variant
from backmerge.merging.served import adapter_of, dtype_of, is_own_adapter
from backmerge.merging.to_disk import write_merged
from backmerge.progress import Bar, bar_of
from backmerge.records import Completion, Example


class _Counting(LogitsProcessor):  # type: ignore[misc] # transformers is not typed
    """Counts the tokens of a batch after each step, padding included; changes no score."""

    def __init__(self, shown: Bar) -> None:
        self._shown = shown
        self._is_read = False
        shown.count()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._is_read:
            self._shown.count(written=input_ids.shape[0])
        else:
            self._shown.count(read=input_ids.numel())
        self._is_read = True
        return scores


class _NotFiniteError(Exception):
    """The model's logits are NaN or infinite."""


class _CheckingFirst(LogitsProcessor):  # type: ignore[misc]
    """Checks the logits of a batch's first step; changes no score. Damaged weights show there, at the cost of a sum."""

    def __init__(self) -> None:
        self._is_checked = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        # a model may exclude single tokens by -inf; NaN is the maximum of its row
        if not self._is_checked and not bool(scores.amax(dim=-1).isfinite().all()):
            raise _NotFiniteError
        self._is_checked = True
        return scores


def _not_finite(variant: Variant) -> GenerationError:
    models = " with ".join(str(weights.directory) for weights in (variant.base, *variant.tuned_models))
    return GenerationError(
        f"the model computes NaN or infinite numbers instead of probabilities: {models}. Its answers would be "
        "meaningless, and empty ones count as harmless",
        remedy="its weights or a number in config.json (such as rms_norm_eps) are damaged: download or save the model "
        "again. In float16, large numbers overflow: use --dtype bfloat16 or float32.",
    )


def _ignored(_: int, __: str = "", /) -> None:
    """Ignore the count of answers to one prompt."""


class _StoppedError(Exception):
    """The answer is no longer needed."""


class _Hearing(LogitsProcessor):  # type: ignore[misc]
    """Passes on the tokens of one answer so far, before each step; changes no score.

    Args:
        width: Tokens of the prompt.
        heard: Called with the tokens.
        is_stopped: When set, generation ends.
    """

    def __init__(self, width: int, heard: Callable[[list[int]], None], is_stopped: threading.Event) -> None:
        self._width = width
        self._heard = heard
        self._is_stopped = is_stopped

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._is_stopped.is_set():
            raise _StoppedError
        self._heard(input_ids[0, self._width :].tolist())
        return scores


class TransformersEngine(Generator):
    """Generates with `transformers`; keeps one model in memory and turns it into each variant of its base.

    Args:
        settings: Device, dtype and batch size.

    Raises:
        GenerationError: the device does not exist, or an option is unknown.
    """

    gives_likelihoods = True

    def __init__(self, settings: EngineSettings) -> None:
        if settings.options:
            raise GenerationError(
                f"the engine transformers has no option '{next(iter(settings.options))}'",
                remedy="device, dtype and batch_size are separate settings.",
            )
        self.settings = settings
        self.device = device_of(settings.device)
        self.dtype = settings.dtype
        self.batch_size = settings.batch_size
        self.model: Any = None
        self._live: Any = None
        self._put_on: PutOn | None = None
        self._loaded: str | None = None
        self._current: dict[str, Any] | None = None
        self._config: str | None = None
        self._files: str | None = None
        self._listener: tuple[Callable[[list[int]], None], threading.Event] | None = None

    @property
    def identity(self) -> dict[str, str]:
        """Return what completions depend on apart from weights, prompt and sampling."""
        return {
            "engine": "transformers",
            "version": transformers.__version__,
            "backmerge": __version__,
            "torch": torch.__version__.partition("+")[0],
            "device": self.device.type,
            "dtype": self.dtype,
            # batches of another size change the order of sums, and which draws of a sample a prompt gets
            "batch_size": str(self.settings.batch_size),
            **thinking_identity(self.settings),
        }

    def dtype_of(self, base: Weights) -> str:
        """Return the dtype of the computation on a base, as torch names it."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if self.device.type == "cpu" else dtype_of(base)

    def realisation(self, variant: Variant) -> Literal["base", "live", "adapter"]:
        """Return how a variant gets into the model in memory.

        An unchanged adapter is loaded as its user loads it, by peft. Merges of a sweep that are served as adapters are
        set as live weights if these are in float32: the unrounded sum is the same function, and needs no second path
        through the model. In any other dtype the sum would be rounded, so peft loads them too.
        """
        if not variant.tuned_models:
            return "base"
        if variant.served_as == "checkpoint":
            return "live"
        is_summed = self.dtype_of(variant.base) == "float32" and not is_own_adapter(variant)
        return "live" if is_summed else "adapter"

    def generate(
        self,
        variant: Variant | None,
        examples: Sequence[Example],
        sampling: Sampling,
        advance: Callable[[int], None],
    ) -> list[Completion]:
        """Return each example's completions, in order.

        Raises:
            GenerationError: a prompt leaves no room for an answer in the model's context, or the model computes NaN.
        """
        assert variant is not None, "this engine is not a server"
        self._become(variant)
        prompts = [prompt_text(self.tokenizer, example, thinking=self.settings.thinking) for example in examples]
        tokens = [prompt_tokens(self.tokenizer, e, p) for e, p in zip(examples, prompts, strict=True)]
        context = max_positions(self.model)
        check_lengths(examples, tokens, context)
        check_tokens([*tokens, [self.tokenizer.pad_token_id]], self.model.get_input_embeddings().weight.shape[0])
        # prompts of similar length together, for less padding; the longest first, so that a lack of memory shows early
        by_length = sorted(range(len(examples)), key=lambda i: -len(tokens[i]))
        order = [(i, sample) for i in by_length for sample in range(sampling.num_samples)]
        answers: dict[tuple[int, int], tuple[list[int], bool]] = {}
        done = 0
        shown = bar_of(advance)
        # the caller's random state is kept
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(sampling.seed)
            for batch in self._batches(order):
                try:
                    made = self._answers([tokens[i] for i, _ in batch], sampling, shown)
                except _NotFiniteError:
                    raise _not_finite(variant) from None
                answers.update(zip(batch, made, strict=True))
                shown(len(answers) // sampling.num_samples - done)
                done = len(answers) // sampling.num_samples
        places = [(i, sample) for i in range(len(examples)) for sample in range(sampling.num_samples)]
        return [
            completion_of(
                self.tokenizer, examples[i], prompts[i], sample, answers[i, sample][0], sampling, is_ended=is_ended
            )
            for i, sample in places
            for is_ended in [answers[i, sample][1]]
        ]

    def stream(self, variant: Variant, example: Example, sampling: Sampling) -> Iterator[Completion]:
        """Yield one answer as it grows; the last one equals that of `generate`. If closed early, generation stops.

        Raises:
            GenerationError: see `generate`.
        """
        self._become(variant)
        prompt = prompt_text(self.tokenizer, example, thinking=self.settings.thinking)
        is_stopped = threading.Event()
        alone = sampling.model_copy(update={"num_samples": 1})
        heard: queue.SimpleQueue[list[int] | Completion | BaseException] = queue.SimpleQueue()
        self._listener = (heard.put, is_stopped)

        def answer() -> None:
            try:
                (done,) = self.generate(variant, [example], alone, _ignored)
                heard.put(done)
            except BaseException as error:  # noqa: BLE001 - boundary: raised again by the thread that reads
                heard.put(error)

        thread = threading.Thread(target=answer, name="stream", daemon=True)
        thread.start()
        try:
            while not isinstance(found := heard.get(), Completion):
                if isinstance(found, BaseException):
                    raise found
                if found:
                    yield completion_of(self.tokenizer, example, prompt, 0, found, sampling, is_ended=False)
            yield found
        finally:
            is_stopped.set()
            thread.join()
            self._listener = None

    def log_likelihoods(
        self, variant: Variant, pairs: Sequence[tuple[str, str]], advance: Callable[[int], None]
    ) -> list[LogLikelihood]:
        """Return how likely each continuation is after its context; neither gets a chat template.

        Raises:
            GenerationError: see `likelihoods`; or the model computes NaN.
        """
        self._become(variant)
        found = likelihoods(self.model, self.tokenizer, pairs, self.batch_size, advance)
        if any(math.isnan(likelihood.total) for likelihood in found):
            raise _not_finite(variant)
        return found

    def loaded(self, variant: Variant) -> tuple[Any, Any]:
        """Return the model in memory as this variant, and its tokenizer; valid until the engine is used again."""
        self._become(variant)
        return self.model, self.tokenizer

    def release(self) -> None:
        """Free the device's memory; the next call loads the model again."""
        self._loaded = self._current = None
        self.model = self._live = self._put_on = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _batches(self, order: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
        start = 0
        while start < len(order):
            size = self.batch_size  # reduced when memory runs out
            yield order[start : start + size]
            start += size

    def _answers(self, prompts: Sequence[list[int]], sampling: Sampling, shown: Bar) -> list[tuple[list[int], bool]]:
        """Return generated token ids and whether each ended before the limit; full memory halves the batches."""
        try:
            return self._batch(prompts, sampling, shown)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise GenerationError(
                    "the device's memory is too small for a single prompt with its answer",
                    remedy="lower max_new_tokens, use --dtype bfloat16, or use a device with more memory.",
                ) from None
        # outside the except block, since the exception's traceback keeps the failed batch's tensors alive
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        self.batch_size = min(self.batch_size, half)
        return self._answers(prompts[:half], sampling, shown) + self._answers(prompts[half:], sampling, shown)

    @torch.inference_mode()
    def _batch(self, prompts: Sequence[list[int]], sampling: Sampling, shown: Bar) -> list[tuple[list[int], bool]]:
        padded = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.device)
        processors = LogitsProcessorList([_CheckingFirst(), _Counting(shown)])
        if sampling.repetition_penalty != 1.0:
            processors.append(UnpaddedRepetitionPenalty(sampling.repetition_penalty, padded["attention_mask"]))
        if self._listener is not None:
            processors.append(_Hearing(padded["input_ids"].shape[1], *self._listener))
        output = self.model.generate(
            **padded,
            generation_config=self._generation_config(sampling),
            logits_processor=processors,
            **({"tokenizer": self.tokenizer} if sampling.stop else {}),
        )
        width = padded["input_ids"].shape[1]
        return [cut_at_end(row, self._ends) for row in output[:, width:].tolist()]

    def _generation_config(self, sampling: Sampling) -> GenerationConfig:
        common = {
            "max_new_tokens": sampling.max_new_tokens,
            "eos_token_id": sorted(self._ends) or None,
            "pad_token_id": self.tokenizer.pad_token_id,
            "use_cache": True,
            "stop_strings": list(sampling.stop) or None,
        }
        if sampling.temperature == 0:
            return GenerationConfig(do_sample=False, **common)
        return GenerationConfig(
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            **common,
        )

    def _become(self, variant: Variant) -> None:
        """Load the variant's base if another is loaded, and turn it into what the variant's user would load."""
        identity, files = variant.weights_identity, variant.companions
        is_loaded = self._loaded == variant.base.fingerprint and self._config == files.config_digest
        if is_loaded and self._current == identity and self._files == files.digest:
            return
        self._take_off()
        if self._loaded != variant.base.fingerprint or self._config != files.config_digest:
            self._load(variant.base, files)
            self._current = {"base": variant.base.fingerprint}
        if self._current != identity:
            self._change_to(variant, identity)
        self._config = files.config_digest
        self._take_files(files)

    def _change_to(self, variant: Variant, identity: dict[str, Any]) -> None:
        if variant.served_as == "checkpoint":
            self._overwrite(variant)
        else:
            with tempfile.TemporaryDirectory(prefix="backmerge-") as scratch:
                adapter = adapter_of(variant, Path(scratch))
                if self.realisation(variant) == "live":
                    self._overwrite(Variant(variant.base, adapter, dtype="F32"))
                else:
                    self._overwrite(Variant(variant.base))
                    self._current = None  # until the weights are complete again
                    self._put_on = PutOn(self.model, adapter.directory, is_whole=bool(adapter.dense_changes))
        self._current = identity

    def _overwrite(self, variant: Variant) -> None:
        """Set the weights to those of a checkpoint of the variant."""
        if self._current == variant.weights_identity:
            return
        self._current = None  # until the weights are complete again
        if self._live.is_possible():
            self._live.set(variant)
        elif not variant.tuned_models and variant.dtype is None:
            self._load(variant.base, variant.companions)
        else:
            # transformers renames or fuses this architecture's tensors as it loads them: let it load the merged files
            with tempfile.TemporaryDirectory(prefix="backmerge-") as scratch:
                merged = Path(scratch) / "merged"
                write_merged(variant, merged)
                written = Variant(Checkpoint(merged))
                self._load(written.base, written.companions)
            # the model in memory came from this base, and the next variant may be live again
            self._loaded = variant.base.fingerprint
        self._current = variant.weights_identity

    def _take_off(self) -> None:
        """Remove an adapter from the base, if there is one."""
        if self._put_on is None:
            return
        is_base_again = self._put_on.take_off()
        self._put_on = self._current = None
        if is_base_again and self._loaded is not None:
            self._current = {"base": self._loaded}
        else:
            self._loaded = None

    def _load(self, weights: Weights, files: Companions) -> None:
        """Load weights with the config among the files, which may differ from the one next to the weights."""
        self.release()  # the memory may not suffice for two models
        self._files = None
        is_own = files.config_digest == Variant(weights).companions.config_digest
        # a base that is extended by added rows is loaded with its own config
        is_whole = weights.companions == weights.directory
        directory = weights.directory if is_own or not is_whole else files.folder(weights.directory)
        dtype: Any = self.dtype
        if dtype == "auto" and self.device.type == "cpu":
            dtype = torch.float32
        self.model = load_model(directory, dtype).to(self.device).eval()
        self._live = LiveMerge(self.model, weights)
        self._stops = self.model.generation_config
        self._take_files(files)
        self._loaded = weights.fingerprint

    def _take_files(self, files: Companions) -> None:
        """Use the tokenizer and chat template among the files."""
        if self._files == files.digest:
            return
        self.tokenizer = load_tokenizer(files.folder(), needs_template=False)
        self._ends = end_tokens(self._stops, self.tokenizer)
        # sampling is set by us: the model's own file must not influence a greedy run
        self.model.generation_config = GenerationConfig(
            eos_token_id=sorted(self._ends) or None, pad_token_id=self.tokenizer.pad_token_id
        )
        self._files = files.digest


class UnpaddedRepetitionPenalty(LogitsProcessor):  # type: ignore[misc] # transformers is not typed
    """Divides positive and multiplies negative logits of tokens that occur in prompt or answer.

    The stock processor also penalises the padding of a left-padded batch; the pad token is often the end of sequence,
    so that answers become longer, and depend on the batch.

    Args:
        penalty: Above 1 discourages repetition.
        prompt_mask: 1 for tokens of the prompt, 0 for padding; shape (batch, prompt).

    Source: Keskar et al., CTRL (arXiv 1909.05858), section 4.1.
    """

    def __init__(self, penalty: float, prompt_mask: Tensor) -> None:
        self.penalty = penalty
        self.prompt_mask = prompt_mask.bool()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return penalised logits, shape (batch, vocabulary)."""
        num_new = input_ids.shape[1] - self.prompt_mask.shape[1]
        is_real = torch.nn.functional.pad(self.prompt_mask, (0, num_new), value=True)
        seen = torch.zeros_like(scores, dtype=torch.int32).scatter_add_(1, input_ids, is_real.int()) > 0
        penalised = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen, penalised, scores)
