"""Load models from their directories, without running code that comes with them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from backmerge.checkpoints.model_config import check_settings, read_json
from backmerge.checkpoints.reader import Checkpoint
from backmerge.errors import GenerationError
from backmerge.progress import count_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel


LONGEST = 500  # characters of another library's message
SHOWN = 3  # listed tensors of the wrong shape

# derived from the config; stored on disk by older versions of transformers
DERIVED = re.compile(r"rotary_emb\.|\.attn\.(?:masked_)?bias$|\.attention\.(?:masked_)?bias$|(?:^|\.)position_ids$")
# parts of a model that also processes images or sound; its text does not need them
SENSES = re.compile(
    r"(?:^|\.)(?:vision\w*|visual|audio\w*|multi_modal_projector|mm_projector|image_newline|embed_vision|embed_audio)\."
)
EXCESS = 1.5  # a config with this many times the weights on disk is another model's, and would fill the memory


def load_model(directory: Path, dtype: Any, quantization: Any = None) -> PreTrainedModel:
    """Load the causal language model in a directory, with every weight from there.

    Args:
        directory: Folder with config and safetensors.
        dtype: A dtype of torch, or "auto" for the checkpoint's own.
        quantization: A quantisation configuration of transformers; none by default.

    Raises:
        GenerationError: this version of transformers does not support the architecture, cannot read the files, or they
            do not fill the model.
        CheckpointError: the folder is not a complete checkpoint, or its settings are damaged.
    """
    check_settings(directory)
    on_disk = Checkpoint(directory)
    if on_disk.config.quantization_config is None:
        _check_size(on_disk)
    ignored = SENSES if on_disk.config.text_config is not None else None
    model = load_filled(
        AutoModelForCausalLM,
        directory,
        ignored_extra=ignored,
        dtype=dtype,
        quantization_config=quantization,
    )
    # some invalid settings are only found when they are used
    with _clear_errors(directory), torch.inference_mode():
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    return model


def load_filled(
    kind: Any,
    directory: Path,
    *,
    ignored_missing: re.Pattern[str] | None = None,
    ignored_extra: re.Pattern[str] | None = None,
    **options: Any,
) -> PreTrainedModel:
    """Load a model of transformers, and refuse it unless the tensors on disk fill it.

    Args:
        kind: An auto class of transformers.
        directory: Folder with config and safetensors.
        ignored_missing: Tensors of the model that may be random, since they are not used.
        ignored_extra: Tensors on disk that the model does not need, in addition to derived buffers.
        options: Options of `from_pretrained`.

    Raises:
        GenerationError: transformers cannot load it, or tensors are missing, unknown or of another shape.
    """
    with _clear_errors(directory), quiet():
        model, found = kind.from_pretrained(
            directory,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # otherwise transformers raises without their names; they are refused below
            output_loading_info=True,
            **options,
        )
    missing = sorted(name for name in found["missing_keys"] if not (ignored_missing and ignored_missing.search(name)))
    extra = sorted(
        name
        for name in found["unexpected_keys"]
        if not (DERIVED.search(name) or (ignored_extra and ignored_extra.search(name)))
    )
    faults = [
        f"{count_text(len(names), 'tensor')} {what}, such as '{names[0]}'"
        for what, names in (("missing", missing), ("unknown to it", extra))
        if names
    ]
    faults += [
        f"'{name}' is {tuple(ours)} on disk and {tuple(theirs)} in it"
        for name, ours, theirs in sorted(found["mismatched_keys"])[:SHOWN]
    ]
    if faults:
        raise GenerationError(
            f"the weights in {directory} do not fill the {type(model).__name__} that its config.json describes: "
            f"{'; '.join(faults)}. It would run on random numbers",
            remedy="config.json is another model's, or the weights were saved in part or under other names: download "
            "the model again, or save it again with save_pretrained.",
        )
    return model


def _check_size(on_disk: Checkpoint) -> None:
    """Refuse a config with far more weights than there are on disk, before memory is allocated for them."""
    with _clear_errors(on_disk.directory), torch.device("meta"), quiet():
        config = AutoConfig.from_pretrained(on_disk.directory, trust_remote_code=False)
        described = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    held = sum(info.num_elements for info in on_disk.infos.values())
    if described > EXCESS * held:
        raise GenerationError(
            f"the config.json in {on_disk.directory} describes a model of {described:,} weights, but its files have "
            f"{held:,}",
            remedy="config.json belongs to another model, or files are missing: download or save the model again.",
        )


@contextmanager
def _clear_errors(directory: Path) -> Iterator[None]:
    """Turn any failure of transformers to load a model into one message."""
    try:
        yield
    except Exception as error:  # boundary: on a damaged file transformers may raise any exception
        kind = read_json(directory / "config.json").get("model_type")
        raise GenerationError(
            f"transformers {transformers.__version__} cannot load the {kind} model in {directory}: {shortened(error)}",
            remedy="config.json may be damaged, or need a newer version of transformers; code that comes with a model "
            "is never run.",
        ) from error


class PutOn:
    """Put an adapter on a model in memory, as peft loads it: next to the weights, which keep their dtype.

    Args:
        model: An unchanged base; modified in place.
        directory: The adapter's folder.
        is_whole: Whether the adapter has more than factors, such as trained norms; peft then replaces modules.

    Raises:
        GenerationError: peft cannot load it, or finds no weights for a part of it.
    """

    def __init__(self, model: PreTrainedModel, directory: Path, *, is_whole: bool = False) -> None:
        # imported here: most models are not adapters, and importing peft takes seconds
        from peft import PeftModel

        self._is_whole = is_whole
        try:
            # peft draws random factors before it reads the trained ones: the caller's random state is kept
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # such as peft's use of deprecated functions of transformers
                warnings.filterwarnings("error", message="Found missing adapter keys")
                self._adapted = PeftModel.from_pretrained(model, str(directory)).eval()
        except (ValueError, KeyError, RuntimeError, TypeError, OSError, UserWarning) as error:
            raise GenerationError(
                f"peft cannot load the adapter {directory}: {error}",
                remedy="write a checkpoint and measure that: backmerge merge BASE LORA --lam 1 --as checkpoint.",
            ) from error

    def scaled(self, share: float) -> Any:
        """Return the model with the adapter next to its weights, the adapter's change scaled by `share`."""
        from peft.tuners.lora import LoraLayer

        for module in self._adapted.modules():
            if isinstance(module, LoraLayer):
                module.scale_layer(share)
        return self._adapted

    def folded_in(self, share: float) -> PreTrainedModel:
        """Return the model with this share of the adapter's change added to its weights, by peft."""
        merged: PreTrainedModel = self.scaled(share).merge_and_unload()
        return merged

    def take_off(self) -> bool:
        """Remove the adapter; return whether the model is the base again and need not be reloaded."""
        if self._is_whole:
            return False
        self._adapted.unload()
        return True


def shortened(error: BaseException) -> str:
    """Return a library's message, limited in length: only the exception's type if it has no text."""
    text = str(error).strip() or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' bars and reports: what matters in them is refused with our own messages."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def without_bars() -> Iterator[None]:
    """Suppress transformers' progress bars: they are drawn even without a terminal, and through ours."""
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


def device_of(name: str) -> torch.device:
    """Return the device of that name; for `auto` a GPU if there is one, else the CPU.

    Raises:
        GenerationError: it cannot be used.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise GenerationError(
            f"the device '{name}' cannot be used: {str(error).splitlines()[0]}",
            remedy="`backmerge doctor` lists what this machine has; --device auto chooses.",
        ) from error
    return device
