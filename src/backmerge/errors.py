"""The errors that a user can cause: each says what happened, where, why it matters and what to do.

The command line prints a `BackmergeError` without a traceback and exits with its `exit_code`; anything else that
reaches it is a fault of ours.
"""


class BackmergeError(Exception):
    """Something that the user can mend.

    Args:
        message: What happened, where, and why it matters.
        remedy: What to do about it; printed on a line of its own.
    """

    exit_code = 2

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message}\n  → {self.remedy}"


class ConfigError(BackmergeError):
    """An experiment file or an option that does not say what it must."""


class CheckpointError(BackmergeError):
    """A model directory or adapter that is missing, damaged, or of another base."""


class MergeError(BackmergeError):
    """A recipe that cannot be carried out on these models."""


class DataError(BackmergeError):
    """A data set or a benchmark's file that cannot be read as what it should be."""


class GenerationError(BackmergeError):
    """A model that cannot be asked: no chat template, a prompt beyond its context, an engine that is missing.

    Args:
        message: What happened, where, and why it matters.
        remedy: What to do about it.
        example: The one prompt that the model's context does not hold, where all others can be answered.
    """

    def __init__(self, message: str, *, remedy: str | None = None, example: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.example = example


class RunError(BackmergeError):
    """A run directory that cannot be used: another configuration, in use, or damaged."""


class NotShownError(BackmergeError):
    """The verdict under `--strict`: safety was not shown to be restored."""

    exit_code = 3
