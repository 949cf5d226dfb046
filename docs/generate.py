"""Write the reference pages: commands, experiment file, methods, what can be named, and the Python interface.

All of it is read from the program itself, so that it cannot say something else. `docs/build.py` calls this; by itself:
`python docs/generate.py FOLDER`. `python docs/generate.py results` writes the schema into `docs/results.md`.
"""

from __future__ import annotations

import collections.abc
import importlib
import inspect
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from docstrings import cell, described, entries, escaped, prose, signature_of, taken_apart

RESULTS_PAGE = Path(__file__).with_name("results.md")
SCHEMA = ("<!-- schema: made by `python docs/generate.py results` -->", "<!-- end of schema -->")
HEADER = "<!-- made by docs/generate.py; do not edit -->\n\n"

# what users call, by room; in the order in which it is read
ROOMS: Mapping[str, tuple[str, Sequence[str]]] = {
    "records": ("Records and settings", ("records", "config", "errors", "registry")),
    "statistics": ("Statistics", ("statistics",)),
    "checkpoints": (
        "Checkpoints",
        (
            "checkpoints.locate",
            "checkpoints.reader",
            "checkpoints.adapter",
            "checkpoints.compare",
            "checkpoints.writer",
        ),
    ),
    "merging": (
        "Merging",
        (
            "merging.recipe",
            "merging.method",
            "merging.schedule",
            "merging.served",
            "merging.to_disk",
            "merging.live",
            "merging.engine",
            "merging.randomness",
        ),
    ),
    "generation": ("Generation", ("generation.protocol", "generation.chat", "generation.cache")),
    "judging": ("Judging", ("judging.protocol", "judging.model_judge")),
    "benchmarks": (
        "Benchmarks",
        (
            "benchmarks.protocol",
            "benchmarks.catalogue",
            "benchmarks.files",
            "benchmarks.metrics",
            "benchmarks.matching",
            "benchmarks.scoring",
            "benchmarks.split",
            "benchmarks.lm_eval_bridge",
        ),
    ),
    "finetuning": ("Fine-tuning", ("finetuning.settings", "finetuning.datasets", "finetuning.trainer")),
    "selection": ("Selection", ("selection", "selection.settings")),
    "pipeline": (
        "Pipeline",
        ("planning.settings", "planning.prepare", "planning.estimate", "pipeline.stages", "pipeline.single"),
    ),
}

_EXTRA = re.compile(r"\s*\[((?:default: |required|x>|x<|\d)[^\[\]]*)\]$")


def cli_page() -> str:
    """Every command with its arguments and options."""
    import typer

    from backmerge.cli import app

    group: Any = typer.main.get_command(app)
    parts = [f"# Commands\n\n{escaped(group.help or '')}", "`backmerge COMMAND --help` shows the same."]
    parts.append(
        "Exit codes: 0; 2 for user errors; 3 for a verdict that `--strict` does not accept; 130 for Ctrl-C; 1 "
        "for a fault of ours."
    )
    for name, command in group.commands.items():
        context = command.make_context(name, [], resilient_parsing=True)
        usage = re.sub(r"\{(\w+)\}", r"\1", " ".join(command.collect_usage_pieces(context))).upper()
        parts += [f"## {name}", f"```text\nbackmerge {name} {usage}\n```", *_help(command.help or "")]
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        if arguments:
            rows = [f"| `{one.name.upper()}` | {cell(one.help or '')} |" for one in arguments]
            parts.append("\n".join(["| argument | |", "|---|---|", *rows]))
        if options:
            rows = [_option_row(one, context) for one in options]
            parts.append("\n".join(["| option | default | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _help(text: str) -> Iterator[str]:
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        lead, colon, command = " ".join(paragraph.split()).partition(": backmerge ")
        if colon:
            yield f"{escaped(lead)}:\n\n```sh\nbackmerge {command}\n```"
        else:
            yield escaped(paragraph)


def _option_row(option: Any, context: Any) -> str:
    """As `--help` has it, with the default in a separate column."""
    shown, text = option.get_help_record(context)
    extra = _EXTRA.search(text)
    default = "required" if option.required else ""
    if extra:
        text = text[: extra.start()]
        found = re.search(r"default: ([^;]+)", extra[1])
        default = f"`{found[1]}`" if found else default
    return f"| `{shown.replace('|', chr(92) + '|')}` | {default} | {cell(text)} |"


def experiment_page() -> str:
    """Every key of an experiment file, group by group."""
    from backmerge.config import Settings
    from backmerge.planning.settings import Experiment

    parts = [
        "# The experiment file",
        "What `backmerge run FILE` takes, and what `--set KEY=VALUE` reaches. `backmerge schema` prints the same as a "
        "JSON schema, for [editors](../how-to/experiment-file.md#completion-in-the-editor).",
    ]
    groups: dict[type[Settings], str] = {Experiment: ""}
    waiting = [Experiment]
    while waiting:
        kind = waiting.pop(0)
        for key, field in kind.model_fields.items():
            for inner in _settings_in(field.annotation):
                if inner not in groups:
                    groups[inner] = f"{groups[kind]}.{key}".strip(".")
                    waiting.append(inner)
    for kind, path in groups.items():
        parts.append(f"## `{path}` {{ #{path} }}" if path else "## The whole")
        found = taken_apart(kind.__doc__ or "")
        parts.append(prose(found.text))
        meanings = entries(found.sections.get("Attributes", ""))
        rows = ["| key | takes | default | |", "|---|---|---|---|"]
        for key, field in kind.model_fields.items():
            takes = ", ".join([words_of(field.annotation, groups), *_limits(field.metadata)])
            meaning = field.description or meanings.get(key, "")
            rows.append(f"| `{key}` | {takes} | {_default_of(field)} | {cell(meaning)} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def _settings_in(annotation: Any) -> Iterator[Any]:
    from backmerge.config import Settings

    if isinstance(annotation, type) and issubclass(annotation, Settings):
        yield annotation
    for argument in get_args(annotation):
        yield from _settings_in(argument)


def words_of(annotation: Any, groups: Mapping[Any, str]) -> str:
    """What a setting takes, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in groups:
        return f"[settings](#{groups[annotation]})"
    words = [words_of(one, groups) for one in arguments if one is not type(None)] if origin is not Literal else []
    found = {
        Annotated: lambda: ", ".join([words[0], *_limits(arguments[1:])]),
        Literal: lambda: ", ".join(f"`{one}`" for one in arguments),
        Union: lambda: " or ".join(words) + (", or null" if type(None) in arguments else ""),
        tuple: lambda: f"list of {words[0]}",
        collections.abc.Mapping: lambda: "mapping",
    }
    alike = {types.UnionType: Union, list: tuple, collections.abc.Sequence: tuple, dict: collections.abc.Mapping}
    if origin in (*found, *alike):
        return found[alike.get(origin, origin)]()
    plain = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "anything"}
    return plain.get(annotation) or escaped(getattr(annotation, "__name__", str(annotation)))


def _limits(metadata: Sequence[Any]) -> list[str]:
    """Bounds that a number is held to, as signs."""
    signs = {"gt": "> ", "ge": "≥ ", "lt": "< ", "le": "≤ ", "min_length": "at least "}
    found = []
    for one in metadata:
        for each in getattr(one, "metadata", None) or [one]:
            found += [
                f"{sign}{getattr(each, name)}".replace("<", "&lt;").replace(">", "&gt;")
                for name, sign in signs.items()
                if getattr(each, name, None) is not None
            ]
    return found


def _default_of(field: Any) -> str:
    from backmerge.config import Settings

    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, Settings) or (isinstance(default, tuple) and any(isinstance(x, Settings) for x in default)):
        return "as there"
    if default is None:
        return ""
    shown = str(list(default)) if isinstance(default, tuple) else str(default)
    return f"`{shown}`" if shown else '`""`'


def methods_page() -> str:
    """Every merge method."""
    from backmerge.commands.about import takes
    from backmerge.merging.method import find_method
    from backmerge.registry import METHODS

    parts = ["# Merge methods", "`backmerge methods` shows the same; [how to add your own](../how-to/own-method.md)."]
    rows = ["| method | takes | λ = 0 and 1 are exact | a LoRA of LoRAs | |", "|---|---|---|---|---|"]
    found = {name: find_method(name) for name in sorted(METHODS.entries)}
    for name, method in found.items():
        taken = takes(method.num_tuned)  # the words of `backmerge methods`
        flags = ["yes" if one else "no" for one in (method.has_exact_endpoints, method.coefficients is not None)]
        rows.append(f"| [`{name}`](#{name}) | {taken} | {flags[0]} | {flags[1]} | {cell(method.summary)} |")
    parts.append("\n".join(rows))
    for name, method in found.items():
        parts += [f"## `{name}` {{ #{name} }}", *described(inspect.getdoc(method.function) or "")]
    return "\n\n".join(parts) + "\n"


def catalogue_page() -> str:
    """What can be named: benchmarks, judges, engines, data sets."""
    from backmerge import registry

    parts = ["# What can be named", "`backmerge list benchmarks` (judges, engines, tasks) shows a short form."]
    tables = {
        "Benchmarks": registry.BENCHMARKS,
        "Judges": registry.JUDGES,
        "Engines": registry.ENGINES,
        "Data sets to tune on": registry.DATASETS,
    }
    for title, table in tables.items():
        parts.append(f"## {title}")
        for name, place in sorted(table.entries.items()):
            module_name, _, attribute = place.partition(":")
            module: Any = importlib.import_module(module_name)
            shared = sum(other.startswith(f"{module_name}:") for other in table.entries.values()) > 1
            parts.append(f"### `{name}` {{ #{name} }}")
            if not shared:
                parts += described(module.__doc__ or "")
            parts += described(inspect.getdoc(getattr(module, attribute)) or "")
            if needs := getattr(module, "NEEDS", ""):
                parts.append(f"Needs {escaped(needs)}.")
    parts.append("## Also\n\n- `lm-eval:TASK`, any task of [lm-evaluation-harness](../lm_eval.md).")
    parts.append("- [Your own file](../how-to/own-data.md); `package.module:function`, [your own code]" + _HOW)
    return "\n\n".join(parts) + "\n"


_HOW = "(../how-to/own-benchmark.md)."


def python_page(title: str, modules: Sequence[str]) -> str:
    """The public names of some modules."""
    parts = [f"# {title}"]
    for name in modules:
        module: Any = importlib.import_module(f"backmerge.{name}")
        parts += [f"## `backmerge.{name}` {{ #backmerge.{name} }}", *described(module.__doc__ or "")]
        for attribute, value in _public(module):
            anchor = f"{{ #backmerge.{name}.{attribute} }}"
            parts.append(f"### `{attribute}` {anchor}")
            parts += list(_object(attribute, value))
    return "\n\n".join(parts) + "\n"


def _public(module: Any) -> Iterator[tuple[str, Any]]:
    """What a module offers: its `__all__`, or its own public classes and functions, in the order of their lines."""
    if hasattr(module, "__all__"):
        yield from ((name, getattr(module, name)) for name in module.__all__)
        return
    own = [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    ]
    yield from sorted(own, key=lambda pair: inspect.getsourcelines(pair[1])[1])


def _object(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        if "__init__" in vars(value) or hasattr(value, "__dataclass_fields__"):
            yield f"```python\n{signature_of(name, value)}\n```"
        yield from described(inspect.getdoc(value) or "")
        methods = [
            (attribute, one)
            for attribute, one in vars(value).items()
            if not attribute.startswith("_") and inspect.isfunction(one) and one.__doc__
        ]
        for attribute, one in methods:
            yield f"```python\n{name}{signature_of(f'.{attribute}', one)}\n```"
            yield from described(inspect.getdoc(one) or "")
    elif callable(value):
        yield f"```python\n{signature_of(name, value)}\n```"
        yield from described(inspect.getdoc(value) or "")


def results_schema() -> str:
    """Every key of `results.json`, kind by kind, then the parts that they are made of."""
    from backmerge.results import SCHEMA_VERSION, CheckResults, EvaluateResults, RestoreResults

    roots = (RestoreResults, EvaluateResults, CheckResults)
    parts: list[Any] = []
    for root in roots:
        _collect(root, parts)
    text = [
        f"This is **version {SCHEMA_VERSION}** of the schema: `schema_version` is {SCHEMA_VERSION}. It changes if a "
        "key is renamed or removed, or takes another meaning. Keys may be added without a new version.",
    ]
    for kind in (*roots, *(part for part in parts if part not in roots)):
        found = taken_apart(kind.__doc__ or "")
        text += [f"### {kind.__name__}", prose(found.text)]
        rows = ["| key | is | meaning |", "|---|---|---|"]
        for key, annotation, meaning in _keys_of(kind):
            rows.append(f"| `{key}` | {_is(annotation)} | {cell(meaning)} |")
        text.append("\n".join(rows))
    return "\n\n".join(text) + "\n"


def _keys_of(kind: Any) -> Iterator[tuple[str, Any, str]]:
    """Each key of a part of the results, with its type and its meaning."""
    from backmerge.records import Estimate

    meanings: dict[str, str] = {}
    for one in reversed(kind.__mro__):
        meanings |= entries(taken_apart(one.__doc__ or "").sections.get("Attributes", ""))
    hints = get_type_hints(kind, include_extras=True)
    if kind is Estimate:  # in the results, it is a mean over benchmarks
        hints, meanings = {"mean": float, "low": float, "high": float}, {"mean": meanings["value"], **meanings}
    for key, annotation in hints.items():
        if get_origin(annotation) is not ClassVar and not key.startswith("model_") and not key.startswith("_"):
            yield key, annotation, meanings[key]


def _is_part(annotation: Any) -> bool:
    return inspect.isclass(annotation) and annotation.__module__.startswith("backmerge.")


def _collect(annotation: Any, parts: list[Any]) -> None:
    """Add the parts that a type is made of, each once, in the order in which they are met."""
    if _is_part(annotation) and annotation not in parts:
        parts.append(annotation)
        for _, inner, _ in _keys_of(annotation):
            _collect(inner, parts)
    for argument in get_args(annotation):
        _collect(argument, parts)


def _is(annotation: Any) -> str:
    """What a key of the results is, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if _is_part(annotation):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    if origin is Annotated:
        return _is(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{one}`" for one in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join("null" if one is type(None) else _is(one) for one in arguments)
    if origin is tuple:
        return f"list of {_is(arguments[0])}"
    plain = {bool: "flag", int: "whole number", float: "number", str: "text", Any: "anything"}
    return "table" if origin is collections.abc.Mapping else plain[annotation]


def with_schema(page: str) -> str:
    """A page with its part between the marks `schema` made anew."""
    before, _, rest = page.partition(SCHEMA[0])
    _, _, after = rest.partition(SCHEMA[1])
    return f"{before}{SCHEMA[0]}\n\n{results_schema()}\n{SCHEMA[1]}{after}"


def pages() -> dict[str, str]:
    """Each page's path under `reference/`, and its Markdown."""
    made = {
        "cli.md": cli_page(),
        "experiment.md": experiment_page(),
        "methods.md": methods_page(),
        "catalogue.md": catalogue_page(),
    }
    index = ["# The Python interface", "Read from the docstrings, room by room; a room uses only those before it."]
    for name, (title, modules) in ROOMS.items():
        made[f"python/{name}.md"] = python_page(title, modules)
        listed = ", ".join(f"[`backmerge.{module}`]({name}.md#backmerge.{module})" for module in modules)
        index.append(f"- **{title}**: {listed}")
    made["python/index.md"] = "\n\n".join(index) + "\n"
    return {path: HEADER + text for path, text in made.items()}


def write(folder: Path) -> None:
    """Write all pages under a folder."""
    for path, text in pages().items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1] == "results":
        RESULTS_PAGE.write_text(with_schema(RESULTS_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        write(Path(sys.argv[1]))
