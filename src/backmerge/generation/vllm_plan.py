"""The options of the vLLM engine; which requests it answers together, and how their variants get into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from backmerge.config import Document, Settings, validated
from backmerge.errors import GenerationError
from backmerge.generation.protocol import Request
from backmerge.generation.vllm_worker import described
from backmerge.merging.lowrank import LowRankMerge, adapter_obstacle
from backmerge.merging.recipe import Variant
from backmerge.merging.served import served_dtype
from backmerge.runs import key_of

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


Way = Literal["adapter", "live", "checkpoint"]


@dataclass
class Together:
    """Requests that one state of an engine answers.

    Attributes:
        way: How their variants get into it; the base may be among the adapters.
        requests: Requests by their places.
    """

    way: Way
    requests: dict[int, Request] = field(default_factory=dict)

    @property
    def variants(self) -> list[Variant]:
        """Return the requests' variants."""
        return [variant_in(request) for request in self.requests.values()]


def variant_in(request: Request) -> Variant:
    """Return the variant of a request.

    Raises:
        GenerationError: it has none.
    """
    if request.variant is None:
        raise GenerationError(
            "the engine vllm needs a model", remedy="give it a base; only servers have their own model."
        )
    return request.variant


def base_of(variant: Variant) -> Variant:
    """Return the base itself as a variant."""
    return Variant(variant.base)


def is_base(variant: Variant) -> bool:
    """Return whether a variant is its base, bit for bit, with nothing to merge: the base, or λ=0 if that is exact."""
    is_cast = variant.served_as == "checkpoint" and variant.dtype is not None
    if is_cast or variant.rounding != "nearest" or has_other_config(variant):
        return False
    if not variant.tuned_models:
        return True
    is_number = isinstance(variant.lam, int | float)
    method = variant.method
    return is_number and variant.lam == 0 and method.has_exact_endpoints


def has_other_config(variant: Variant) -> bool:
    """Return whether a merge has another config than its base, so that vLLM has to load it with that config."""
    return variant.companions.config_digest != base_of(variant).companions.config_digest


def rank_of(variant: Variant) -> int:
    """Return the rank of a merge that is an adapter."""
    return LowRankMerge([variant]).form.rank


def realisation_of(variant: Variant, options: VllmOptions, dtype: str = "float32") -> Literal["base"] | Way:
    """Return how a variant gets into vLLM, so that the served model is the one that is computed.

    An adapter is never rounded to the base's dtype, and a checkpoint is always rounded to its own.

    Args:
        variant: A variant, with the form in which it is served.
        options: May require a realisation.
        dtype: The dtype in which vLLM stores weights, as torch names it.

    Raises:
        GenerationError: it cannot be realised as the options require, or vLLM does not support this adapter.
    """
    wanted = options.realisation
    if is_base(variant):
        return "base"
    is_served_as_adapter = variant.served_as == "adapter"
    if has_other_config(variant) and not is_served_as_adapter:
        if wanted in ("auto", "checkpoint"):
            return "checkpoint"
        raise GenerationError(
            f"the engine's option realisation is {wanted}, but the merged model's config is not the base's",
            remedy="set it to auto, or use the base's config: --config-from base (config_from: base).",
        )
    obstacle = None
    if wanted in ("auto", "adapter"):
        if is_served_as_adapter or served_dtype(variant) == "float32":  # in float32 both are the same model
            obstacle = _adapter_obstacle(variant, options)
        else:
            obstacle = f"the measured model is a checkpoint, rounded to {served_dtype(variant)}"
        if obstacle is None:
            return "adapter"
        if wanted == "adapter":
            raise GenerationError(
                f"the engine's option realisation is adapter, but there is none: {obstacle}",
                remedy="set it to auto.",
            )
    if is_served_as_adapter and dtype != "float32":
        why = f"vLLM does not support this adapter: {obstacle}" if obstacle else f"the option realisation is {wanted}"
        raise GenerationError(
            f"{why}; merged into the weights, it would be rounded to {dtype}, which makes it a different model from "
            "the adapter",
            remedy="measure and write a checkpoint instead (--as checkpoint), or use --engine transformers.",
        )
    if wanted != "checkpoint" and described(as_weights(variant)) is not None:
        return "live"
    if wanted == "live":
        raise GenerationError(
            "the engine's option realisation is live, but vLLM's workers can read only folders, and this recipe has "
            "other inputs",
            remedy="set it to auto.",
        )
    return "checkpoint"


def as_weights(variant: Variant) -> Variant:
    """Return the whole weights that compute the same as a variant: for an adapter those of its sum, in float32."""
    if variant.served_as == "checkpoint":
        return variant
    return replace(variant, served_as="checkpoint", dtype="F32")


def _adapter_obstacle(variant: Variant, options: VllmOptions) -> str | None:
    obstacle = adapter_obstacle(variant)
    if obstacle is not None:
        return obstacle
    merge = LowRankMerge([variant])
    most = options.max_lora_rank or RANKS[-1]
    if merge.vllm_obstacle is None and merge.form.rank > most:
        return f"its rank is {merge.form.rank}, but the engine's option max_lora_rank is {most}"
    return merge.vllm_obstacle


def grouped(requests: Sequence[Request], ways: Sequence[str], beside_adapters: str | None = None) -> list[Together]:
    """Group requests that are answered together: a base with its adapters; every other variant separately.

    Args:
        requests: The requests.
        ways: How each one's variant gets into vLLM, from `realisation_of`.
        beside_adapters: Fingerprint of the base that a running engine serves next to adapters, if there is one.

    Returns:
        Bases one after the other; for each, its adapters first, which need no change of weights.
    """
    variants = [variant_in(request) for request in requests]
    with_adapters = {v.base.fingerprint for v, way in zip(variants, ways, strict=True) if way == "adapter"}
    groups: dict[str, dict[str, Together]] = {}
    for place, (variant, way) in enumerate(zip(variants, ways, strict=True)):
        base = variant.base.fingerprint
        of_base = groups.setdefault(base, {})
        if way == "adapter" or (way == "base" and base in {*with_adapters, beside_adapters}):
            group = of_base.setdefault("", Together("adapter"))
        else:
            key = key_of((base_of(variant) if way == "base" else variant).identity)
            group = of_base.setdefault(key, Together("checkpoint" if way == "checkpoint" else "live"))
        group.requests[place] = requests[place]
    return [of_base[key] for of_base in groups.values() for key in sorted(of_base, key=bool)]
