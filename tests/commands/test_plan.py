"""`backmerge plan`: the cheapest exact form, and what rounding would cost, with nothing written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import SINGLE, Checkpoint
from backmerge.merging.method import find_method
from backmerge.merging.recipe import Variant
from backmerge.merging.served import checkpoint_bytes, plan

Factory = Callable[..., Path]


def test_the_cheapest_exact_way(make_model: Factory, make_adapter: Factory) -> None:
    """A LoRA by Linear is an adapter; by SLERP, or of checkpoints, it is live; what takes neither gets a checkpoint."""
    base = Checkpoint(make_model("llama", seed=1, dtype="bfloat16"))
    lora = AdapterOnBase(make_adapter(base.directory, seed=1), base)
    full = Checkpoint(make_model("llama", seed=2, dtype="bfloat16"))
    found = plan(Variant(base, lora))
    assert found.realisation == "adapter"
    assert found.num_bytes == sum(4 * info.num_elements for info in lora.file.infos.values())
    assert plan(Variant(base, lora, find_method("slerp"))).realisation == "live"
    assert plan(Variant(base, full)).realisation == "live"
    assert plan(Variant(base, lora), takes=("checkpoint",)).realisation == "checkpoint"
    assert "not supported here" in plan(Variant(base, lora), takes=("live", "checkpoint")).reason
    written = plan(Variant(base, full, dtype="F32"), takes=("adapter", "checkpoint"))
    assert (written.realisation, written.num_bytes) == (
        "checkpoint",
        4 * sum(i.num_elements for i in base.infos.values()),
    )
    assert checkpoint_bytes(Variant(base, full)) == sum(info.length for info in base.infos.values())


def test_plan_is_printed(
    make_model: Factory, make_adapter: Factory, run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Ways, sizes, relation and rounding, and the remedy where rounding costs much; nothing is written."""
    base = make_model("llama", seed=1, dtype="bfloat16")
    code, printed, said = run_cli("plan", base, make_adapter(base, seed=1), "--lam", "0.2,0.6")
    assert code == 0, said
    assert "cheapest exact form: adapter" in printed
    assert "2 in one pass" in printed
    assert "at λ = 0.2" in printed
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.layers.0.weight": torch.randn(500, 1000, generator=generator).bfloat16()}
    moved = {n: (w.float() + 0.01 * torch.randn(w.shape, generator=generator)).bfloat16() for n, w in tensors.items()}
    for name, side in (("base", tensors), ("tuned", moved)):
        (tmp_path / name).mkdir()
        save_file(side, tmp_path / name / SINGLE)
        (tmp_path / name / "config.json").write_text("{}")
    code, printed, _ = run_cli("plan", tmp_path / "base", tmp_path / "tuned", "--lam", "0.2")
    assert code == 0
    assert "cheapest exact form: live" in printed
    assert "→ --dtype float32 keeps it" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]


@pytest.mark.parametrize("options", [["--dtype", "int8"], ["--method", "model_stock", "--lam", "0.3"]])
def test_impossible_plan_is_refused(
    make_model: Factory, run_cli: Callable[..., tuple[int, str, str]], options: list[str]
) -> None:
    """The same refusals as of a merge."""
    code, _, said = run_cli("plan", make_model("llama", seed=1), make_model("llama", seed=2), *options)
    assert code == 2
    assert "→" in said
