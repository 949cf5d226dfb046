"""Docstrings and signatures as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Source", "Example", "Examples", "Note")
_ENTRY = re.compile(r"^(?P<names>[*\w][\w*.]*(?:, [*\w][\w*.]*)*): (?P<text>.*)$")


class Docstring(NamedTuple):
    """A Google-style docstring, taken apart.

    Attributes:
        text: All before the first section.
        sections: Name to its dedented text, in order.
    """

    text: str
    sections: Mapping[str, str]


def taken_apart(docstring: str) -> Docstring:
    """The text and the sections of a docstring."""
    lines = inspect.cleandoc(docstring).splitlines()
    text: list[str] = []
    sections: dict[str, list[str]] = {}
    current = text
    for line in lines:
        head, _, rest = line.partition(":")
        if head in SECTIONS and (not rest.strip() or head in ("Source", "Example")):
            current = sections.setdefault(head, [])
            if rest.strip():
                current.append(rest.strip())
        elif line and not line.startswith(" ") and current is not text:
            # what stands at the margin again belongs to the text, but for the lines of a section begun on its own line
            if current and current[-1] and not current[-1].startswith(" "):
                current.append(line)
            else:
                text.append(line)
                current = text
        else:
            current.append(line)
    return Docstring(
        "\n".join(text).strip(), {name: inspect.cleandoc("\n".join(["", *body])) for name, body in sections.items()}
    )


def entries(section: str) -> dict[str, str]:
    """`name: text` lines of a section, lines that go on joined; a line for several names counts for each."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        match = _ENTRY.match(line)
        if match:
            names = match["names"].split(", ")
            found |= dict.fromkeys(names, match["text"])
        else:
            found |= {name: f"{found[name]} {line.strip()}".rstrip() for name in names}
    return found


def escaped(text: str) -> str:
    """Text without the signs that Markdown would take for its own, but for code in backticks."""
    parts = re.split(r"(``.+?``|`[^`\n]+`)", text)
    return "".join(part if index % 2 else re.sub(r"([*\[\]<>])", r"\\\1", part) for index, part in enumerate(parts))


def prose(text: str) -> str:
    """A docstring's text as Markdown: examples become code blocks, tables and lists stay, the rest is escaped."""
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.splitlines()
        if lines and (lines[0].startswith(">>>") or all(line.startswith("    ") for line in lines)):
            blocks.append("```python\n" + inspect.cleandoc(block) + "\n```")
        else:
            blocks.append("\n".join(escaped(line) for line in lines))
    return "\n\n".join(blocks)


def cell(text: str) -> str:
    """Text for a table's cell."""
    return escaped(" ".join(text.split())).replace("|", "\\|")


def described(docstring: str, *, skip: Sequence[str] = ()) -> Iterator[str]:
    """A docstring as Markdown paragraphs."""
    found = taken_apart(docstring)
    if found.text:
        yield prose(found.text)
    for name, body in found.sections.items():
        if name in skip:
            continue
        named = entries(body)
        if name in ("Args", "Attributes", "Raises") and named:
            yield f"{ {'Args': 'Arguments'}.get(name, name) }:\n\n" + "\n".join(
                f"- `{key}`: {escaped(text)}" for key, text in named.items()
            )
        else:
            yield f"{name}: {escaped(' '.join(body.split()))}"


def signature_of(name: str, value: Any) -> str:
    """How a function or a class is called, as code."""
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return f"{name}(...)"
    parts: list[str] = []
    kinds = [parameter.kind for parameter in signature.parameters.values()]
    for at, parameter in enumerate(signature.parameters.values()):
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and inspect.Parameter.VAR_POSITIONAL not in kinds:
            parts += ["*"] if kinds.index(parameter.kind) == at else []
        parts.append(_parameter(parameter))
        is_last = at + 1 == len(kinds) or kinds[at + 1] is not inspect.Parameter.POSITIONAL_ONLY
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and is_last:
            parts.append("/")
    gives = signature.return_annotation
    after = "" if gives in (inspect.Signature.empty, None, "None") or inspect.isclass(value) else f" -> {_named(gives)}"
    line = f"{name}({', '.join(parts)}){after}"
    if len(line) <= 88:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){after}"


def _parameter(parameter: inspect.Parameter) -> str:
    star = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = star + parameter.name
    if parameter.annotation is not inspect.Parameter.empty:
        text += f": {_named(parameter.annotation)}"
    if parameter.default is not inspect.Parameter.empty:
        text += f" = {'...' if 'factory' in repr(parameter.default) else repr(parameter.default)}"
    return text


def _named(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    return re.sub(r"\b(?:typing|collections\.abc|backmerge(?:\.\w+)*)\.", "", text)
