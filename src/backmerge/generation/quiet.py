"""Silence libraries that print on the terminal."""

from __future__ import annotations


def quieten() -> None:
    """Keep the libraries' bars and hints off the terminal; errors are still shown."""
    import huggingface_hub.utils
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call] # theirs
