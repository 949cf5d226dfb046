"""From what a user writes (a benchmark's name, or a file) to a benchmark of the kind that is needed."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

from backmerge.benchmarks.files import from_file
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, Kind
from backmerge.errors import ConfigError, DataError
from backmerge.records import Example, Message
from backmerge.registry import BENCHMARKS, NOTHING_ALLOWED, Permissions, is_plugin, resolve

LM_EVAL = "lm-eval:"  # and the harness's own name for the task
SAMPLING = {"num_samples", "temperature", "top_p", "top_k", "repetition_penalty"}


def named(text: str) -> BenchmarkSettings:
    """The settings that a word on the command line stands for: NAME, FILE, or NAME=DATA for a copy of its data."""
    name, equals, data = text.partition("=")
    if equals and (name in BENCHMARKS.entries or name.startswith(LM_EVAL)):
        return BenchmarkSettings(name=name, data=data)
    return BenchmarkSettings(name=text)


def find_benchmark(asked: str | BenchmarkSettings, kind: Kind, permissions: Permissions = NOTHING_ALLOWED) -> Benchmark:
    """The benchmark of that name, or of the prompts in that file.

    Raises:
        ConfigError: there is no such name, or it is of another kind.
        DataError: the file is missing or cannot be read.
    """
    settings = named(asked) if isinstance(asked, str) else asked
    needed = "utility" if kind == "keep" else kind  # what is to be kept is scored as utility is
    benchmark = find_of_any_kind(settings, needed, permissions)
    if benchmark.kind != needed:
        raise ConfigError(
            f"'{settings.name}' measures {benchmark.kind}, and is asked for as {kind}",
            remedy=f"put it under {benchmark.kind}.",
        )
    return replace(benchmark, kind=kind)


def find_of_any_kind(
    settings: BenchmarkSettings, kind_of_file: Kind, permissions: Permissions = NOTHING_ALLOWED
) -> Benchmark:
    """The benchmark of that name, whatever it measures; a file of prompts is of the kind that is given.

    Raises:
        ConfigError: there is no such name.
        DataError: the file is missing or cannot be read.
    """
    return _as_asked(_made(settings, kind_of_file, permissions), settings)


def _made(settings: BenchmarkSettings, kind: Kind, permissions: Permissions) -> Benchmark:
    name = settings.name
    if name.startswith(LM_EVAL):
        from backmerge.benchmarks.lm_eval_benchmark import lm_eval

        return lm_eval(settings, permissions)
    path = Path(name).expanduser()
    if name not in BENCHMARKS.entries and not (is_plugin(name) and not path.exists()):
        if path.is_file():
            return from_file(path, kind, settings)
        if path.suffix or "/" in name:
            raise DataError(f"there is no file '{name}'", remedy="give a .jsonl or .csv file, or a benchmark's name.")
    if settings.metrics:
        raise ConfigError(
            f"'{name}' has its own metrics, and {', '.join(settings.metrics)} are asked for",
            remedy="metrics are for your own files; leave them out.",
        )
    factory: Any = resolve(BENCHMARKS, name, permissions)
    if "permissions" in inspect.signature(factory).parameters:  # one that runs what models write
        made: Benchmark = factory(settings, permissions=permissions)
    else:
        made = factory(settings)
    return made


def _as_asked(benchmark: Benchmark, settings: BenchmarkSettings) -> Benchmark:
    """The benchmark with what the settings say otherwise."""
    if not benchmark.examples:
        raise DataError(f"'{settings.name}' holds no prompts of the kind that is asked for", remedy="check its data.")
    drawn = settings.model_dump(include=SAMPLING, exclude_none=True)
    if benchmark.choices is not None and (drawn or settings.prefill or settings.max_new_tokens):
        raise ConfigError(
            f"'{benchmark.name}' compares likelihoods and generates nothing",
            remedy="leave its sampling, its limit and its prefill out.",
        )
    return replace(
        benchmark,
        sampling={**benchmark.sampling, **drawn},
        max_new_tokens=settings.max_new_tokens or benchmark.max_new_tokens,
        examples=tuple(_example(e, settings) for e in benchmark.examples),
    )


def _example(example: Example, settings: BenchmarkSettings) -> Example:
    messages = example.messages
    if settings.system is not None and not settings.name.startswith(LM_EVAL) and settings.name != "bbh":
        messages = tuple(message for message in messages if message.role != "system")
        if settings.system:
            messages = (Message("system", settings.system), *messages)
    if messages == example.messages and not settings.prefill:
        return example
    return replace(example, messages=messages, prefill=settings.prefill or example.prefill)
