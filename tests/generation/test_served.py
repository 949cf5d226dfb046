"""What is measured is what is served: an adapter on a bfloat16 base gives peft's answers, a checkpoint its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import ConfigError, MergeError
from backmerge.generation import verification
from backmerge.generation.protocol import EngineSettings, Sampling, realised
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.generation.verification import verify_written
from backmerge.merging import lowrank, rounding, served
from backmerge.merging.recipe import Variant
from backmerge.merging.served import as_given, in_form, is_written, opened, write_served
from backmerge.merging.to_disk import write_merged
from backmerge.records import Example, Message
from quiet_peft import without_peft_warnings

Factory = Callable[..., Path]
Pair = tuple[Checkpoint, AdapterOnBase]
EXAMPLES = [Example(f"e{i}", (Message("user", f"How do I mend kite {i}?"),)) for i in range(24)]
SAMPLING = Sampling(max_new_tokens=12)
LAM = 0.1


@pytest.fixture
def pair(make_model: Factory, make_adapter: Factory) -> Pair:
    """A base in bfloat16, and a LoRA on it in float32 whose change is small against the base's rounding steps."""
    base = Checkpoint(make_model("llama", seed=3, tied=True, dtype="bfloat16"))
    return base, AdapterOnBase(make_adapter(base.directory, seed=1, lora_alpha=1), base)


def engine(**settings: Any) -> TransformersEngine:
    """The engine on the CPU, in float32 unless told otherwise."""
    return TransformersEngine(EngineSettings(device="cpu", **settings))


def answers(found: TransformersEngine, variant: Variant) -> list[str]:
    """What the engine answers with a variant."""
    return [completion.text for completion in found.generate(variant, EXAMPLES, SAMPLING, lambda _: None)]


def peft_answers(base: Path, adapter: Path, share: float, dtype: torch.dtype = torch.float32) -> list[str]:
    """What transformers and peft answer, with nothing of ours, one prompt at a time; greedy."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    with without_peft_warnings():
        model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter).eval()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(share)
    found = []
    for example in EXAMPLES:
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": example.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        made = model.generate(**asked, max_new_tokens=SAMPLING.max_new_tokens, do_sample=False)
        found.append(tokenizer.decode(made[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("lam", [1.0, LAM])
def test_an_adapter_answers_as_peft_serves_it(pair: Pair, lam: float) -> None:
    """Greedy answers in float32 are those of peft, at λ=1 from the user's files and elsewhere from live weights."""
    base, adapter = pair
    variant = as_given(Variant(base, adapter)) if lam == 1 else in_form(Variant(base, adapter, lam=lam))
    ours = engine()
    assert realised(ours, variant)._asdict() == {
        "served_as": "adapter",
        "dtype": "float32",
        "reached_as": "adapter" if lam == 1 else "live",
        "computed_in": "float32",
    }
    assert answers(ours, variant) == peft_answers(base.directory, adapter.directory, lam)


def test_the_rounded_checkpoint_is_another_model(pair: Pair) -> None:
    """Where rounding loses most of the change, the checkpoint's answers are not the adapter's, and both are told."""
    base, adapter = pair
    ours = engine()
    as_adapter = in_form(Variant(base, adapter, lam=LAM))
    as_checkpoint = in_form(Variant(base, adapter, lam=LAM), "checkpoint")
    assert as_adapter.identity != as_checkpoint.identity  # no answer of the one is treated as one of the other
    assert realised(ours, as_checkpoint)[:3] == ("checkpoint", "bfloat16", "live")
    assert answers(ours, as_checkpoint) != answers(ours, as_adapter)
    exact = replace(as_checkpoint, dtype="F32")
    assert answers(ours, exact) == answers(ours, as_adapter)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_written_model_answers_as_the_measured_one(pair: Pair, tmp_path: Path, dtype: str) -> None:
    """Files, loaded as a user would, give the answers of the sweep: of an adapter, and of a rounded checkpoint."""
    base, adapter = pair
    for form in ("adapter", "checkpoint"):
        variant = in_form(Variant(base, adapter, lam=0.4), form)  # type: ignore[arg-type]
        write_served(variant, tmp_path / form)
        written = opened(tmp_path / form, base)
        assert written.served_as == form
        assert is_written(tmp_path / form, variant)
        assert not is_written(tmp_path / form, in_form(Variant(base, adapter, lam=0.5), form))  # type: ignore[arg-type]
        measured, loaded = answers(engine(dtype=dtype), variant), answers(engine(dtype=dtype), written)
        assert measured == loaded, form
    if dtype == "float32":
        assert answers(engine(), opened(tmp_path / "adapter", base)) == peft_answers(
            base.directory, tmp_path / "adapter", 1.0
        )


def test_one_engine_turns_from_form_to_form(pair: Pair) -> None:
    """An adapter that was put on and taken off leaves the base as it was, bit for bit."""
    base, adapter = pair
    ours = engine()
    order = [
        Variant(base),
        as_given(Variant(base, adapter)),
        in_form(Variant(base, adapter, lam=LAM)),
        in_form(Variant(base, adapter, lam=LAM), "checkpoint"),
    ]
    alone = [answers(engine(), variant) for variant in order]
    assert [answers(ours, order[place]) for place in (1, 0, 2, 1, 3, 1, 0)] == [
        alone[place] for place in (1, 0, 2, 1, 3, 1, 0)
    ]


def test_merge_of_checkpoints_cannot_be_an_adapter(make_model: Factory) -> None:
    """`auto` takes the checkpoint, and an adapter that is insisted on is refused with the way out."""
    base, tuned = (Checkpoint(make_model("llama", seed=seed, tied=True)) for seed in (1, 2))
    assert in_form(Variant(base, tuned, lam=0.5)).served_as == "checkpoint"
    with pytest.raises(ConfigError, match="cannot be an adapter") as caught:
        in_form(Variant(base, tuned, lam=0.5), "adapter")
    assert "checkpoint" in (caught.value.remedy or "")


@pytest.mark.parametrize("form", ["adapter", "checkpoint"])
@pytest.mark.parametrize("lam", [1.0, 0.4])
def test_a_right_merge_is_verified(
    pair: Pair, tmp_path: Path, form: Any, lam: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters and checkpoints rounded to bfloat16 have the logits of transformers and peft."""
    base, adapter = pair
    write_served(in_form(Variant(base, adapter, lam=lam), form), tmp_path / "out", verify=verify_written)
    assert (tmp_path / "out").is_dir()
    assert "Verified" in capsys.readouterr().err


def test_a_wrong_checkpoint_is_not_left_there(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that is a quarter of peft's, as of an adapter misread, ends in an error and no output."""
    base, adapter = pair
    monkeypatch.setattr(
        AdapterOnBase,
        "block",
        lambda _, name, start, stop, buffer=None: base.block(name, start, stop, buffer),
    )
    with pytest.raises(MergeError, match="is not the merge"):
        write_merged(Variant(base, adapter, lam=0.9), tmp_path / "out", verify=verify_written)
    assert not list(tmp_path.iterdir())


def test_a_wrong_adapter_is_not_left_there(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for an adapter that is written."""
    base, adapter = pair
    scaled = lowrank.scaled
    monkeypatch.setattr(lowrank, "scaled", lambda *given: 4 * scaled(*given))
    with pytest.raises(MergeError, match="is not the merge"):
        lowrank.write_adapter(Variant(base, adapter, lam=0.9), tmp_path / "out", verify=verify_written)
    assert not list(tmp_path.iterdir())


def test_merge_verifies_an_adapter_by_default(
    pair: Pair,
    tmp_path: Path,
    run_cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`backmerge merge BASE LORA` says that it compared, and how much of the change the checkpoint holds."""
    monkeypatch.setattr(rounding, "LEAST_SAMPLE", 1)  # of this model one element in a hundred is too few otherwise
    base, adapter = pair
    models = (base.directory, adapter.directory)
    code, _, told = run_cli("merge", *models, "--lam", LAM, "--out", tmp_path / "a")
    assert (code, "Verified" in told) == (0, True)
    assert "of the change survived rounding to bfloat16" in told
    assert "Warning" in told
    assert "--as adapter" in told
    code, _, told = run_cli("merge", *models, "--lam", LAM, "--no-verify", "--as", "adapter", "--out", tmp_path / "b")
    assert (code, "Verified" in told) == (0, False)
    card = json.loads((tmp_path / "b" / "backmerge.json").read_text())
    assert card["realisation"] == "adapter"


def test_a_merge_that_memory_cannot_verify_loads_nothing_for_it(
    pair: Pair,
    tmp_path: Path,
    run_cli: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It says so at once: an adapter of a large model's size takes under a second, and transformers takes longer."""
    base, adapter = pair
    monkeypatch.setattr(served, "_free_memory", lambda: 0.0)
    monkeypatch.setattr(verification, "verify_written", None)
    code, _, told = run_cli("merge", base.directory, adapter.directory, "--as", "adapter", "--out", tmp_path / "a")
    assert (code, "Not verified against peft" in told) == (0, True)
    verify_written(tmp_path / "a", Variant(base, adapter))  # nor does it load anything where it is asked to
