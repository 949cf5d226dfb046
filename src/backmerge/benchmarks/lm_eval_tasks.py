"""Find tasks of lm-evaluation-harness by name without indexing all of them, and load them as the harness would.

The harness's `TaskManager` reads some 14,000 YAML files before it can find a name, which takes seconds on a warm disk
and more on a cold one. Most names need few folders: those with files that mention it, or mention a name that it refers
to. Everything is indexed only if a name refers to a tag, which any file may join.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import io
import logging
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from backmerge.errors import ConfigError, DataError
from backmerge.registry import NOTHING_ALLOWED, Permissions, closest

OLDEST = (0, 4, 12)  # the first with `TaskManager.load`
# the seeds that `simple_evaluate` sets before it loads tasks: some draw shots or shuffle choices from global state
RANDOM_SEED, OTHER_SEED = 0, 1234

Rows = Mapping[str, Sequence[Mapping[str, Any]]]  # split to rows


@dataclass(frozen=True)
class HarnessTasks:
    """The tasks that a name means in the harness.

    Attributes:
        tasks: Name to `lm_eval.api.task.Task`, every leaf, in the harness's order.
        groups: Name to `lm_eval.api.group.Group`; empty for a single task.
    """

    tasks: Mapping[str, Any]
    groups: Mapping[str, Any]


def harness_version() -> str:
    """Return the installed version of lm-eval.

    Raises:
        ConfigError: it is not installed, or too old.
    """
    remedy = "pip install 'backmerge[lm-eval]'"
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("tasks of lm-eval need the package lm-eval, which is not installed", remedy=remedy) from None
    if tuple(int(part) for part in re.findall(r"\d+", version)[:3]) < OLDEST:
        raise ConfigError(
            f"lm-eval {version} is installed, but {'.'.join(map(str, OLDEST))} or later is needed", remedy=remedy
        )
    return version


def load_harness_tasks(
    name: str,
    *,
    num_fewshot: int | None = None,
    task_path: Path | None = None,
    rows: Mapping[str, Rows] | None = None,
    permissions: Permissions = NOTHING_ALLOWED,
) -> HarnessTasks:
    """Load a task, a group or a tag, with its data; with the shots and seeds of `lm_eval.simple_evaluate`.

    Args:
        name: Its name in the harness.
        num_fewshot: Number of shots; by default the task's own. A task with 0 stays at 0.
        task_path: A YAML file, or a folder of them, of the user's own, in addition to the harness's.
        rows: Task name to data, used instead of the task's data from the hub.
        permissions: Task files can run code, by `!function` and by templates; the user's own files need permission.

    Raises:
        ConfigError: unknown task, lm-eval is missing or old, or code is not allowed.
        DataError: the task's data is not available, or the task is of a kind that is not supported.
    """
    harness_version()
    if task_path is not None and not permissions.plugins:
        raise ConfigError(
            f"{task_path} may run code: task files name functions, and their templates are programs",
            remedy="add --allow-plugins if you trust it.",
        )
    manager = _manager(name, task_path)
    if name not in manager.task_index:
        raise ConfigError(
            f"lm-eval has no task, group or tag named '{name}'{closest(name, manager.all_tasks)}",
            remedy="`lm-eval ls tasks` lists them; for your own task, give the path of its YAML.",
        )
    loaded = _loaded(manager, name, rows)
    for task in loaded.tasks.values():
        _check(task)
        if num_fewshot is not None and task.config.num_fewshot != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=OTHER_SEED)
    return loaded


def _manager(name: str, task_path: Path | None) -> Any:
    """Return a `TaskManager` with the name and everything that it refers to, and little else if possible."""
    from lm_eval import tasks
    from lm_eval.tasks import TaskManager

    own: list[str] = []
    if task_path is not None:
        if not task_path.exists():
            raise ConfigError(f"there is no file {task_path}", remedy="give a YAML file, or a folder of them.")
        own = [str(task_path if task_path.is_dir() else task_path.parent)]
        manager = TaskManager(include_defaults=False, include_path=own)
        if not _unknown(manager.task_index, name):
            return manager
    built_in = Path(tasks.__file__).parent
    texts = {path: path.read_bytes() for path in built_in.rglob("*.yaml")}
    folders: set[Path] = set()
    wanted = {name}
    while True:
        mentioned = {path.parent for path, text in texts.items() if _mentions(text, wanted)}
        if mentioned <= folders:
            return TaskManager(include_path=own or None)
        folders |= mentioned
        # the harness takes the first of two tasks with one name by path, but the last of two folders
        roots = sorted((folder for folder in folders if not folders & set(folder.parents)), reverse=True)
        manager = TaskManager(include_defaults=False, include_path=[*map(str, roots), *own])
        wanted = _unknown(manager.task_index, name)
        if not wanted:
            return manager


def _mentions(text: bytes, names: Iterable[str]) -> bool:
    return any(
        name.encode() in text and re.search(rb"(?<![\w.-])" + re.escape(name.encode()) + rb"(?![\w.-])", text)
        for name in names
    )


def _unknown(index: Mapping[str, Any], name: str) -> set[str]:
    """Return names that `name` refers to and that the index does not have, or has as tags (perhaps incomplete)."""
    unknown: set[str] = set()
    seen: set[str] = set()
    waiting = [name]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        entry = index.get(current)
        if entry is None or entry.kind.name == "TAG":
            unknown.add(current)
        elif entry.kind.name == "GROUP":
            waiting += _members(entry.cfg)
    return unknown


def _members(group: Mapping[str, Any]) -> Iterator[str]:
    """Yield names that a group's configuration refers to, without those that it defines inline."""
    listed = group.get("task")
    for item in listed if isinstance(listed, list) else []:
        if isinstance(item, str):
            yield item
        elif isinstance(item.get("task"), list):
            yield from _members(item)
        elif "dataset_path" not in item:
            yield item.get("group") or item["task"]


def _loaded(manager: Any, name: str, rows: Mapping[str, Rows] | None) -> HarnessTasks:
    spec: Any = name
    entry = manager.task_index[name]
    if rows is not None:
        members = [name] if entry.kind.name != "GROUP" else list(_members(entry.cfg))
        missing = sorted(set(members) - rows.keys())
        if missing:
            raise DataError(f"no data given for {len(missing)} tasks of '{name}', such as '{missing[0]}'")
        # the harness applies a group member's own keys on top of the task's file
        own = [{"task": task, "dataset_name": None, "custom_dataset": _Data(rows[task])} for task in members]
        if entry.kind.name == "GROUP":
            manager.task_index[name] = replace(entry, yaml_path=None, cfg={**entry.cfg, "task": own})
        else:
            spec = {"group": "data of the user's own", "task": own}
    try:
        found = manager.load(spec)
    except ImportError as error:
        raise DataError(
            f"lm-eval's task '{name}' needs a package that is not installed: {error}",
            remedy=f"pip install {error.name}" if error.name else "install the package that it names.",
        ) from error
    except (OSError, ValueError) as error:  # datasets raises both if a download fails
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"the data of lm-eval's task '{name}' could not be downloaded: {reason}",
            remedy="go online once to fill the hub's cache, or use a task file with your own copy.",
        ) from error
    return HarnessTasks(found["tasks"], found.get("groups", {}) if spec is name else {})


class _Data:
    """Rows as the harness's `custom_dataset`."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __call__(self, **_: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({split: Dataset.from_list([dict(row) for row in rows]) for split, rows in self.rows.items()})


def _check(task: Any) -> None:
    """Raises: DataError for tasks that run code or need images or sound."""
    if getattr(task, "UNSAFE_CODE", False):
        raise DataError(
            f"lm-eval's task '{task.task_name}' runs model-written code in this process, with all its rights",
            remedy="use the benchmark 'humaneval', which runs it in a sandbox.",
        )
    if getattr(task, "MULTIMODAL", False):
        raise DataError(f"lm-eval's task '{task.task_name}' needs a model for images or sound")


@contextlib.contextmanager
def as_the_harness_runs() -> Iterator[None]:
    """Set the harness's seeds and restore the caller's random state afterwards; keep its notes off the terminal.

    Load tasks, build their prompts and score within this context: some shuffle choices from global state when they do.
    """
    import numpy as np
    from lm_eval import utils

    logger = logging.getLogger("lm_eval")
    level, python, numpy = logger.level, random.getstate(), np.random.get_state()
    logger.setLevel(logging.ERROR)
    random.seed(RANDOM_SEED)
    np.random.seed(OTHER_SEED)
    # the harness compiles its templates again for every row, which is most of its time
    utils.env.from_string = functools.lru_cache(maxsize=1024)(utils.env.from_string)
    try:
        yield
    finally:
        del utils.env.from_string
        logger.setLevel(level)
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep the harness's progress bars off the terminal: they are for milliseconds of work."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
