"""evaluate, check and restore on a bfloat16 base and a LoRA: one model, the same answers, and the same files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file, save_file

from backmerge.checkpoints.adapter import AdapterOnBase, is_adapter
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory

Factory = Callable[..., Path]
Cli = Callable[..., tuple[int, str, str]]
ASKED = ("--judge", "demo-rule", "--limit", "40", "--max-new-tokens", "12", "--device", "cpu", "--no-cache")
SETS = ("--safety", "demo-harmful", "--utility", "demo-plans")


class Models(NamedTuple):
    """The demonstration's base in bfloat16, and a LoRA on it that changes its answers."""

    base: Path
    lora: Path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, make_adapter: Factory) -> Models:
    """Made once."""
    base = tmp_path_factory.mktemp("served") / "base"
    base.mkdir()
    for file in model_directory().iterdir():
        if file.is_file() and file.suffix in {".json", ".jinja"}:
            (base / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model_directory() / "model.safetensors")
    save_file({n: t.bfloat16() for n, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return Models(base, make_adapter(base, seed=5, lora_alpha=2))


def completions(run: Path, **wanted: str) -> dict[str, str]:
    """Answers of a run by example."""
    rows = [json.loads(line) for line in (run / "records" / "completions.jsonl").read_text().splitlines()]
    return {
        f"{row['benchmark']}/{row['example']}": row["text"]
        for row in rows
        if all(row[key] == value for key, value in wanted.items())
    }


def test_evaluate_and_check_measure_the_adapter_itself(models: Models, tmp_path: Path, run_cli: Cli) -> None:
    """Both name the form, and give the same answers."""
    code, _, told = run_cli("evaluate", models.lora, "--base", models.base, *SETS, *ASKED, "--out", tmp_path / "e")
    assert code == 0, told
    found = json.loads((tmp_path / "e" / "results.json").read_text())["realisations"]
    assert [(row["served_as"], row["reached_as"]) for row in found] == [("adapter", "adapter")]
    code, _, told = run_cli("check", models.lora, "--against", models.base, *SETS, *ASKED, "--out", tmp_path / "c")
    assert code == 0, told
    evaluated, checked = completions(tmp_path / "e"), completions(tmp_path / "c", model="model")
    assert evaluated
    assert evaluated == checked


@pytest.mark.parametrize("form", ["auto", "checkpoint"])
def test_restore_confirms_and_writes_the_form_that_it_measured(
    models: Models, tmp_path: Path, run_cli: Cli, form: str
) -> None:
    """The merged models are adapters unless a checkpoint is asked for; the confirmation is of the files."""
    out = tmp_path / "r"
    code, printed, told = run_cli(
        "restore",
        models.base,
        models.lora,
        *SETS,
        *ASKED,
        "--lam",
        "0.05",
        "--as",
        form,
        "--margin",
        "0.9",
        "--out",
        out,
    )
    assert code == 0, told
    results = json.loads((out / "results.json").read_text())
    assert results["merged"], results["choice"]["reason"]
    (row,) = results["merged"]
    served_as = "adapter" if form == "auto" else "checkpoint"
    assert (row["served_as"], row["dtype"]) == (served_as, "float32" if form == "auto" else "bfloat16")
    assert is_adapter(out / row["directory"]) is (form == "auto")
    ways = {
        (r["model"].partition("/")[0], r["split"]): (r["served_as"], r["reached_as"]) for r in results["realisations"]
    }
    assert ways[row["point"], "selection"] == (served_as, "live")
    assert ways[row["point"], "confirmation"] == (served_as, "adapter" if form == "auto" else "base")
    assert ways["tuned", "confirmation"] == ("adapter", "adapter")
    if form == "checkpoint":
        assert row["rounding_loss"] > 0.1  # most of so small a change is lost to bfloat16
        assert "survived rounding to bfloat16" in printed
        assert "survived rounding to bfloat16" in (out / "report.html").read_text()
        return
    adapter = AdapterOnBase(out / row["directory"], Checkpoint(models.base))
    assert adapter.factors
    card = (out / row["directory"] / "README.md").read_text() if row["confirmed"] else "PeftModel"
    assert "PeftModel" in card
