"""The model that is trained: the base with an adapter on it, or all of its weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training

from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import ConfigError
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.generation.loading import load_model


def has_bf16(settings: FinetuneSettings) -> bool:
    """Whether the training computes in bfloat16: on a GPU that can."""
    return settings.device == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def trainable(base: Checkpoint, settings: FinetuneSettings) -> Any:
    """The base, ready to be trained as the settings ask.

    Raises:
        GenerationError: the base cannot be loaded.
        ConfigError: 4 bits are asked for, and bitsandbytes is missing.
    """
    model = _trainable(base, settings)
    if settings.gradient_checkpointing:
        # transformers 5.23 gives it a new name, and calls the old one old
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.config.use_cache = False
    return model


def _trainable(base: Checkpoint, settings: FinetuneSettings) -> Any:
    computed = torch.bfloat16 if has_bf16(settings) else torch.float32
    if settings.mode == "full":
        # float32 weights are what small steps add up in; the computation is bfloat16 where there is hardware for it
        return load_model(base.directory, torch.float32)
    with warnings.catch_warnings():
        # peft 0.21 asks the model for a property that transformers 5.23 has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        if settings.lora.quantize is None:
            model = load_model(base.directory, computed)
        else:
            model = prepare_model_for_kbit_training(
                load_model(base.directory, computed, quantization=_four_bits(computed)),
                use_gradient_checkpointing=False,
            )
        return get_peft_model(model, _lora(settings))


def _lora(settings: FinetuneSettings) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=settings.lora.r,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        use_dora=settings.lora.dora,
        target_modules="all-linear",
    )


def _four_bits(computed: torch.dtype) -> Any:
    """NF4 with doubly quantised scales, as in QLoRA.

    Source: Dettmers et al., QLoRA (arXiv 2305.14314), section 3.
    """
    try:
        import bitsandbytes  # noqa: F401 - transformers imports it later, with a longer message
    except ImportError as error:
        raise ConfigError(
            "training on a base in 4 bits needs bitsandbytes, which is not installed",
            remedy="pip install 'backmerge[qlora]', or leave finetune.lora.quantize out.",
        ) from error
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
    )
