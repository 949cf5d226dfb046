"""Map the names in experiment files and on the command line to their objects.

A table maps a name to `module:object`; nothing is imported until it is used. To add a method, a benchmark, a judge, an
engine or a data set: one new file, and one line here.

A name of the form `package.module:function` refers to a user's own code, without changes here. It runs that code, so it
needs `--allow-plugins`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from backmerge.errors import ConfigError


@dataclass(frozen=True)
class Permissions:
    """What the user allows a command to run. Pickles and a model's remote code are never run.

    Attributes:
        plugins: The user's own code, named as `package.module:function`.
        code_execution: Code that a model wrote; more weakly isolated if bubblewrap does not work.
    """

    plugins: bool = False
    code_execution: bool = False


NOTHING_ALLOWED = Permissions()


@dataclass(frozen=True)
class Table:
    """The names of one kind of object.

    Attributes:
        noun: The kind of an entry, for messages.
        entries: Name to `module:object`.
    """

    noun: str
    entries: Mapping[str, str]


MODELS = Table(
    "model",
    {
        "demo": "backmerge.demo:model_directory",
        "smollm2": "backmerge.demo.smollm2.model:aligned",
        "smollm2-shipped": "backmerge.demo.smollm2.model:shipped",
    },
)

METHODS = Table(
    "merge method",
    {
        "anchored": "backmerge.merging.methods.anchored:anchored",
        "arcee_fusion": "backmerge.merging.methods.arcee_fusion:arcee_fusion",
        "breadcrumbs": "backmerge.merging.methods.task_vectors:breadcrumbs",
        "breadcrumbs_ties": "backmerge.merging.methods.task_vectors:breadcrumbs_ties",
        "dare_linear": "backmerge.merging.methods.task_vectors:dare_linear",
        "dare_ties": "backmerge.merging.methods.task_vectors:dare_ties",
        "della": "backmerge.merging.methods.task_vectors:della",
        "della_linear": "backmerge.merging.methods.task_vectors:della_linear",
        "karcher": "backmerge.merging.methods.karcher:karcher",
        "linear": "backmerge.merging.methods.linear:linear",
        "model_stock": "backmerge.merging.methods.model_stock:model_stock",
        "multislerp": "backmerge.merging.methods.multislerp:multislerp",
        "nearswap": "backmerge.merging.methods.nearswap:nearswap",
        "nuslerp": "backmerge.merging.methods.nuslerp:nuslerp",
        "resta": "backmerge.merging.methods.resta:resta",
        "safe_lora": "backmerge.merging.methods.safe_lora:safe_lora",
        "safemerge": "backmerge.merging.methods.safemerge:safemerge",
        "slerp": "backmerge.merging.methods.slerp:slerp",
        "task_arithmetic": "backmerge.merging.methods.task_vectors:task_arithmetic",
        "ties": "backmerge.merging.methods.task_vectors:ties",
    },
)

BENCHMARKS = Table(
    "benchmark",
    {
        "advbench": "backmerge.benchmarks.advbench:advbench",
        "bbh": "backmerge.benchmarks.bbh:bbh",
        "chatdoctor": "backmerge.benchmarks.chatdoctor:chatdoctor",
        "demo-advice": "backmerge.demo.stand_ins:advice_benchmark",
        "demo-harmful": "backmerge.demo.benchmarks:harmful",
        "demo-harmless": "backmerge.demo.benchmarks:harmless",
        "demo-plans": "backmerge.demo.benchmarks:plans",
        "demo-programs": "backmerge.demo.stand_ins:program_benchmark",
        "demo-steps": "backmerge.demo.stand_ins:step_benchmark",
        "harmbench": "backmerge.benchmarks.harmbench:harmbench",
        "hexphi": "backmerge.benchmarks.hexphi:hexphi",
        "humaneval": "backmerge.benchmarks.humaneval:humaneval",
        "jailbreakbench": "backmerge.benchmarks.jailbreakbench:jailbreakbench",
        "jailbreakbench-benign": "backmerge.benchmarks.jailbreakbench:jailbreakbench_benign",
        "openfunctions": "backmerge.benchmarks.openfunctions:openfunctions",
        "or-bench-hard": "backmerge.benchmarks.or_bench:or_bench_hard",
        "sorry-bench": "backmerge.benchmarks.sorry_bench:sorry_bench",
        "smollm2-reasoning": "backmerge.demo.smollm2.task:reasoning_benchmark",
        "strongreject": "backmerge.benchmarks.strongreject:strongreject",
        "wildjailbreak": "backmerge.benchmarks.wildjailbreak:wildjailbreak",
        "wildjailbreak-benign": "backmerge.benchmarks.wildjailbreak:wildjailbreak_benign",
        "xstest": "backmerge.benchmarks.xstest:xstest",
        "xstest-unsafe": "backmerge.benchmarks.xstest:xstest_unsafe",
    },
)

JUDGES = Table(
    "judge",
    {
        "demo-rule": "backmerge.demo.benchmarks:demo_rule",
        "harmbench": "backmerge.judging.harmbench:harmbench",
        "llama-guard-3": "backmerge.judging.llama_guard:llama_guard",
        "refusal-phrases": "backmerge.judging.refusal_phrases:refusal_phrases",
        "rubric": "backmerge.judging.rubric:rubric",
        "strongreject": "backmerge.judging.strongreject:strongreject",
        "wildguard": "backmerge.judging.wildguard:wildguard",
    },
)

ENGINES = Table(
    "engine",
    {
        "openai": "backmerge.generation.openai_engine:OpenAIEngine",
        "transformers": "backmerge.generation.transformers_engine:TransformersEngine",
        "vllm": "backmerge.generation.vllm_engine:VllmEngine",
    },
)

DATASETS = Table(
    "data set",
    {
        "code": "backmerge.finetuning.tasks.code:code",
        "demo-advice": "backmerge.demo.stand_ins:advice_examples",
        "demo-plans": "backmerge.demo.benchmarks:plan_examples",
        "demo-programs": "backmerge.demo.stand_ins:program_examples",
        "demo-steps": "backmerge.demo.stand_ins:step_examples",
        "medical": "backmerge.finetuning.tasks.medical:medical",
        "reasoning": "backmerge.finetuning.tasks.reasoning:reasoning",
        "smollm2-reasoning": "backmerge.demo.smollm2.task:reasoning_examples",
        "tools": "backmerge.finetuning.tasks.tools:tools",
    },
)

# figures that results draw of themselves; the code is in packages above them
FIGURES = Table("figure", {"curves": "backmerge.reporting.plots:curves", "scores": "backmerge.reporting.plots:scores"})

TRACKERS = Table(
    "tracker",
    {
        "mlflow": "backmerge.sharing.mlflow_tracker:log",
        "trackio": "backmerge.sharing.trackio_tracker:log",
        "wandb": "backmerge.sharing.wandb_tracker:log",
    },
)


def closest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the known name that is most similar to `name`, or nothing."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def is_plugin(name: str) -> bool:
    """Return whether a name refers to a user's own code, as `package.module:function`."""
    module, _, attribute = name.partition(":")
    return attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def code_of(name: str) -> str:
    """Return a hash of the source file that a user's own code is in, once it is imported; empty for all other names."""
    module = name.partition(":")[0]
    if not is_plugin(name) or module not in sys.modules or module.partition(".")[0] == __name__.partition(".")[0]:
        return ""
    try:
        return xxhash.xxh3_128_hexdigest(inspect.getsource(sys.modules[module]).encode())
    except (OSError, TypeError):  # compiled, or typed at a prompt
        return ""


def resolve(table: Table, name: str, permissions: Permissions = NOTHING_ALLOWED) -> Any:
    """Return the object behind a name.

    Raises:
        ConfigError: the table has no such name, or a plugin is not permitted or cannot be imported.
    """
    if name in table.entries:
        module, _, attribute = table.entries[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
    if not is_plugin(name):
        raise ConfigError(
            f"there is no {table.noun} named '{name}'{closest(name, table.entries)}",
            remedy=f"known: {', '.join(sorted(table.entries))}; or your own code, as package.module:function.",
        )
    if not permissions.plugins:
        raise ConfigError(
            f"the {table.noun} '{name}' is your own code, which needs permission to run",
            remedy="add --allow-plugins if you trust it.",
        )
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the {table.noun} '{name}' cannot be imported: {error}",
            remedy="put its folder on PYTHONPATH and check the spelling.",
        ) from error
