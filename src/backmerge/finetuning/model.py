"""The model that is trained: the base with an adapter, or all of its weights."""

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
    """Return whether the training computes in bfloat16: if requested, and on a GPU that supports it."""
    if settings.dtype != "auto":
        return settings.dtype == "bfloat16"
    return settings.device == "auto" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def trainable(base: Checkpoint, settings: FinetuneSettings) -> Any:
    """Return the base, ready to be trained with the settings.

    Raises:
        GenerationError: the base cannot be loaded.
        CheckpointError: the base is quantised.
        ConfigError: 4 bits are requested, but bitsandbytes is missing.
    """
    check_unquantised(base.directory, base.config, "trained")
    model = _trainable(base, settings)
    if settings.gradient_checkpointing:
        # transformers 5.23 renamed it, and warns about the old name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.config.use_cache = False
    return model


def _trainable(base: Checkpoint, settings: FinetuneSettings) -> Any:
    computed = torch.bfloat16 if has_bf16(settings) else torch.float32
    if settings.mode == "full":
        # weights are float32, so that small steps add up; the computation is bfloat16 if the hardware supports it
        return load_model(base.directory, torch.float32)
    with warnings.catch_warnings():
        # peft 0.21 reads a property of the model that transformers 5.23 has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        # peft's own patterns for stacked experts, which it matches anyway
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
                f"peft cannot add this LoRA to the {model.config.model_type} model {base.directory}: {error}",
                remedy="stacked experts support neither dropout nor DoRA: remove lora.dropout and lora.dora; or train "
                "all weights with --full.",
            ) from error


def check_readable(model: Any, base: Checkpoint, settings: FinetuneSettings) -> None:
    """Check, before hours of training, that its result could be read on this base.

    Args:
        model: The result of `trainable`.
        base: The base that it was made from.
        settings: The training's settings.

    Raises:
        ConfigError: it would not be a tuned model of the base.
    """
    if settings.mode == "lora":
        with tempfile.TemporaryDirectory(prefix="backmerge-") as scratch:
            model.save_pretrained(scratch)
            try:
                AdapterOnBase(Path(scratch), base)
            except CheckpointError as error:
                raise ConfigError(
                    f"the adapter of this training could not be merged with {base.directory}, so the training was "
                    f"not started: {error.message}",
                    remedy="train all weights with --full (mode: full).",
                ) from error
        return
    shapes = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    written = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, shapes).items()}
    wrong = [name for name, info in base.infos.items() if written.get(name) != info.shape]
    if wrong and (wrong := sorted(set(wrong) - layout_of(base).ignored)):
        raise ConfigError(
            f"the tensors that transformers would write differ from those in {base.directory}, such as '{wrong[0]}', "
            "so the two could not be merged; the training was not started",
            remedy="save the base with this version of transformers first (from_pretrained, then save_pretrained), and "
            "give that as BASE.",
        )


def _lora(model: Any, settings: FinetuneSettings) -> LoraConfig:
    """Return a LoRA on all linear layers of the language model.

    It omits layers that text does not train, such as a vision tower's, and an architecture's own kinds of linear
    layers, such as Llama 4's router, which return more than a product, so that peft's layers cannot replace them.
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
    """Return whether a linear layer returns one tensor, and nothing else."""
    if not type(module).__module__.startswith("transformers.models."):
        return True  # torch's own, or a quantised one
    with torch.no_grad():
        found: object = module(module.weight.new_zeros(1, module.in_features))
    return isinstance(found, torch.Tensor)


def _four_bits(computed: torch.dtype) -> Any:
    """Return the settings for NF4 with doubly quantised scales, as in QLoRA.

    Source: Dettmers et al., QLoRA (arXiv 2305.14314), section 3.
    """
    try:
        import bitsandbytes  # noqa: F401 - transformers imports it later, with a longer message
    except ImportError as error:
        raise ConfigError(
            "training on a base in 4 bits needs bitsandbytes, which is not installed",
            remedy="pip install 'backmerge[qlora]', or remove finetune.lora.quantize.",
        ) from error
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=computed,
    )
