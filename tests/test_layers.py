"""Which room may import which, what the command line may load to print its help, and what no file may do."""

import ast
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "backmerge"

# The table of layers, lowest first: a file imports only from its own layer and from those before it.
LAYERS = (
    "errors",
    "progress",
    "records",
    "rows",
    "registry",
    "config",
    "statistics",
    "execution",
    "sandbox",
    "outputs",
    "runs",
    "checkpoints",
    "merging",
    "generation",
    "judging",
    "benchmarks",
    "finetuning",
    "selection",
    "results",
    "planning",
    "measuring",
    "reporting",
    "pipeline",
    "demo",
    "doctor",
    "sharing",
    "api",
    "commands",
    "cli",
)
# The package's own face may show anything that it has; `python -m backmerge` is the command line.
EXEMPT = ("__init__", "__main__")
PICKLES = ("pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve")


@functools.cache
def nodes_of(text: str) -> tuple[ast.AST, ...]:
    """The imports and calls of a file."""
    return tuple(n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import | ast.ImportFrom | ast.Call))


def sources(package: Path) -> list[Path]:
    """The package's Python files, in a fixed order."""
    return sorted(package.rglob("*.py"))


def layer_of(path: Path, package: Path) -> str:
    """The room that a file lies in: its folder or module directly under the package."""
    return path.relative_to(package).with_suffix("").parts[0]


def imports(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Every `(line, dotted name)` that a file imports, also within functions and under TYPE_CHECKING.

    `from a import b` counts as `a.b`, since b may be a module; relative imports are made absolute.
    """
    parents = (package.name, *path.relative_to(package).parts[:-1])
    for node in nodes_of(path.read_text(encoding="utf-8")):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) + 1 - node.level] if node.level else ()
            origin = ".".join((*above, *filter(None, [node.module])))
            yield from ((node.lineno, f"{origin}.{alias.name}") for alias in node.names)


def upward_imports(package: Path) -> list[str]:
    """One line for each module that the table does not name and for each import of a higher layer."""
    height = {layer: place for place, layer in enumerate(LAYERS)}
    found = []
    for path in sources(package):
        layer, where = layer_of(path, package), path.relative_to(package.parent)
        if layer in EXEMPT:
            continue
        if layer not in height:
            found.append(f"{where}: {layer} has no place in LAYERS, in tests/test_layers.py")
            continue
        for line, name in imports(path, package):
            root, room = [*name.split("."), ""][:2]
            if root == package.name and height.get(room, -1) > height[layer]:
                found.append(f"{where}:{line} imports {name}, which is above {layer}")
    return found


def importers(package: Path, library: str) -> list[str]:
    """The files that import a library."""
    return [
        str(path.relative_to(package))
        for path in sources(package)
        if any(name.split(".")[0] == library for _, name in imports(path, package))
    ]


def pickle_uses(package: Path) -> list[str]:
    """One line for each import of a pickling library and each `torch.load` without `weights_only=True`."""
    found = []
    for path in sources(package):
        where = path.relative_to(package.parent)
        for line, name in imports(path, package):
            if name.split(".")[0] in PICKLES or name == "torch.load":
                found.append(f"{where}:{line} imports {name}")
        for node in nodes_of(path.read_text(encoding="utf-8")):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if given.get("weights_only") != "True":
                    found.append(f"{where}:{node.lineno} calls torch.load without weights_only=True")
    return found


def loaded_by(*arguments: str) -> set[str]:
    """The top-level packages that `python ARGUMENTS` imports; it must exit with 0."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    timed = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
    return {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in timed}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A package of our name with a lower room, a higher one and a face: no rule is broken in it."""
    package = tmp_path / "backmerge"
    for name, text in {
        "__init__.py": "from backmerge.cli import main\n",
        "errors.py": "import json\n",
        "records.py": "from backmerge import __version__\nfrom backmerge.errors import BackmergeError\n",
        "merging/__init__.py": "",
        "merging/engine.py": "from backmerge import records\nfrom backmerge.merging import recipe\n",
        "merging/recipe.py": "import numpy\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    return package


def test_imports_run_only_downwards() -> None:
    """Every file imports only its own layer and lower ones."""
    found = upward_imports(PACKAGE)
    assert not found, "\n".join(["imports run only downwards:", *found])


def test_a_sound_tree_passes(tree: Path) -> None:
    """Nothing is found in a tree that keeps the rules, so what is found below is the change's doing."""
    assert upward_imports(tree) == []
    assert importers(tree, "ray") == []
    assert pickle_uses(tree) == []


@pytest.mark.parametrize(
    "statement",
    [
        "import backmerge.pipeline",
        "import backmerge.pipeline as stages",
        "from backmerge import pipeline",
        "from backmerge.pipeline import run",
        "from backmerge.pipeline.stages import run",
        "from ..pipeline import run",
        "from .. import pipeline",
        "def late():\n    from backmerge.pipeline import run",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from backmerge.pipeline import Run",
    ],
)
def test_an_upward_import_is_found_however_it_is_written(tree: Path, statement: str) -> None:
    """The guard sees absolute and relative imports, those in functions and those for types only."""
    (tree / "merging" / "engine.py").write_text(f"{statement}\n")
    (found,) = upward_imports(tree)
    line = statement.count("\n") + 1
    assert found.startswith(f"backmerge/merging/engine.py:{line} imports backmerge.pipeline")
    assert found.endswith("which is above merging")


def test_a_module_without_a_place_is_found(tree: Path) -> None:
    """A new room must be given its place in the table."""
    (tree / "utils.py").write_text("")
    (found,) = upward_imports(tree)
    assert found == "backmerge/utils.py: utils has no place in LAYERS, in tests/test_layers.py"


def test_only_execution_imports_ray(tree: Path) -> None:
    """Ray is an extra, and one file knows of it."""
    assert importers(PACKAGE, "ray") in ([], ["execution/ray_cluster.py"])
    (tree / "merging" / "engine.py").write_text("def late():\n    from ray.util import queue\n")
    assert importers(tree, "ray") == ["merging/engine.py"]


def test_nothing_unpickles() -> None:
    """No file imports a pickling library or calls `torch.load` without `weights_only=True`."""
    found = pickle_uses(PACKAGE)
    assert not found, "\n".join(["safetensors only, and torch.load with weights_only=True:", *found])


@pytest.mark.parametrize(
    "statement",
    [
        "import pickle",
        "from pickle import loads",
        "from torch import load",
        "import torch\nweights = torch.load('weights.bin')",
        "import torch\nweights = torch.load('weights.bin', weights_only=False)",
        "import torch\nweights = torch.load('weights.bin', weights_only=careful)",
    ],
)
def test_unpickling_is_found_however_it_is_written(tree: Path, statement: str) -> None:
    """The guard sees each way to unpickle, and lets the safe call through."""
    (tree / "merging" / "engine.py").write_text(f"{statement}\n")
    assert len(pickle_uses(tree)) == 1
    (tree / "merging" / "engine.py").write_text("import torch\ntorch.load('w.bin', weights_only=True)\n")
    assert pickle_uses(tree) == []


@pytest.mark.parametrize("command", [(), ("merge",)], ids=["backmerge", "backmerge merge"])
def test_help_loads_no_heavy_library(command: tuple[str, ...]) -> None:
    """`--help` answers without torch, transformers, or what brings them in."""
    heavy = {"torch", "transformers", "peft", "accelerate", "datasets", "scipy", "matplotlib"}
    assert loaded_by("-m", "backmerge", *command, "--help") & heavy == set()


def test_what_a_command_loads_is_seen() -> None:
    """The measure of the test above finds a library that is imported late, by a submodule's name."""
    assert {"xml", "wave"} <= loaded_by("-c", "import xml.dom\ndef late():\n    import wave\nlate()")


def test_methods_are_read_without_torch() -> None:
    """The parameters of every merge method, and the merging of adapters, load no torch."""
    code = (
        "from backmerge.merging.method import find_method; from backmerge.registry import METHODS\n"
        "print(len([find_method(name).parameters for name in METHODS.entries])); import backmerge.merging.lowrank"
    )
    assert loaded_by("-c", code) & {"torch", "transformers", "peft"} == set()
