"""A merge is asked with the files that are written next to it: its config, tokenizer and chat template."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from backmerge.checkpoints.reader import Checkpoint
from backmerge.generation.protocol import EngineSettings, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.merging.recipe import Variant
from backmerge.merging.to_disk import write_merged
from backmerge.records import Example, Message

TEMPLATE = "{% for message in messages %}TUNED {{ message['content'] }}{% endfor %}"
ASKED = [Example("1", (Message("user", "kite"),))]


def test_each_variant_is_asked_with_its_own_files(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Law 5: live and written merges have one config and one prompt; the base keeps its own, before and after."""
    base = make_model("llama", seed=1)
    tuned = shutil.copytree(make_model("llama", seed=2), tmp_path / "tuned")
    config = json.loads((tuned / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 50.0}
    (tuned / "config.json").write_text(json.dumps(config))
    (tuned / "chat_template.jinja").write_text(TEMPLATE)
    variant = Variant(Checkpoint(base), Checkpoint(tuned), lam=0.5)
    engine = TransformersEngine(EngineSettings(device="cpu"))
    own = Variant(variant.base)

    def asked(model: Variant) -> tuple[str, torch.Tensor]:
        (completion,) = engine.generate(model, ASKED, Sampling(max_new_tokens=2), lambda _: None)
        with torch.no_grad():
            return completion.prompt, engine.model(torch.arange(5, 40)[None]).logits

    prompt, before = asked(own)
    assert "TUNED" not in prompt
    prompt, merged = asked(variant)
    assert prompt == "TUNED kite"
    write_merged(variant, tmp_path / "out")
    with torch.no_grad():
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(5, 40)[None]).logits
    assert torch.equal(merged, written)
    prompt, after = asked(own)
    assert "TUNED" not in prompt
    assert torch.equal(before, after)
    assert variant.identity != Variant(variant.base, variant.tuned, lam=0.5, tokenizer_from="base").identity
