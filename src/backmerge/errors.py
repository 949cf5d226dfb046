"""User errors: each says what happened, where, why it matters and what to do.

The command line prints a `BackmergeError` without a traceback and exits with its `exit_code`. Any other exception is
our own fault.
"""


class BackmergeError(Exception):
    """An error that the user can fix.

    Args:
        message: What happened, where, and why it matters.
        remedy: What to do about it; printed on a separate line.
    """

    exit_code = 2

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return self.message if self.remedy is None else f"{self.message}\n  → {self.remedy}"


class ConfigError(BackmergeError):
    """An experiment file or an option is invalid."""


class CheckpointError(BackmergeError):
    """A model folder or adapter is missing, damaged, or belongs to another base."""


class MergeError(BackmergeError):
    """A recipe cannot be used on these models."""


class DataError(BackmergeError):
    """A data set or a benchmark's file has the wrong format."""


class GenerationError(BackmergeError):
    """A model cannot answer: no chat template, a prompt longer than its context, a missing engine.

    Args:
        message: What happened, where, and why it matters.
        remedy: What to do about it.
        example: The only prompt that does not fit into the model's context, if all others can be answered.
    """

    def __init__(self, message: str, *, remedy: str | None = None, example: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.example = example


class RunError(BackmergeError):
    """A run directory cannot be used: it has other settings, is in use, or is damaged."""


class NotShownError(BackmergeError):
    """The verdict under `--strict` is not `restored`."""

    exit_code = 3
