"""The model that is trained: the base with an adapter on it, or all of its weights."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model, prepare_model_for_kbit_training
from transformers.core_model_loading import revert_weight_conversion

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.layout import layout_of
from backmerge.checkpoints.model_config import check_unquantised
from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import CheckpointError, ConfigError
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.generation.loading import load_model


def has_bf16(settings: FinetuneSettings) -> bool:
    """Whether the training computes in bfloat16: if asked to, and on a GPU that can."""
    if settings.dtype != "auto":
        return settings.dtype == "bfloat16"
    return settings.device == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def trainable(base: Checkpoint, settings: FinetuneSettings) -> Any:
    """The base, ready to be trained as the settings ask.

    Raises:
        GenerationError: the base cannot be loaded.
        CheckpointError: the base is quantised.
        ConfigError: 4 bits are asked for, and bitsandbytes is missing.
    """
    check_unquantised(base.directory, base.config, "trained")
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
        # its own patterns for stacked experts, which it matches all the same
        warnings.filterwarnings("ignore", ".*_pattern keys did not match any targeted module", RuntimeWarning)
        if settings.lora.quantize is None:
            model = load_model(base.directory, computed)
        else:
            model = prepare_model_for_kbit_training(
                load_model(base.directory, computed, quantization=_four_bits(computed)),
                use_gradient_checkpointing=False,
            )
        try:
            return get_peft_model(model, _lora(model, settings))
        except ValueError as error:
            raise ConfigError(
                f"peft cannot put this LoRA on the {model.config.model_type} model {base.directory}: {error}",
                remedy="stacked experts take neither dropout nor DoRA: leave lora.dropout and lora.dora out; or train "
                "all weights with --full.",
            ) from error


def check_readable(model: Any, base: Checkpoint, settings: FinetuneSettings) -> None:
    """Check, before hours of training, that what it would write can be read on this base.

    Args:
        model: As `trainable` makes it.
        base: What it was made of.
        settings: Its settings.

    Raises:
        ConfigError: it would be no tuned model of the base.
    """
    if settings.mode == "lora":
        with tempfile.TemporaryDirectory(prefix="backmerge-") as scratch:
            model.save_pretrained(scratch)
            try:
                AdapterOnBase(Path(scratch), base)
            except CheckpointError as error:
                raise ConfigError(
                    f"the adapter that this training would write could not be merged onto {base.directory}, so it was "
                    f"not begun: {error.message}",
                    remedy="train all weights with --full (mode: full).",
                ) from error
        return
    shapes = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    written = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, shapes).items()}
    wrong = [name for name, info in base.infos.items() if written.get(name) != info.shape]
    if wrong and (wrong := sorted(set(wrong) - layout_of(base).ignored)):
        raise ConfigError(
            f"transformers would write the tuned model with other tensors than {base.directory} has, such as "
            f"'{wrong[0]}', so that the two could not be merged; the training was not begun",
            remedy="save the base with this version of transformers first (from_pretrained, then save_pretrained), and "
            "give that as BASE.",
        )


def _lora(model: Any, settings: FinetuneSettings) -> LoraConfig:
    """All linear layers of the language model.

    Left out are those that text does not train, such as a vision tower's; and an architecture's own kinds of linear
    layers, such as Llama 4's router, which return more than a product, so that peft's layers cannot stand in for them.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inside = {id(module) for module in decoder.modules()}
    left_out = sorted(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and module is not head
        and (id(module) not in inside or not _returns_product(module))
    )
    return LoraConfig(
        exclude_modules=left_out or None,
        task_type=TaskType.CAUSAL_LM,
        r=settings.lora.r,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        use_dora=settings.lora.dora,
        target_modules="all-linear",
    )


def _returns_product(module: torch.nn.Linear) -> bool:
    """Whether a linear layer gives one tensor, and no more than that."""
    if not type(module).__module__.startswith("transformers.models."):
        return True  # torch's own, or a quantised one
    with torch.no_grad():
        found: object = module(module.weight.new_zeros(1, module.in_features))
    return isinstance(found, torch.Tensor)


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
