"""The command line: parses, calls the pipeline, and turns errors into one clear message and an exit code."""

from __future__ import annotations

import atexit
import errno
import gc
import importlib
import io
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from backmerge.commands.completion import with_names
from backmerge.commands.suggestions import START
from backmerge.errors import BackmergeError, ConfigError

# errors of the operating system that the user can fix
USER_FIXABLE = {
    errno.ENOSPC: "The disk is full: free some space, then run the command again.",
    errno.EDQUOT: "Your disk quota is used up: free some space, then run the command again.",
    errno.EROFS: "The disk is read-only: give another --out.",
    errno.ENAMETOOLONG: "A name in that path is too long: use a shorter one.",
    errno.ELOOP: "Symbolic links in that path form a loop: use another path.",
    errno.EFBIG: "The file would be larger than the system allows: raise the limit (`ulimit -f`), or write elsewhere.",
    errno.EIO: "The disk failed: check it, then run the command again.",
    errno.EISDIR: "That path is a folder, but a file is needed: give another path.",
    errno.ENOTDIR: "A part of that path is a file: give another --out.",
    errno.EACCES: "You have no permission there: fix the folder's permissions, or give another --out.",
}

MAX_MESSAGE = 2000  # characters
COLLECT_AFTER = 50_000  # objects made and not yet freed; Python's default is 700

PAIR = re.compile("[^|]+=[^|]+")  # the metavar of options that give a name and its value

# some versions of typer bring their own click; either way this is its UsageError
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]

# the module of `backmerge.commands` that holds each command, in the order of the help
COMMANDS: Mapping[str, str] = {
    **{name: name for name in ("demo", "restore", "run", "check", "chat", "evaluate", "finetune", "merge", "inputs")},
    **{name: name for name in ("diff", "plan", "score", "label", "report", "export", "push")},
    "methods": "about",
    "doctor": "about",
    "schema": "about",
    "clean": "clean",
    "list": "about",
}


class OnceCommand(TyperCommand):
    """A command that refuses an option given twice if only the last value would count.

    An option's metavar states its form: `NAME=VALUE` may be repeated with other names, `λ,...` takes several values.
    """

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Parse the arguments of the command.

        Raises:
            ConfigError: an option is given twice.
        """
        given = list(args)  # parsing empties it
        rest = super().parse_args(ctx, args)
        if ctx.resilient_parsing:  # completion of an unfinished command
            return rest
        values, _, order = self.make_parser(ctx).parse_args(given)
        for option in dict.fromkeys(order):
            if not isinstance(option, TyperOption):
                continue
            name, metavar = option.opts[0], option.metavar or ""
            if option.multiple:
                if PAIR.fullmatch(metavar):
                    _check_names_differ(name, values[option.name])
            elif order.count(option) > 1 and (not option.is_flag or option.secondary_opts):
                if option.secondary_opts:
                    name = f"{name}/{option.secondary_opts[0]}"
                form = f", with commas between several values: {name} {metavar}" if "," in metavar else ""
                raise ConfigError(
                    f"{name} is given {order.count(option)} times, and only one of them could count",
                    remedy=f"give it once{form}.",
                )
        return rest


def _check_names_differ(option: str, texts: Iterable[str]) -> None:
    """Check that each NAME=VALUE has another name.

    Raises:
        ConfigError: two have the same name.
    """
    seen: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in seen:
            raise ConfigError(
                f"{option} gives '{name}' twice: {seen[name]} and {value}", remedy="keep one of the two values."
            )
        seen[name] = value


def __getattr__(name: str) -> typer.Typer:
    """Make `app`, the whole command line, on first use."""
    if name == "app":
        return command_line(COMMANDS)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def command_line(names: Iterable[str]) -> typer.Typer:
    """Return the command line with these commands; imports each one's module and makes its options."""
    app = typer.Typer(
        name="backmerge",
        help="Fine-tune without losing safety: merge a tuned model back with its base, measure, and choose λ.",
        epilog="First try: backmerge demo. With your own models: backmerge restore BASE TUNED --utility mine.jsonl "
        "--safety advbench --out restored",
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for name in names:
        module = importlib.import_module(f"backmerge.commands.{COMMANDS[name]}")
        app.command(name, cls=OnceCommand)(with_names(vars(module)["list_" if name == "list" else name]))
    app.callback(invoke_without_command=True)(version)
    return app


def version(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Parse the options before the command."""
    if show:
        from backmerge import __version__

        typer.echo(__version__)
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(START)


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
    # importing torch and transformers makes a million objects, nearly all of which stay: collecting garbage during the
    # import, and again at exit, takes half as long as the import itself
    gc.set_threshold(COLLECT_AFTER)
    atexit.register(gc.freeze)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show λ shows a replacement character
    try:
        # if the command comes first, only that one: making the options of all commands takes longer than many a command
        asked = sys.argv[1:2]
        code = command_line(asked if asked and asked[0] in COMMANDS else COMMANDS)(standalone_mode=False)
    except BackmergeError as error:
        typer.echo(f"backmerge: {_printable(_within_bounds(str(error)))}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in USER_FIXABLE:
            raise
        message = _printable(_within_bounds(str(error)))
        typer.echo(f"backmerge: {message}\n  → {USER_FIXABLE[error.errno]} Finished work is kept.", err=True)
        sys.exit(2)
    except USAGE_ERROR as error:
        error.message = _within_bounds(error.message)
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
