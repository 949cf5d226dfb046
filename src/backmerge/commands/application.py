"""The typer application: the commands, each imported from its module, and the options before them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperOption

from backmerge.commands.completion import with_names
from backmerge.commands.suggestions import START
from backmerge.errors import ConfigError

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


class Command(TyperCommand):
    """A command that refuses a second value where the user expects both to count, and only the last one would.

    These are options that take several values with commas, by their metavar (`λ,...`), `--method`, and `NAME=VALUE`
    with the same name. Of other options, and of `--set`, the last value counts, as in most programs. Its help shows
    arguments in capitals, as the texts call them, and without Python types.
    """

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        for parameter in self.params:
            if parameter.param_type_name == "argument" and parameter.metavar is None:
                parameter.metavar = (parameter.name or "").upper()

    def format_options(self, ctx: typer.Context, formatter: Any) -> None:  # type: ignore[override]
        """Write the help of arguments, without their Python types, and of options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                name = parameter.metavar or ""
                sections["Arguments"].append((name if parameter.nargs == 1 else f"{name}...", record[1]))
            else:
                sections["Options"].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

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
                if PAIR.fullmatch(metavar) and name != "--set":
                    _check_names_differ(name, values[option.name])
            elif order.count(option) > 1 and ("," in metavar or name == "--method"):
                form = f", with commas between several values ({name} {metavar})" if "," in metavar else ""
                raise ConfigError(
                    f"{name} is given {order.count(option)} times, but only one value can be used",
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
        app.command(name, cls=Command)(with_names(vars(module)["list_" if name == "list" else name]))
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
