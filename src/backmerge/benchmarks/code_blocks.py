"""Find the code in a model's answer: the fenced block with the requested function, without the text around it."""

from __future__ import annotations

import ast
import builtins
import re
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from backmerge.generation.thoughts import separated

# an opening fence alone on its line; text after the language is ignored
_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<ticks>`{3,}|~{3,})[ \t]*(?P<language>[\w+-]*)(?P<rest>[^`\n]*)$", re.MULTILINE
)
_PYTHON = ("", "python", "py", "python3")
# the start of a line at the left margin, if it can be Python
_BEGINS_CODE = re.compile(r"(?:def|async def|class|import|from|@|[A-Za-z_]\w*[ \t]*(?::[^=\n]+)?=[^=])")
_MAX_TRIES = 400  # largest number of pairs of first and last lines that are tried


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        language: In lower case; empty if the fence names none.
        code: What is between the fences.
    """

    language: str
    code: str


def extract_code(answer: str, entry_point: str = "") -> str:
    """Return the code that defines a function, or is its body, from an answer with prose, examples and helpers.

    A thought at the beginning is not part of the answer. Of several fenced blocks marked as Python or not marked, the
    last one that defines the function counts, preferably one that is entirely Python; definitions that it needs from
    other blocks are put before it. If none defines it, the first indented one counts, since it may be a body, else the
    first. Without such blocks the code is the definition in the text, or else the whole text.

    Leading white space is kept, since an answer may be a function's body; only if the fence itself is indented, as in a
    list, its indentation is removed from the block's lines. A block that is never closed, such as when the limit cut
    the answer off, extends to the end.

    Args:
        answer: The model's answer.
        entry_point: The function's name; without one, the first block counts.
    """
    answer = separated(answer).answer
    if entry_point and _is_code(answer, entry_point):  # fences in it are part of a docstring
        return answer
    blocks = [block.code for block in fenced_blocks(answer) if block.language in _PYTHON]
    if not blocks:
        return _without_prose(answer, entry_point)
    defining = [code for code in blocks if entry_point and definition(entry_point).search(code)]
    if not defining:
        return next((code for code in blocks if _is_body(code)), blocks[0])
    chosen = next((code for code in reversed(defining) if _parsed(code) is not None), defining[-1])
    return _with_helpers(chosen, [code for code in blocks if code is not chosen])


def fenced_blocks(answer: str) -> Iterator[Block]:
    """Yield all fenced blocks in their order.

    A fence within a docstring closes nothing: among the fences that could close a block, the first one that makes the
    block valid Python counts, or the first of all if there is none.
    """
    position = 0
    while opening := _FENCE.search(answer, position):
        # a fence with four more spaces of indentation is part of the code, such as of a docstring
        closes = rf"^[ \t]{{0,{len(opening['indent']) + 3}}}{opening['ticks']}[`~]*[ \t\r]*$"
        closings = list(re.compile(closes, re.MULTILINE).finditer(answer, opening.end()))
        language = opening["language"].lower()
        start = min(opening.end() + 1, len(answer))
        found = closings[:1]
        if language in _PYTHON and len(closings) > 1:
            found = [c for c in closings if _is_module_or_body(_dedented(answer[start : c.start()], opening))][
                :1
            ] or found
        end = found[0].start() if found else len(answer)
        yield Block(language, _dedented(answer[start:end], opening))
        position = found[0].end() if found else len(answer)


def definition(name: str) -> re.Pattern[str]:
    """Return a pattern for a function's definition, or an assignment to its name, at the left margin."""
    escaped = re.escape(name)
    return re.compile(
        rf"^(?:(?:async[ \t]+)?def[ \t]+{escaped}[ \t]*\(|{escaped}[ \t]*(?::[^=\n]+)?=[^=])", re.MULTILINE
    )


def _dedented(code: str, opening: re.Match[str]) -> str:
    return "".join(line.removeprefix(opening["indent"]) for line in code.splitlines(keepends=True))


def _is_code(text: str, entry_point: str) -> bool:
    """Return whether a whole text is Python that defines the function, or an indented body."""
    if definition(entry_point).search(text):
        return _parsed(text) is not None
    return _is_body(text)


def _is_body(code: str) -> bool:
    return code[:1] in (" ", "\t") and _parsed(f"def _():\n{code}") is not None


def _is_module_or_body(code: str) -> bool:
    return _parsed(code) is not None or _is_body(code)


def _parsed(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings(action="ignore"):  # such as about escapes in regular expressions
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
        return None


def _without_prose(answer: str, entry_point: str) -> str:
    """Return the longest run of lines that is Python and defines the function; the whole answer if there is none."""
    if not entry_point or not definition(entry_point).search(answer):
        return answer
    lines = answer.splitlines(keepends=True)
    margins = [number for number, line in enumerate(lines) if line.strip() and line[0] not in " \t"]
    starts = [number for number in margins if _BEGINS_CODE.match(lines[number])]
    tries = ((start, end) for start in starts for end in reversed([*margins, len(lines)]) if end > start)
    for _, (start, end) in zip(range(_MAX_TRIES), tries, strict=False):
        code = "".join(lines[start:end])
        if definition(entry_point).search(code) and _parsed(code) is not None:
            return code
    return answer


def _with_helpers(chosen: str, others: list[str]) -> str:
    """Return the block, after the definitions and imports from other blocks that it needs."""
    tree = _parsed(chosen)
    if tree is None:
        return chosen
    offered: dict[str, str] = {}
    for code in others:
        parsed = _parsed(code)
        for statement in parsed.body if parsed is not None else ():
            for name in _bound(statement):
                offered[name] = ast.get_source_segment(code, _whole(statement)) or ""
    added: dict[str, str] = {}
    missing = _missing(tree)
    while wanted := sorted((missing & offered.keys()) - added.keys()):
        for name in wanted:
            added[name] = offered[name]
            missing |= _missing(_parsed(offered[name]) or ast.Module([], []))
    in_order = dict.fromkeys(source for name, source in offered.items() if name in added)
    return "".join(f"{source}\n" for source in in_order) + chosen


def _missing(tree: ast.Module) -> set[str]:
    """Return names that a piece of code reads but never binds."""
    read: set[str] = set()
    bound = set(dir(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
            bound.update(_bound(node))
    return read - bound


def _bound(statement: ast.stmt) -> list[str]:
    """Return the names that a definition, an import or an assignment of plain names binds."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return [alias.asname or alias.name.partition(".")[0] for alias in names]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case _:
            return []


def _whole(statement: ast.stmt) -> ast.stmt:
    """Return the statement with its decorators, which its position in the source does not include."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and statement.decorator_list:
        statement.lineno, statement.col_offset = statement.decorator_list[0].lineno, 0
    return statement
