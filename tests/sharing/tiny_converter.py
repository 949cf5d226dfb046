"""Stands in for llama.cpp's convert_hf_to_gguf.py in tests: the same command line, for Llama models in float32."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file


def permuted(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order that llama.cpp's rotary embedding takes them in."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def vocabulary(model: Path) -> list[str]:
    """The tokens by their number; transformers, which would tell, takes seconds to import."""
    values = json.loads((model / "tokenizer.json").read_text())
    numbers = {**values["model"]["vocab"], **{token["content"]: token["id"] for token in values["added_tokens"]}}
    return sorted(numbers, key=lambda token: numbers[token])


def main() -> None:
    """Write the model's tensors, its vocabulary and its chat template."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--outtype", required=True)
    parser.add_argument("--outfile", required=True)
    arguments = parser.parse_args()
    assert arguments.outtype == "f32"
    config = json.loads((arguments.model / "config.json").read_text())
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    key_heads = config.get("num_key_value_heads", heads)
    tokens = vocabulary(arguments.model)
    tokens += [f"[{i}]" for i in range(len(tokens), config["vocab_size"])]
    writer = gguf.GGUFWriter(arguments.outfile, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config.get("rope_parameters", {}).get("rope_theta", 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_chat_template((arguments.model / "chat_template.jinja").read_text())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    for file in sorted(arguments.model.glob("*.safetensors")):
        for name, weight in load_file(file).items():
            rotated = {"q_proj": heads, "k_proj": key_heads}.get(name.split(".")[-2])
            written = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(str(written), np.ascontiguousarray(permuted(weight, rotated) if rotated else weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
