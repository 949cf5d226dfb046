"""Lines of shell in the docs, held against the real commands: what each calls must exist, with these options."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

import typer
from tests.docs.blocks import ROOT

from backmerge import registry
from backmerge.cli import app
from backmerge.commands.application import USAGE_ERROR
from backmerge.config import Document, Settings, with_overrides
from backmerge.errors import BackmergeError
from backmerge.selection.settings import RuleName, SearchSettings

# whose options are not ours to know
FOREIGN = {
    "apt-get", "brew", "cat", "cd", "cmake", "conda", "cp", "curl", "docker", "echo", "export", "git", "grep", "head",
    "hf", "jq", "kubectl", "llama-cli", "llama-quantize", "llama-server", "ls", "mkdir", "module", "mv", "nvidia-smi",
    "ollama", "open", "podman", "ray", "rm", "sbatch", "scancel", "scontrol", "source", "sudo", "tar", "torchrun",
    "sleep", "unzip", "uv", "vllm", "wget", "xdg-open", "zensical", "ruff", "mypy", "pytest", "pre-commit",
    "[", "do", "done", "else", "exit", "fi", "for", "if", "set", "test", "then",
}  # fmt: skip
WRAPPERS = {"srun", "time", "env", "nohup", "exec", "uv", "then", "do", "else", "if", "!"}
OPERATORS = {"|", "||", "&&", ";", "&", "(", ")", "|&"}
REDIRECTS = {">", ">>", "<", "2>", "&>", ">&", "<<", "<<<"}
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=.*", re.DOTALL)

TABLES = {
    "judge": registry.JUDGES,
    "second_judge": registry.JUDGES,
    "engine": registry.ENGINES,
    "method": registry.METHODS,
    "task": registry.DATASETS,
    "safety": registry.BENCHMARKS,
    "over_refusal": registry.BENCHMARKS,
    "utility": registry.BENCHMARKS,
    "benchmark": registry.BENCHMARKS,
}
CHOICES: Mapping[str, tuple[str, ...]] = {
    "rule": get_args(RuleName),
    "search": get_args(SearchSettings.model_fields["name"].annotation),
    "executor": ("in-process", "pool", "ray"),
    "as_": ("checkpoint", "adapter", "auto"),
    "rounding": ("nearest", "stochastic"),
}


class Command(NamedTuple):
    """One simple command of a line.

    Attributes:
        words: Program and arguments.
        variables: What is assigned before it, for it alone.
        output: The file that it is written to.
    """

    words: tuple[str, ...]
    variables: Mapping[str, str]
    output: str | None = None


def commands_of(text: str) -> Iterator[tuple[int, Command]]:
    """The commands of a script in their order, with the line (from 0) that each begins on."""
    joined: list[tuple[int, str]] = []
    goes_on = False
    for number, line in enumerate(text.splitlines()):
        if goes_on:
            joined[-1] = (joined[-1][0], joined[-1][1] + " " + line.strip().removesuffix("\\"))
        else:
            joined.append((number, line.strip().removeprefix("$ ").removesuffix("\\")))
        goes_on = line.endswith("\\")
    for number, line in joined:
        yield from ((number, command) for command in _simple_commands(line))


def _simple_commands(line: str) -> Iterator[Command]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = "#"
    words: list[str] = []
    output = None
    parts = iter([*lexer, ";"])
    for part in parts:
        if part in REDIRECTS:
            target = next(parts)
            output = target if part.startswith(">") else output
        elif part == "(" and words and words[-1].endswith("="):  # a list for a variable
            words[-1] += " ".join(iter(lambda: next(parts), ")"))
        elif part in OPERATORS:
            if words:
                yield _unwrapped(words, output)
            words, output = [], None
        else:
            words.append(part)


def _unwrapped(words: list[str], output: str | None) -> Command:
    variables: dict[str, str] = {}
    left = list(words)
    while left:
        if _ASSIGNMENT.fullmatch(left[0]):
            name, _, value = left.pop(0).partition("=")
            variables[name] = value
        elif left[0] in WRAPPERS and len(left) > 1:
            left.pop(0)
            while left and left[0].startswith("-"):
                left.pop(0)
        else:
            break
    return Command(tuple(left), variables, output)


def ours(command: Command) -> tuple[str, ...] | None:
    """The arguments of `backmerge`, where that is what the command calls, by whatever way; else `None`."""
    if not command.words:
        return None
    program, *rest = command.words
    if program.rpartition("/")[2] == "backmerge":
        return tuple(rest)
    launches = program.rpartition("/")[2] in ("python", "python3", "accelerate", "torchrun")
    if launches and "backmerge" in rest and rest[rest.index("backmerge") - 1] == "-m":
        return tuple(rest[rest.index("backmerge") + 1 :])
    return None


def faults_of(command: Command) -> list[str]:
    """What is wrong with a command, as far as that can be told without running it."""
    arguments = ours(command)
    if arguments is not None:
        return _faults_of_ours(arguments)
    program, *rest = command.words or ("export",)
    program = program.rpartition("/")[2]
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        return [f"make has no target '{word}'" for word in rest if "=" not in word and word not in targets]
    if program in ("pip", "pip3"):
        return _unknown_extras(rest)
    if program in ("python", "python3", "accelerate", "torchrun"):
        return _faults_of_python(rest)
    known = program in FOREIGN
    return [] if known else [f"'{program}' is no command that these docs know: mend it, or add it to FOREIGN"]


def _faults_of_python(rest: list[str]) -> list[str]:
    if "-m" not in rest:
        return []
    module = rest[rest.index("-m") + 1]
    if module == "pip":
        return _unknown_extras(rest)
    if module.partition(".")[0] not in ("benchmarks", "backmerge", "experiments"):
        return []
    places = [ROOT / part / f"{module.replace('.', '/')}.py" for part in ("", "src")]
    packages = [place.with_suffix("") / "__main__.py" for place in places]
    return [] if any(place.exists() for place in (*places, *packages)) else [f"there is no module {module}"]


def _unknown_extras(words: list[str]) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = project["optional-dependencies"]
    asked = [
        extra
        for word in words
        for found in re.findall(r"(?:backmerge|^\.)\[([\w,-]+)\]", word)
        for extra in found.split(",")
    ]
    return [f"there is no extra '{extra}'" for extra in asked if extra not in known]


def _faults_of_ours(arguments: tuple[str, ...]) -> list[str]:
    group: Any = typer.main.get_command(app)
    if not arguments or arguments[0].startswith("-"):
        known = {"--help", "--version", "--install-completion", "--show-completion"}
        return [] if set(arguments) <= known else [f"backmerge has no {' '.join(arguments)}"]
    name, *rest = arguments
    command = group.commands.get(name)
    if command is None:
        return [f"backmerge has no command '{name}'"]
    try:
        with command.make_context(name, list(rest)) as context:
            return [*_unknown_names(context.params), *_wrong_overrides(name, context.params)]
    except USAGE_ERROR as error:
        return [f"backmerge {name}: {error.format_message()}"]
    except BackmergeError as error:
        return [f"backmerge {name}: {error}"]
    except typer.Exit:  # --help
        return []


def _unknown_names(parameters: Mapping[str, Any]) -> Iterator[str]:
    for option, value in parameters.items():
        for name in value if isinstance(value, (list, tuple)) else [value]:
            if option in CHOICES and name is not None and name not in CHOICES[option]:
                yield f"--{option.strip('_')} has no '{name}'"
            if option not in TABLES or name is None or _is_elsewhere(option, str(name)):
                continue
            if str(name).partition("=")[0] not in TABLES[option].entries:
                yield f"there is no {TABLES[option].noun} named '{name}'"


def _is_elsewhere(option: str, name: str) -> bool:
    """Whether a name is none of a table: a file, the user's own code, lm-eval's, or a word that stands for one."""
    return ":" in name or "/" in name or "." in name or name.isupper() or (option == "safety" and name == "none")


def _wrong_overrides(command: str, parameters: Mapping[str, Any]) -> Iterator[str]:
    """`--set` keys that the settings of this command do not have."""
    from backmerge.finetuning.settings import FinetuneSettings
    from backmerge.pipeline.checking import CheckSettings
    from backmerge.pipeline.single import SingleEvaluation
    from backmerge.planning.settings import Experiment

    kinds: dict[str, type[Settings]] = {
        "demo": Experiment,
        "run": Experiment,
        "restore": Experiment,
        "evaluate": SingleEvaluation,
        "check": CheckSettings,
        "finetune": FinetuneSettings,
    }
    if command not in kinds:
        return
    for override in parameters.get("set_") or ():
        keys = override.partition("=")[0].split(".")
        with_overrides(Document("the command line", {}, {}), [f"{keys[0]}={override.partition('=')[2]}"])
        if not has_key(kinds[command], keys):
            yield f"--set {override}: there is no such setting"


def has_key(kind: type[Settings], keys: list[str]) -> bool:
    """Whether settings have a key path; below a mapping of free keys anything goes."""
    current: Any = kind
    for key in keys:
        if key.isdecimal():
            continue
        inner = _settings_in(current)
        if not inner:
            return True
        field = next((one.model_fields[key] for one in inner if key in one.model_fields), None)
        if field is None:
            return False
        current = field.annotation
    return True


def _settings_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [kind for argument in get_args(annotation) for kind in _settings_in(argument)]
