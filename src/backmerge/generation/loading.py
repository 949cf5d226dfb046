"""Models from their directories, without running code that comes with them."""

from __future__ import annotations

import warnings
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


class PutOn:
    """An adapter on a model in memory, as peft loads it: next to the weights, which keep their dtype.

    Args:
        model: A base, as it is on disk; changed in place.
        directory: Of the adapter.
        is_whole: Whether the adapter holds more than factors, such as trained norms; peft then replaces modules.

    Raises:
        GenerationError: peft cannot load it, or finds no weights for a part of it.
    """

    def __init__(self, model: PreTrainedModel, directory: Path, *, is_whole: bool = False) -> None:
        # imported here: most models are no adapters, and peft takes seconds
        from peft import PeftModel

        self._is_whole = is_whole
        try:
            # peft draws the factors at random before it reads them: the caller's random state stays as it is
            with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what peft uses of transformers that is called old; and the like
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
        """Return the model with that share of the adapter's change added to its weights, by peft."""
        merged: PreTrainedModel = self.scaled(share).merge_and_unload()
        return merged

    def take_off(self) -> bool:
        """Take the adapter off; says whether the model is the base again, and need not be loaded anew."""
        if self._is_whole:
            return False
        self._adapted.unload()
        return True


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
