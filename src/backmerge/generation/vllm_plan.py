"""Which requests one vLLM engine answers together, and how their variants reach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from backmerge.errors import GenerationError
from backmerge.generation.protocol import Request
from backmerge.generation.vllm_settings import RANKS, VllmOptions
from backmerge.generation.vllm_worker import described
from backmerge.merging.lowrank import LowRankMerge, adapter_obstacle
from backmerge.merging.recipe import Variant
from backmerge.merging.served import served_dtype
from backmerge.runs import key_of

Way = Literal["adapter", "live", "checkpoint"]


@dataclass
class Together:
    """Requests that one state of an engine answers.

    Attributes:
        way: How their variants reach it; the base may be among the adapters.
        requests: By their places.
    """

    way: Way
    requests: dict[int, Request] = field(default_factory=dict)

    @property
    def variants(self) -> list[Variant]:
        """Theirs."""
        return [variant_in(request) for request in self.requests.values()]


def variant_in(request: Request) -> Variant:
    """What a request is for.

    Raises:
        GenerationError: whatever a server has.
    """
    if request.variant is None:
        raise GenerationError(
            "the engine vllm is asked for no model in particular", remedy="give it a base; servers have their own."
        )
    return request.variant


def base_of(variant: Variant) -> Variant:
    """The base itself."""
    return Variant(variant.base)


def is_base(variant: Variant) -> bool:
    """Whether a variant is its base, bit for bit, with nothing to merge: the base, or λ=0 where that is exact."""
    is_cast = variant.served_as == "checkpoint" and variant.dtype is not None
    if is_cast or variant.rounding != "nearest" or has_other_config(variant):
        return False
    if not variant.tuned_models:
        return True
    is_number = isinstance(variant.lam, int | float)
    method = variant.method
    return is_number and variant.lam == 0 and method.has_exact_endpoints


def has_other_config(variant: Variant) -> bool:
    """Whether a merge computes by another config than its base's, so that vLLM has to load it with its own."""
    return variant.companions.config_digest != base_of(variant).companions.config_digest


def rank_of(variant: Variant) -> int:
    """The rank of the adapter that a merge is."""
    return LowRankMerge([variant]).form.rank


def realisation_of(variant: Variant, options: VllmOptions, dtype: str = "float32") -> Literal["base"] | Way:
    """How a variant reaches vLLM, such that it computes what is served.

    An adapter is never rounded to the base's dtype, and a checkpoint always to its own.

    Args:
        variant: Says what is served.
        options: May insist on a way.
        dtype: In which vLLM holds weights, as torch names it.

    Raises:
        GenerationError: not as the options insist, or vLLM does not serve this adapter.
    """
    wanted = options.realisation
    if is_base(variant):
        return "base"
    is_served_as_adapter = variant.served_as == "adapter"
    if has_other_config(variant) and not is_served_as_adapter:
        if wanted in ("auto", "checkpoint"):
            return "checkpoint"
        raise GenerationError(
            f"the engine's option realisation insists on {wanted}, and the merged model's config is not the base's",
            remedy="set it to auto, or take the base's: --config-from base (config_from: base).",
        )
    obstacle = None
    if wanted in ("auto", "adapter"):
        if is_served_as_adapter or served_dtype(variant) == "float32":  # as adapter and in float32 it is one model
            obstacle = _adapter_obstacle(variant, options)
        else:
            obstacle = f"what is measured is a checkpoint, rounded to {served_dtype(variant)}"
        if obstacle is None:
            return "adapter"
        if wanted == "adapter":
            raise GenerationError(
                f"the engine's option realisation insists on an adapter, and there is none: {obstacle}",
                remedy="set it to auto.",
            )
    if is_served_as_adapter and dtype != "float32":
        why = f"vLLM does not serve this adapter: {obstacle}" if obstacle else f"the option realisation is {wanted}"
        raise GenerationError(
            f"{why}; merged into the weights it would be rounded to {dtype}, which is another model than the adapter",
            remedy="measure and write a checkpoint instead (--as checkpoint), or take --engine transformers.",
        )
    if wanted != "checkpoint" and described(as_weights(variant)) is not None:
        return "live"
    if wanted == "live":
        raise GenerationError(
            "the engine's option realisation insists on live weights, and this recipe's inputs are not all folders of "
            "their own, which vLLM's workers could read",
            remedy="set it to auto.",
        )
    return "checkpoint"


def as_weights(variant: Variant) -> Variant:
    """The whole weights that compute what a variant does: of an adapter those of its sum, in float32."""
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
        return f"its rank is {merge.form.rank}, and the engine's option max_lora_rank is {most}"
    return merge.vllm_obstacle


def grouped(requests: Sequence[Request], ways: Sequence[str], beside_adapters: str | None = None) -> list[Together]:
    """What is answered together: a base with its adapters; of all else each variant separately.

    Args:
        requests: What is asked for.
        ways: How each one's variant reaches vLLM, as `realisation_of` says.
        beside_adapters: Fingerprint of the base that a running engine serves next to adapters, if one does.

    Returns:
        Bases one after the other, and of each first its adapters, which need no change of weights.
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
