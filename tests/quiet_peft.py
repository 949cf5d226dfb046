"""What peft warns of that is not a fault of the test that uses it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def without_peft_warnings() -> Iterator[None]:
    """What peft itself does that this transformers calls old, and what it tells of the embeddings that it saves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        warnings.filterwarnings("ignore", ".*save_embedding_layers.*", UserWarning)
        warnings.filterwarnings("ignore", ".*tie_word_embeddings.*", UserWarning)
        warnings.filterwarnings("ignore", ".*LoRA tensor.* have invalid shape.*", UserWarning)  # its own lora_bias
        yield
