"""The architectures that are tested, each as a tiny random model: one row makes one, and says what works on it.

The table of `docs/architectures.md` is made of these rows: `python tests/architectures.py` writes it again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs/architectures.md"

SIZES: Mapping[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: Mapping[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Architecture:
    """One row.

    Attributes:
        name: For people.
        config: Its class in transformers.
        settings: Of the tiny model.
        model: Its class in transformers, unless it is the causal language model of the config.
        lora: Settings of peft's `LoraConfig`; all linear layers by default.
        experts: Parameters of stacked experts that are adapted, too, in a second adapter.
        names: How its tensors on disk are to those in memory.
        is_live: Whether its weights can be overwritten in memory, so that a sweep over λ needs no files.
    """

    name: str
    config: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    lora: Mapping[str, Any] = field(default_factory=dict)
    experts: tuple[str, ...] = ()
    names: str = "the same"
    is_live: bool = True

    @property
    def class_name(self) -> str:
        """Of the model in transformers."""
        if self.model is not None:
            return self.model
        head = "LMHeadModel" if self.config == "GPT2Config" else "ForCausalLM"
        return self.config.removesuffix("Config").removesuffix("Text") + head

    def random_model(self, seed: int = 1, **sizes: int) -> Any:
        """A model with random weights, norms and biases included.

        Args:
            seed: Of the weights.
            sizes: Other sizes, such as `vocab_size`.
        """
        import torch
        import transformers

        settings = {**self.settings}
        if "text_config" in settings:
            settings["text_config"] = {**settings["text_config"], **sizes}
        else:
            settings = {**SIZES, **settings, **sizes}
        config = getattr(transformers, self.config)(**settings)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            kind = getattr(transformers, self.model) if self.model else None
            model = kind(config) if kind else transformers.AutoModelForCausalLM.from_config(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.float()


HEADS: Mapping[str, Any] = {"head_dim": 8}  # where it is no quotient of the sizes above
MOE: Mapping[str, Any] = {
    **HEADS,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
GEMMA3: Mapping[str, Any] = {
    "text_config": {**SIZES, **HEADS},
    "vision_config": dict(VISION),
    "mm_tokens_per_image": 4,
    "image_token_index": 5,
    "boi_token_index": 6,
    "eoi_token_index": 7,
}
STACKED = ("experts.gate_up_proj", "experts.down_proj")

ARCHITECTURES = (
    Architecture("Llama", "LlamaConfig", {"tie_word_embeddings": False}),
    Architecture("Llama, tied embeddings", "LlamaConfig", {"tie_word_embeddings": True}),
    Architecture("Mistral", "MistralConfig", {"sliding_window": 8}),
    Architecture(
        "Mixtral",
        "MixtralConfig",
        {"num_local_experts": 4},
        lora={"target_modules": ["q_proj", "v_proj"]},
        experts=STACKED,
        names="each expert apart; stacked in memory",
    ),
    Architecture("Qwen2", "Qwen2Config"),
    Architecture("Qwen3", "Qwen3Config", HEADS),
    Architecture(
        "Qwen3-MoE",
        "Qwen3MoeConfig",
        MOE,
        lora={"target_modules": ["q_proj", "v_proj"]},
        experts=STACKED,
        names="each expert apart; stacked in memory",
    ),
    Architecture("Gemma", "GemmaConfig", HEADS),
    Architecture("Gemma 2", "Gemma2Config", {"query_pre_attn_scalar": 8, **HEADS}),
    Architecture("Gemma 3, text", "Gemma3TextConfig", {"query_pre_attn_scalar": 8, **HEADS}),
    Architecture(
        "Gemma 3, with vision",
        "Gemma3Config",
        GEMMA3,
        model="Gemma3ForConditionalGeneration",
        lora={"target_modules": r".*language_model.*\.(q_proj|v_proj|up_proj)"},
        names="`language_model.model.*`; `model.language_model.*` in memory",
    ),
    Architecture("Phi-3", "Phi3Config"),
    Architecture("Granite", "GraniteConfig", {"logits_scaling": 2.0, "residual_multiplier": 0.5}),
    Architecture("SmolLM3", "SmolLM3Config"),
    Architecture("OLMo 2", "Olmo2Config"),
    Architecture(
        "GPT-OSS",
        "GptOssConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8, **HEADS},
        lora={"target_modules": ["q_proj", "v_proj"]},
        experts=STACKED,
    ),
    Architecture("Falcon", "FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    Architecture("GPT-2", "GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    Architecture(
        "Llama 4, text",
        "Llama4TextConfig",
        {
            "num_local_experts": 4,
            "intermediate_size_mlp": 24,
            "attention_chunk_size": 16,
            "interleave_moe_layer_step": 1,
        },
        lora={"target_modules": ["q_proj", "v_proj"]},
        experts=STACKED,
    ),
)


def table() -> str:
    """The rows for people: what the tests of `tests/checkpoints/test_architectures.py` hold them to."""
    lines = [
        "| architecture | class in transformers | tensors on disk and in memory | full checkpoints | LoRA "
        "| LoRA on stacked experts | live weights | fine-tuning |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ARCHITECTURES:
        cells = [
            row.name,
            f"`{row.class_name}`",
            row.names,
            "yes",
            "bit-equal",
            "bit-equal" if row.experts else "none stacked",
            "yes" if row.is_live else "through files",
            "yes",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page_with_table(page: str) -> str:
    """The page with the table of these rows in place of its own."""
    before, _, rest = page.partition("| architecture |")
    after = rest[rest.index("\n\n") + 1 :] if "\n\n" in rest else ""
    return before + table() + after


if __name__ == "__main__":
    PAGE.write_text(page_with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
