"""Pages carried out as a reader would: in a folder of their own, from the first block to the last."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from tests.docs.blocks import ROOT, Block, blocks_of
from tests.docs.shell import commands_of, faults_of, ours

from backmerge.config import Document, load_yaml, validated
from backmerge.errors import ConfigError
from backmerge.merging.mergekit.file import read_mergekit
from backmerge.pipeline.suite import Suite
from backmerge.planning.settings import Experiment

SHOWN = ("text", "output", "console", "mermaid", "html", "diff", "dockerfile", "ini", "bibtex", "markdown", "latex")
SHELL = ("sh", "bash", "shell")

Run = Callable[[tuple[str, ...]], tuple[int, str, str]]


def pages() -> list[Path]:
    """Every page whose code is held to this."""
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """A page's path from the root."""
    return page.relative_to(ROOT).as_posix()


def faults_of_block(block: Block, folder: Path) -> list[str]:
    """What is wrong with a block, as far as that can be told without running it.

    Args:
        block: Any.
        folder: To write settings to, since they are read from files.
    """
    if block.reason == "":
        return ["it is not run, and no reason is given"]
    if block.language in SHELL:
        syntax = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True, check=False).stderr
        found = [f"{fault} (line {block.line + at})" for at, one in commands_of(block.text) for fault in faults_of(one)]
        return [syntax, *found] if syntax else found
    checks: Mapping[str, Callable[[str], object]] = {
        "python": check_python,
        "json": json.loads,
        "jsonl": lambda text: [json.loads(line) for line in text.splitlines() if line.strip()],
        "toml": tomllib.loads,
        "yaml": lambda text: check_yaml(text, folder),
        "csv": lambda _: None,
    }
    if block.language in SHOWN:
        return []
    if block.language not in checks:
        return [] if block.reason else [f"'{block.language}' is no language that can be checked"]
    try:
        checks[block.language](block.text)
    except Exception as error:  # noqa: BLE001 - boundary: whatever a parser or a validator says is the finding
        return [f"{type(error).__name__}: {error}"]
    return []


def check_python(text: str) -> None:
    """It compiles, and what it imports of ours is there."""
    tree = compile(text, "block", "exec", ast.PyCF_ONLY_AST)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "backmerge":
            try:
                module = importlib.import_module(node.module or "")
            except (ConfigError, ModuleNotFoundError) as error:  # an extra that is not installed here
                if str(getattr(error, "name", "")).startswith("backmerge"):
                    raise
                continue
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {', '.join(missing)}"


def check_yaml(text: str, folder: Path) -> None:
    """YAML for us or mergekit must say what they know; of an experiment a part will do."""
    for values in yaml.safe_load_all(text):
        if not isinstance(values, dict):
            continue
        if "merge_method" in values:
            place = folder / "mergekit.yml"
            place.write_text(text, encoding="utf-8")
            read_mergekit(load_yaml(place))
        elif "experiments" in values:
            validated(Suite, Document("the block", values, {}))
        elif values.keys() & Experiment.model_fields.keys():
            for key in ("extends", "scales"):  # of files, not of experiments
                values.pop(key, None)
            whole: dict[str, Any] = {"base": "demo", **values}
            if not values.keys() & {"tuned", "finetune"}:
                whole["tuned"] = ["tuned"]
            whole["evaluate"] = {"utility": ["u.jsonl"], "safety": ["s.csv"], **(values.get("evaluate") or {})}
            validated(Experiment, Document("the block", whole, {}))


def carry_out(page: Path, *, run: Run, runs_shell: bool, is_exact: bool = True) -> None:
    """Run a page's blocks in the present folder; fails at the first that does not do what the page says.

    A block with a title is written to that file. Python blocks share their names. What follows a block as `text` is
    what it prints: of Python to the letter if `is_exact`, else and of commands but for numbers and white space, `...`
    standing for any lines, or for the rest of one.
    """
    with _modules_of_this_folder():
        _carry_out(page, run, runs_shell=runs_shell, is_exact=is_exact)


def _carry_out(page: Path, run: Run, *, runs_shell: bool, is_exact: bool) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    printed: tuple[str, bool] | None = None
    for block in blocks_of(page):
        place = f"{name_of(page)}, line {block.line}"
        if block.language == "text" and printed is not None and block.reason is None:
            _compare(printed[0], block.text, place, is_exact=printed[1])
        printed = None
        if block.title is not None:
            target = Path(block.title)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        elif block.reason is not None:
            continue
        elif block.language == "python":
            stream = io.StringIO()
            with contextlib.redirect_stdout(stream), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other libraries': a reader sees them, and continues
                exec(compile("\n" * (block.line - 1) + block.text, name_of(page), "exec"), names)  # noqa: S102 - ours
            printed = stream.getvalue(), is_exact
        elif block.language in SHELL and runs_shell:
            printed = _shell(block, run, place), False


def _shell(block: Block, run: Run, place: str) -> str:
    shown = ""
    for _, command in commands_of(block.text):
        arguments = ours(command)
        if arguments is None:
            continue
        with _variables(command.variables):
            code, out, errors = run(arguments)
        assert code == 0, f"{place}: {' '.join(command.words)} ended with {code}:\n{errors}\n{out}"
        if command.output:
            Path(command.output).write_text(out, encoding="utf-8")
        else:
            shown += out
    return shown


@contextlib.contextmanager
def _variables(given: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(given)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _modules_of_this_folder() -> Iterator[None]:
    """A page's own modules can be imported, as in a Python that was started here, and are forgotten after it."""
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", None) or "").startswith(folder):
                del sys.modules[name]


def as_installed(arguments: tuple[str, ...]) -> tuple[int, str, str]:
    """Run the command as a separate process."""
    command = [sys.executable, "-m", "backmerge", *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=900
    )
    return done.returncode, done.stdout, ""


def _compare(printed: str, shown: str, place: str, *, is_exact: bool) -> None:
    if is_exact:
        assert printed.strip() == shown.strip(), f"{place}: it prints\n{printed}"
        return
    found = [_shape(line) for line in printed.splitlines() if _shape(line)]
    at = 0
    is_free = False
    for line in shown.splitlines():
        wanted = _shape(line)
        if not wanted:
            continue
        if wanted == "...":
            is_free = True
            continue
        whole, _, _ = wanted.partition("...")
        matches = str.startswith if wanted.endswith("...") else str.__eq__
        places = [i for i in range(at, len(found)) if matches(found[i], whole.rstrip())]
        is_there = bool(places) and (is_free or places[0] == at)
        assert is_there, f"{place}: no such line here: {line}\nprinted:\n{printed}"
        at, is_free = places[0] + 1, False


def _shape(line: str) -> str:
    """A line without its numbers, frames and spaces, which depend on the machine."""
    return re.sub(r"[\u2500-\u257f\s]+", " ", re.sub(r"[+−-]?\d[\d,.]*", "#", line)).strip()
