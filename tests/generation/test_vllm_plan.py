"""Options of the engine vllm, how a variant reaches it, and what is asked together."""

from __future__ import annotations

from typing import Any

import pytest

from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import ConfigError, GenerationError
from backmerge.generation.completing import check_lengths, cut_at_end
from backmerge.generation.protocol import Request
from backmerge.generation.vllm_plan import VllmOptions, grouped, is_base, realisation_of
from backmerge.generation.vllm_worker import described, variant_of
from backmerge.merging.method import find_method
from backmerge.merging.recipe import Variant
from backmerge.records import Example, Message
from generation.vllm_cases import EXAMPLES, GREEDY, moved


@pytest.fixture(scope="module")
def full(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tuned checkpoint in which every tensor changed, embeddings too."""
    return Checkpoint(moved(base, tmp_path_factory.mktemp("full") / "model", 0.3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gpu_memory_utilisation": 0.5},
            "unknown key 'gpu_memory_utilisation'; did you mean 'gpu_memory_utilization'",
        ),
        ({"gpu_memory_utilization": 1.5}, "'gpu_memory_utilization'"),
        ({"max_lora_rank": 24}, "'max_lora_rank'"),
        ({"realisation": "magic"}, "'realisation'"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    """A misspelt or impossible option is an error that names it, before anything is loaded."""
    with pytest.raises(ConfigError, match=r"engine\.options of vllm") as caught:
        VllmOptions.read(options)
    assert message in str(caught.value)


@pytest.mark.parametrize(("rank", "taken"), [(1, 8), (8, 8), (9, 16), (33, 64), (129, 256), (257, 320), (512, 512)])
def test_the_kernels_rank_is_the_next_that_vllm_has(rank: int, taken: int) -> None:
    """An adapter's rank is rounded up to a size that vLLM takes."""
    assert VllmOptions().adapter_arguments(rank, 1)["max_lora_rank"] == taken


def test_adapters_in_one_batch() -> None:
    """All that are asked for together, at most 16, or what is said."""
    assert [VllmOptions().adapter_arguments(8, count)["max_loras"] for count in (0, 5, 40)] == [1, 5, 16]
    assert VllmOptions(max_loras=2).adapter_arguments(8, 5)["max_loras"] == 2


def test_what_vllm_is_started_with() -> None:
    """Eager and with a small cache on a CPU; on a GPU vLLM decides; what is set is passed on."""
    on_cpu, on_gpu = VllmOptions().start_arguments("cpu"), VllmOptions().start_arguments("cuda")
    assert (on_cpu["enforce_eager"], on_cpu["kv_cache_memory_bytes"]) == (True, 4 * 2**30)
    assert on_gpu == {"gpu_memory_utilization": 0.9, "tensor_parallel_size": 1, "enforce_eager": False}
    given = VllmOptions(max_model_len=512, max_num_seqs=3, enforce_eager=False, kv_cache_gb=0.5).start_arguments("cpu")
    assert given["max_model_len"] == 512
    assert given["max_num_seqs"] == 3
    assert given["enforce_eager"] is False
    assert given["kv_cache_memory_bytes"] == 2**29


def test_realisations(base: Checkpoint, adapter: Any, wide_adapter: Any, full: Checkpoint, make_adapter: Any) -> None:
    """A low-rank merge is an adapter, λ=0 of an exact method the base, and all else live weights."""

    def way(variant: Variant, **options: Any) -> str:
        return realisation_of(variant, VllmOptions(**options))

    linear = Variant(base, adapter, lam=0.4)
    assert way(Variant(base)) == way(linear.at(0.0)) == way(Variant(base, full, lam=0)) == "base"
    assert (
        way(linear)
        == way(linear.at(1.0))
        == way(Variant(base, [adapter, wide_adapter], find_method("model_stock")))
        == "adapter"
    )
    assert way(linear.at({"mlp": 0.0, "rest": 0.0})) == "adapter"  # a table is not looked into
    assert way(Variant(base, adapter, find_method("slerp"), 0.4)) == way(Variant(base, full, lam=0.4)) == "live"
    assert way(Variant(base, adapter, find_method("task_arithmetic"), 0.0)) == "adapter"  # its λ=0 is not bit for bit
    assert way(Variant(base, dtype="BF16")) == "live"  # rounded: not the base itself
    assert way(linear, realisation="live") == "live"
    assert way(linear, realisation="checkpoint") == way(Variant(base, full), realisation="checkpoint") == "checkpoint"
    assert way(Variant(base, wide_adapter, lam=0.4), max_lora_rank=8) == "live"
    whole = open_weights(make_adapter(base.directory, modules_to_save=["norm"]), base)
    assert way(Variant(base, whole, lam=0.4)) == "live"  # vLLM serves no tensors that were trained whole
    with pytest.raises(GenerationError, match=r"is adapter, but there is none: .*full checkpoint"):
        way(Variant(base, full), realisation="adapter")


def test_what_cannot_be_described_is_written(base: Checkpoint, full: Checkpoint) -> None:
    """Weights that are no folder of their own, and parameters that are not plain data, go by way of a checkpoint."""

    class Filtered(Checkpoint):
        """Weights that are not what their folder holds."""

    other = Variant(base, Filtered(full.directory), lam=0.4)
    odd = Variant(base, full, find_method("ties"), parameters={"density": {0.5}})
    assert described(other) is described(odd) is None
    assert realisation_of(other, VllmOptions()) == "checkpoint"
    with pytest.raises(GenerationError, match="is live, but"):
        realisation_of(other, VllmOptions(realisation="live"))


def test_a_described_variant_is_the_variant(base: Checkpoint, adapter: Any, full: Checkpoint) -> None:
    """What a worker makes of a description has the identity of what was described."""
    import json

    for variant in (
        Variant(base),
        Variant(base, adapter, lam=0.3),
        Variant(
            base, full, find_method("slerp"), {"mlp": 0.3, "rest": 0.5}, dtype="BF16", rounding="stochastic", seed=7
        ),
        Variant(base, [adapter, full], find_method("ties"), parameters={"density": 0.5, "weight": [0.3, 0.7]}),
        Variant(base, full, find_method("resta"), extra={"unaligned": base}),
    ):
        text = described(variant)
        assert text is not None
        assert variant_of(json.loads(text)).identity == variant.identity


def test_grouping(base: Checkpoint, adapter: Any, full: Checkpoint) -> None:
    """A base goes with its adapters, before what needs other weights; live variants one by one; bases in order."""
    other = Checkpoint(full.directory)
    variants = [
        Variant(base, full, lam=0.5),
        Variant(base, adapter, lam=0.0),
        Variant(base, adapter, lam=0.5),
        Variant(other),
        Variant(base, full, lam=0.5),
        Variant(base, full, lam=0.7),
        Variant(base),
    ]
    requests = [Request(variant, EXAMPLES[:1], GREEDY) for variant in variants]
    ways = [realisation_of(variant, VllmOptions()) for variant in variants]

    def shown(**beside: str) -> list[tuple[str, list[int]]]:
        return [(group.way, list(group.requests)) for group in grouped(requests, ways, **beside)]

    assert shown() == [("adapter", [1, 2, 6]), ("live", [0, 4]), ("live", [5]), ("live", [3])]
    assert shown(beside_adapters=other.fingerprint)[-1] == ("adapter", [3])
    without = [request for request, way in zip(requests, ways, strict=True) if way != "adapter"]
    found = grouped(without, [way for way in ways if way != "adapter"])
    assert [(group.way, list(group.requests)) for group in found] == [
        ("live", [0, 3]),
        ("live", [1, 5]),
        ("live", [4]),
        ("live", [2]),
    ]


def test_only_an_exact_zero_is_the_base(base: Checkpoint, adapter: Any, full: Checkpoint) -> None:
    """Rounding, other numbers than λ=0, tables and methods without exact endpoints are merged."""
    assert is_base(Variant(base))
    assert is_base(Variant(base, full, find_method("slerp"), 0))
    for merged in (
        Variant(base, adapter, lam=1e-9),
        Variant(base, adapter, find_method("task_arithmetic"), 0.0),
        Variant(base, full, lam=0.0, dtype="F16"),
        Variant(base, full, lam={"rest": 0.0}),
    ):
        assert not is_base(merged)


def test_an_answer_is_cut_at_its_first_end() -> None:
    """The end token is kept and counted; without one the answer is not finished."""
    assert cut_at_end([5, 6, 2, 7, 2], {2, 3}) == ([5, 6, 2], True)
    assert cut_at_end([3], {2, 3}) == ([3], True)
    assert cut_at_end([5, 6], {2}) == ([5, 6], False)
    assert cut_at_end([], {2}) == ([], False)


def test_a_prompt_must_leave_room_for_an_answer() -> None:
    """A prompt of the context's size is named by its id; one token less is enough."""
    secret = Example("too-long", (Message("user", "SECRET"),))
    check_lengths([secret], [[1] * 7], 8)
    check_lengths([secret], [[1] * 700], None)
    with pytest.raises(GenerationError, match=r"'too-long' has 8 tokens, but the model's context is 8") as caught:
        check_lengths([secret], [[1] * 8], 8)
    assert "SECRET" not in str(caught.value)
