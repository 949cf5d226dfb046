"""`backmerge diff` as it is typed: verdict first, then what differs, where it changed, and advice."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backmerge.checkpoints.reader import SINGLE
from backmerge.reporting.user_folder import ADDED

Run = Callable[..., tuple[int, str, str]]
Factory = Callable[..., Path]


@pytest.fixture
def child(make_model: Factory, tmp_path: Path) -> tuple[Path, Path]:
    """A bfloat16 base, and a version of it that moved by a hundredth."""
    base = make_model("llama", seed=1, dtype="bfloat16")
    tuned = shutil.copytree(base, tmp_path / "tuned")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: (tensor.float() + 0.002 * torch.randn(tensor.shape, generator=generator)).bfloat16()
        for name, tensor in load_file(base / SINGLE).items()
    }
    save_file(tensors, tuned / SINGLE, metadata={"format": "pt"})
    return base, tuned


def test_related_models_are_reported_with_their_change(child: tuple[Path, Path], run_cli: Run, tmp_path: Path) -> None:
    """The verdict comes first; files hold the same, with exact rounding costs that fall with λ; and advice follows."""
    code, printed, _ = run_cli("diff", *child, "--out", tmp_path / "out")
    assert code == 0
    assert printed.splitlines()[0] == f"{child[1]} was made from {child[0]}."
    for words in ("self_attn.q_proj", "lm_head", "Advice", "--dtype float32", "Written"):
        assert words in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} - {ADDED} == {"diff.json", "diff.png", "diff.html"}
    document = json.loads((tmp_path / "out" / "diff.json").read_text())
    assert document["verdict"] == "child"
    base, tuned = (load_file(side / SINGLE) for side in child)
    for name, row in document["tensors"].items():
        b, t = base[name].double(), tuned[name].double()
        assert row["relative_norm"] == pytest.approx(float((t - b).norm() / b.norm()), rel=1e-5)
        costs = {}
        for lam in (0.2, 0.8):
            merged = b + lam * (t - b)
            costs[lam] = float((merged.bfloat16().double() - merged).norm() / (lam * (t - b)).norm())
            assert row["rounding_costs"][str(lam)] == pytest.approx(costs[lam], rel=0.02)
        assert costs[0.2] > costs[0.8]


def test_json_is_all_of_it(child: tuple[Path, Path], run_cli: Run) -> None:
    """--json prints the document and nothing else; a sample has no rank."""
    code, printed, _ = run_cli("diff", *child, "--json", "--sample", "0.5")
    assert code == 0
    document = json.loads(printed)
    assert document["sample"] == 0.5
    assert document["tensors"]["lm_head.weight"]["effective_rank"] is None


def test_strangers_are_doubted(make_model: Factory, run_cli: Run) -> None:
    """Two models that were made apart are no parent and child; exit 0 all the same, since that was the question."""
    base, other = make_model("llama", seed=1), make_model("llama", seed=2)
    code, printed, _ = run_cli("diff", base, other)
    assert code == 0
    assert "does not look like it was made from" in printed.splitlines()[0]


def test_a_model_is_itself(make_model: Factory, run_cli: Run) -> None:
    """There is nothing to merge."""
    base = make_model("llama", seed=1)
    code, printed, _ = run_cli("diff", base, base)
    assert code == 0
    assert "there is nothing to merge" in printed.splitlines()[0]


def test_other_architectures_are_compared_as_far_as_they_go(make_model: Factory, run_cli: Run) -> None:
    """What a merge refuses, diff shows: tensors on one side only are listed."""
    code, printed, _ = run_cli("diff", make_model("llama", seed=1), make_model("qwen2", seed=1))
    assert code == 0
    assert "q_proj.bias" in printed
    assert "model_type" in printed


def test_an_adapter_is_compared(make_model: Factory, make_adapter: Factory, run_cli: Run) -> None:
    """Its rank shows, and what it leaves alone is unchanged."""
    base = make_model("llama", seed=1, dtype="bfloat16")
    code, printed, _ = run_cli("diff", base, make_adapter(base, seed=1, target_modules=["q_proj"]), "--json")
    assert code == 0
    document = json.loads(printed)
    assert document["tensors"]["model.layers.0.mlp.up_proj.weight"]["unchanged"] == 1
    assert 1 < document["tensors"]["model.layers.0.self_attn.q_proj.weight"]["effective_rank"] <= 4


def test_a_grown_vocabulary_is_listed_with_its_remedy(child: tuple[Path, Path], run_cli: Run) -> None:
    """Rows that were added in tuning are no reason to stop; a merge's option for them is named."""
    base, tuned = child
    tensors = load_file(tuned / SINGLE)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.zeros(3, 32).bfloat16()])
    save_file(tensors, tuned / SINGLE, metadata={"format": "pt"})
    config = json.loads((tuned / "config.json").read_text())
    (tuned / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 3}))
    code, printed, _ = run_cli("diff", base, tuned)
    assert code == 0
    assert "was made from" in printed.splitlines()[0]
    assert "(rows were added)" in printed
    assert "--extra-rows tuned" in printed


def test_an_adapter_is_advised_to_stay_one(make_model: Factory, make_adapter: Factory, run_cli: Run) -> None:
    """Where rounding costs much, an adapter can be merged without any."""
    base = make_model("llama", seed=1, dtype="bfloat16")
    code, printed, _ = run_cli("diff", base, make_adapter(base, seed=1, lora_alpha=0.2))
    assert code == 0
    assert "--as adapter" in printed


def test_names_of_tensors_do_not_move_the_terminal(child: tuple[Path, Path], run_cli: Run, tmp_path: Path) -> None:
    """Control sequences in what others named are shown as signs, on the terminal and in the page."""
    base, tuned = (shutil.copytree(side, tmp_path / f"evil-{side.name}") for side in child)
    for side in (base, tuned):
        tensors = load_file(side / SINGLE)
        tensors["model.layers.0.\x1b[2J<script>.weight"] = torch.randn(4) * (1 + (side is tuned))
        tensors[f"only\x1b]0;{side.name}\x07"] = torch.zeros(2)
        save_file(tensors, side / SINGLE, metadata={"format": "pt"})
    code, printed, said = run_cli("diff", base, tuned, "--out", tmp_path / "out")
    assert code == 0
    page = (tmp_path / "out" / "diff.html").read_text()
    for text in (printed, said, page):
        assert "\x1b" not in text
        assert "\x07" not in text
    assert "<script" not in page
    assert "\u241b[2J" in printed


@pytest.mark.parametrize("options", [["--lam", "2"], ["--sample", "0"], ["--dtype", "int8"], ["--lam", "x"]])
def test_wrong_options_are_named(child: tuple[Path, Path], run_cli: Run, options: list[str]) -> None:
    """Exit 2, with what would be right."""
    code, _, said = run_cli("diff", *child, *options)
    assert code == 2
    assert options[0] in said
