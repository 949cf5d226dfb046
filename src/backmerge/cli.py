"""The entry point: runs the command line, and turns errors into one clear message and an exit code."""

from __future__ import annotations

import atexit
import gc
import io
import sys

TYPE_CHECKING = False  # importing typing takes a while, in which Ctrl-C would not be caught
if TYPE_CHECKING:
    import typer

MAX_MESSAGE = 2000  # characters
COLLECT_AFTER = 50_000  # objects made and not yet freed; Python's default is 700


def __getattr__(name: str) -> typer.Typer:
    """Make `app`, the whole command line, on first use."""
    if name == "app":
        from backmerge.commands.application import COMMANDS, command_line

        return command_line(COMMANDS)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def _printable(text: str) -> str:
    """Remove terminal control characters: ids, tensor names and adapters come from other people."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _within_bounds(text: str) -> str:
    """Shorten a message, which may contain very long names; keep its beginning and end."""
    if len(text) <= MAX_MESSAGE:
        return text
    return f"{text[: MAX_MESSAGE - 700]} [… {len(text) - MAX_MESSAGE:,} characters …] {text[-650:]}"


def main() -> None:
    """Run the `backmerge` command.

    Exit codes: 0; 2 for user errors; 3 for a verdict other than restored under --strict; 130 for Ctrl-C; 1, with a
        traceback, for our own faults.
    """
    try:
        code = _exit_code()  # imports nearly everything, so that Ctrl-C is also caught during the imports
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _exit_code() -> int:
    """Run the command of `sys.argv`, report its user errors, and return the exit code."""
    # importing torch and transformers makes a million objects, nearly all of which stay: collecting garbage during the
    # import, and again at exit, takes half as long as the import itself
    gc.set_threshold(COLLECT_AFTER)
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show λ shows a replacement character

    import typer

    from backmerge.commands.application import COMMANDS, USAGE_ERROR, command_line
    from backmerge.errors import BackmergeError, check_utf8, remedy_for

    try:
        # if the command comes first, only that one: making the options of all commands takes longer than many a command
        for argument in sys.argv[1:]:
            check_utf8(argument)
        asked = sys.argv[1:2]
        code = command_line(asked if asked and asked[0] in COMMANDS else COMMANDS)(standalone_mode=False)
    except BackmergeError as error:
        typer.echo(f"backmerge: {_printable(_within_bounds(str(error)))}", err=True)
        return error.exit_code
    except OSError as error:
        remedy = remedy_for(error)
        if remedy is None:
            raise
        message = _printable(_within_bounds(str(error)))
        typer.echo(f"backmerge: {message}\n  → {remedy} Finished work is kept.", err=True)
        return 2
    except USAGE_ERROR as error:
        error.message = _within_bounds(error.message)
        error.show()
        return int(error.exit_code)
    except typer.Abort:
        return 130
    return code if isinstance(code, int) else 0
