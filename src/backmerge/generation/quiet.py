"""Libraries that talk on the terminal, told not to."""

from __future__ import annotations


def quieten() -> None:
    """Keep the libraries' own bars and hints off the terminal; errors stay."""
    import huggingface_hub.utils
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call] # theirs
