"""Models from their directories, without running code that comes with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from backmerge.checkpoints.reader import read_json
from backmerge.errors import GenerationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_model(directory: Path, dtype: Any, quantization: Any = None) -> PreTrainedModel:
    """The causal language model in a directory.

    Args:
        directory: Config and safetensors.
        dtype: Of torch, or "auto" for the checkpoint's own.
        quantization: A configuration of transformers; none by default.

    Raises:
        GenerationError: this transformers does not know the architecture, or cannot read the files.
    """
    try:
        with without_bars():
            return AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, quantization_config=quantization, trust_remote_code=False
            )
    except (ValueError, OSError, KeyError) as error:
        kind = read_json(directory / "config.json").get("model_type")
        raise GenerationError(
            f"transformers {transformers.__version__} cannot load the {kind} model in {directory}: {error}",
            remedy="a newer transformers may know it; code that comes with a model is not run.",
        ) from error


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bar of transformers' own: it is drawn even where there is no terminal, and through ours."""
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()


def device_of(name: str) -> torch.device:
    """The device of that name; for `auto` a GPU if there is one, else the CPU.

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
