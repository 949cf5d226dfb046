"""User errors: each says what happened, where, why it matters and what to do.

The command line prints a `BackmergeError` without a traceback and exits with its `exit_code`. Any other exception is
our own fault.
"""

import errno
import sys

# errors of the operating system that the user can fix
USER_FIXABLE = {
    errno.ENOSPC: "The disk is full: free some space, then run the command again.",
    errno.EDQUOT: "Your disk quota is used up: free some space, then run the command again.",
    errno.EROFS: "The disk is read-only: {elsewhere}.",
    errno.ENAMETOOLONG: "A name in that path is too long: use a shorter one.",
    errno.ELOOP: "Symbolic links in that path form a loop: use another path.",
    errno.EFBIG: "The file would be larger than the system allows: raise the limit (`ulimit -f`), or write elsewhere.",
    errno.EIO: "The disk failed: check it, then run the command again.",
    errno.EISDIR: "That path is a folder, but a file is needed: give another path.",
    errno.ENOTDIR: "A part of that path is a file: {elsewhere}.",
    errno.EACCES: "You have no permission there: fix the folder's permissions, or {elsewhere}.",
}


def remedy_for(error: OSError, elsewhere: str = "give another --out") -> str | None:
    """Return what a user can do about an error of the operating system; `None` if nothing.

    Args:
        error: The error.
        elsewhere: How to write to another place.
    """
    text = USER_FIXABLE.get(error.errno or 0)
    return None if text is None else text.format(elsewhere=elsewhere)


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


def check_utf8(text: str) -> None:
    """Check that an argument or a path can be written to settings, records and reports.

    Raises:
        RunError: it has bytes that Python could not decode.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text.encode(errors="surrogateescape").decode(errors="backslashreplace")
        encoding = sys.getfilesystemencoding()
        if encoding.lower() != "utf-8":
            raise RunError(
                f"'{shown}' has letters that the encoding of this environment, {encoding}, does not have",
                remedy="set PYTHONUTF8=1, or a locale with UTF-8 such as LC_ALL=C.UTF-8.",
            ) from error
        raise RunError(
            f"'{shown}' is not valid UTF-8, so it cannot be written to settings and reports",
            remedy="rename that file or folder.",
        ) from error
