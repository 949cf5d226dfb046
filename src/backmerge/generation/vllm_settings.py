"""The options of the vLLM engine and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from backmerge.config import Document, Settings, validated

# the ranks that vLLM's LoRA kernels support
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
MOST_AT_ONCE = 16  # adapters in one batch by default: each one needs GPU memory
CPU_CACHE_GB = 4.0


class VllmOptions(Settings):
    """Options of the engine `vllm`.

    Attributes:
        gpu_memory_utilization: Share of the GPU's memory for weights and key-value cache, in (0, 1].
        kv_cache_gb: The key-value cache, in GiB; by default the rest of that share of a GPU, and 4 on a CPU.
        tensor_parallel_size: GPUs that share the model.
        max_model_len: Context, in tokens; by default the model's own, whose cache may be too large for a small GPU.
        max_num_seqs: Answers in progress at once; by default vLLM's own.
        enforce_eager: No compilation and no CUDA graphs; by default on a CPU only.
        max_lora_rank: Largest rank of an adapter; by default what the adapters need.
        max_loras: Adapters in one batch; by default all that are used together, at most 16.
        realisation: How a merge gets into the engine. `auto` takes the first that is possible: an adapter next to the
            base, live weights, or a written checkpoint; the others require one.
        own_process: Whether vLLM runs in its own process, which frees all memory when it ends. In ours it starts
            sooner, but changes torch's threads and global random state.
    """

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    kv_cache_gb: Annotated[float, Field(gt=0)] | None = None
    tensor_parallel_size: Annotated[int, Field(gt=0)] = 1
    max_model_len: Annotated[int, Field(gt=0)] | None = None
    max_num_seqs: Annotated[int, Field(gt=0)] | None = None
    enforce_eager: bool | None = None
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] | None = None
    max_loras: Annotated[int, Field(gt=0)] | None = None
    realisation: Literal["auto", "adapter", "live", "checkpoint"] = "auto"
    own_process: bool = True

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> VllmOptions:
        """Return the options of an engine's settings.

        Raises:
            ConfigError: an option is unknown or impossible; the message names it.
        """
        return validated(cls, Document("engine.options of vllm", dict(options), {}))

    def start_arguments(self, device: str) -> dict[str, Any]:
        """Return the arguments of vLLM's `LLM`, except for the model, its dtype, and adapters."""
        is_cpu = device == "cpu"
        cache_gb = CPU_CACHE_GB if self.kv_cache_gb is None and is_cpu else self.kv_cache_gb
        given = {
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "kv_cache_memory_bytes": None if cache_gb is None else int(cache_gb * 2**30),
            "tensor_parallel_size": self.tensor_parallel_size,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "enforce_eager": is_cpu if self.enforce_eager is None else self.enforce_eager,
        }
        return {name: value for name, value in given.items() if value is not None}

    def adapter_arguments(self, rank: int, num_adapters: int) -> dict[str, Any]:
        """Return the arguments for adapters of at most a rank, with a number of them in one call."""
        return {
            "enable_lora": True,
            "max_lora_rank": self.max_lora_rank or next(size for size in RANKS if size >= rank),
            "max_loras": self.max_loras or min(max(num_adapters, 1), MOST_AT_ONCE),
        }

    @property
    def identity(self) -> dict[str, str]:
        """Return the options that completions depend on, without those for memory and concurrency."""
        return {
            "max_model_len": str(self.max_model_len or "model"),
            "tensor_parallel_size": str(self.tensor_parallel_size),
            "realisation": self.realisation,
        }
