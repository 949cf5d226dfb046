"""The architectures that people merge: full checkpoints and LoRAs, against transformers' and peft's own results."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from architectures import ARCHITECTURES, PAGE, Architecture, page_with_table
from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import Checkpoint
from backmerge.merging.live import LiveMerge
from backmerge.merging.lowrank import adapter_obstacle, write_adapter
from backmerge.merging.recipe import Variant
from backmerge.merging.to_disk import write_merged

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",  # peft asks by the old name
    "ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning",
)
IDS = [architecture.name for architecture in ARCHITECTURES]
WITH_EXPERTS = [architecture for architecture in ARCHITECTURES if architecture.experts]
TOKENS = torch.tensor([[1, 8, 9, 10, 11, 12, 13, 14]])

# Logits of W + scale·B·A against those of W and B·A applied one after the other, in float32: sums over at most 48
# products in each layer, each rounded at 2^-24, on values of about 1.
LOGITS = {"rtol": 1e-4, "atol": 2e-5}


class Made(NamedTuple):
    """A row's models on disk."""

    base: Path
    tuned: Path


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Architecture], Made]:
    """A base and a full checkpoint that was tuned from it."""
    made: dict[str, Made] = {}

    def build(architecture: Architecture) -> Made:
        if architecture.name not in made:
            folder = tmp_path_factory.mktemp("architecture")
            model = architecture.random_model()
            model.save_pretrained(folder / "base")
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(3)
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.02)
            model.save_pretrained(folder / "tuned")
            made[architecture.name] = Made(folder / "base", folder / "tuned")
        return made[architecture.name]

    return build


def loaded(folder: Path) -> Any:
    """A model as transformers loads it, in float32, with each of its tensors from the file."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.eval()


def logits(model: Any) -> Tensor:
    """Of the last position of a few tokens."""
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=IDS)
def test_full_checkpoints(architecture: Architecture, make: Callable[[Architecture], Made], tmp_path: Path) -> None:
    """At λ=0.25 each tensor in memory is (1 - λ)·base + λ·tuned; live weights, if they are possible, are the same."""
    made = make(architecture)
    base = Checkpoint(made.base)
    variant = Variant(base, Checkpoint(made.tuned), lam=0.25)
    write_merged(variant, tmp_path / "merged")
    merged = loaded(tmp_path / "merged")
    ours, first, second = (dict(model.state_dict()) for model in (merged, loaded(made.base), loaded(made.tuned)))
    for name, tensor in ours.items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, torch.lerp(first[name], second[name], 0.25)), name
        assert not torch.equal(first[name], second[name]) or not tensor.is_floating_point(), name
    live = loaded(made.base)
    assert type(live).__name__ == architecture.class_name
    sweep = LiveMerge(live, base)
    assert sweep.is_possible() is architecture.is_live
    if architecture.is_live:
        sweep.set(variant)
        assert torch.equal(logits(live), logits(merged))


def adapter_of(base: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """A LoRA with random factors, as peft writes it."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(2)
        defaults = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        adapted = get_peft_model(loaded(base), LoraConfig(**{**defaults, **settings}))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(folder)
    return folder


def check_adapter(base_folder: Path, adapter: Path, folder: Path) -> int:
    """Compare ours at λ=1 with peft's merge and its live model; gives how many tensors in memory are changed."""
    from peft import PeftModel

    base = Checkpoint(base_folder)
    write_merged(Variant(base, AdapterOnBase(adapter, base), lam=1.0), folder)
    merged = loaded(folder)
    live = PeftModel.from_pretrained(loaded(base_folder), str(adapter)).eval()
    torch.testing.assert_close(logits(merged), logits(live), **LOGITS)
    theirs, before = dict(live.merge_and_unload().state_dict()), dict(loaded(base_folder).state_dict())
    ours = dict(merged.state_dict())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), (name, float((tensor - theirs[name]).abs().max()))
    return sum(not torch.equal(tensor, before[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=IDS)
def test_lora(architecture: Architecture, make: Callable[[Architecture], Made], tmp_path: Path) -> None:
    """A LoRA of peft's is at λ=1 what peft's merge_and_unload gives, bit for bit, and what its live model answers."""
    base = make(architecture).base
    adapter = adapter_of(base, tmp_path / "adapter", dict(architecture.lora))
    assert check_adapter(base, adapter, tmp_path / "merged") >= 4


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=IDS)
def test_a_merge_as_an_adapter(
    architecture: Architecture, make: Callable[[Architecture], Made], tmp_path: Path
) -> None:
    """A LoRA merged to a LoRA is loaded by peft, by the names in memory, and answers as the merged checkpoint does."""
    from peft import PeftModel

    folder = make(architecture).base
    base = Checkpoint(folder)
    adapter = AdapterOnBase(adapter_of(folder, tmp_path / "adapter", dict(architecture.lora)), base)
    half = Variant(base, adapter, lam=0.5)
    write_adapter(half, tmp_path / "half")
    write_merged(half, tmp_path / "merged")
    live = PeftModel.from_pretrained(loaded(folder), str(tmp_path / "half")).eval()
    torch.testing.assert_close(logits(live), logits(loaded(tmp_path / "merged")), **LOGITS)
    assert not torch.allclose(logits(live), logits(loaded(folder)), **LOGITS)


@pytest.mark.parametrize("architecture", WITH_EXPERTS, ids=[architecture.name for architecture in WITH_EXPERTS])
def test_lora_on_stacked_experts(
    architecture: Architecture, make: Callable[[Architecture], Made], tmp_path: Path
) -> None:
    """So is one that adapts stacked experts (target_parameters), next to other layers."""
    base = make(architecture).base
    settings = {**architecture.lora, "target_parameters": list(architecture.experts)}
    adapter = adapter_of(base, tmp_path / "adapter", settings)
    assert check_adapter(base, adapter, tmp_path / "merged") >= 4 + 2 * len(architecture.experts)
    weights = Checkpoint(base)
    obstacle = adapter_obstacle(Variant(weights, AdapterOnBase(adapter, weights), lam=0.5))
    assert obstacle is not None
    assert "stacked experts" in obstacle


@pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning")
def test_an_adapter_on_each_expert_apart(make: Callable[[Architecture], Made], tmp_path: Path) -> None:
    """One that was trained before transformers stacked the experts is merged by the names on disk.

    peft converts it as it loads it: the live model answers as ours does.
    """
    from peft import PeftModel

    folder = make(next(one for one in ARCHITECTURES if one.name == "Qwen3-MoE")).base
    base = Checkpoint(folder)
    targets = ["down_proj", "gate_proj", "up_proj"]
    generator = torch.Generator().manual_seed(5)
    factors = {}
    for name in (name for name in base.infos if "experts." in name):
        rows, columns = base.infos[name].shape
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{module}.lora_A.weight"] = torch.randn(4, columns, generator=generator) * 0.1
        factors[f"{module}.lora_B.weight"] = torch.randn(rows, 4, generator=generator) * 0.1
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": targets}
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    write_merged(Variant(base, AdapterOnBase(tmp_path / "adapter", base), lam=1.0), tmp_path / "merged")
    live = PeftModel.from_pretrained(loaded(folder), str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), logits(live), **LOGITS)
    assert not torch.allclose(logits(live), logits(loaded(folder)), **LOGITS)


def test_the_documented_table_is_made_of_these_rows() -> None:
    """A row that is added, or says something else, is written to the page by `python tests/architectures.py`."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == page_with_table(page)
