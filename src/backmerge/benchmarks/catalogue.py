"""Turn a benchmark's name or a file, as the user gives it, into a benchmark of the required kind."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

from backmerge.benchmarks.files import from_file
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, Kind
from backmerge.errors import ConfigError, DataError
from backmerge.records import Example, Message
from backmerge.registry import BENCHMARKS, NOTHING_ALLOWED, Permissions, code_of, is_plugin, resolve

LM_EVAL = "lm-eval:"  # and the harness's own name for the task
SAMPLING = {"num_samples", "temperature", "top_p", "top_k", "repetition_penalty"}


def named(text: str) -> BenchmarkSettings:
    """Return the settings for a word on the command line: NAME, FILE, or NAME=DATA for a copy of its data."""
    name, equals, data = text.partition("=")
    if equals and (name in BENCHMARKS.entries or name.startswith(LM_EVAL)):
        return BenchmarkSettings(name=name, data=data)
    return BenchmarkSettings(name=text)


def find_benchmark(asked: str | BenchmarkSettings, kind: Kind, permissions: Permissions = NOTHING_ALLOWED) -> Benchmark:
    """Return the benchmark with that name, or of the prompts in that file.

    Raises:
        ConfigError: no benchmark has that name, or it is of another kind.
        DataError: the file is missing or cannot be read.
    """
    settings = named(asked) if isinstance(asked, str) else asked
    needed = "utility" if kind == "keep" else kind  # kept abilities are scored like utility
    benchmark = find_of_any_kind(settings, needed, permissions)
    if benchmark.kind != needed:
        raise ConfigError(
            f"'{settings.name}' measures {benchmark.kind}, but was given as {kind}",
            remedy=f"put it under {benchmark.kind}.",
        )
    return replace(benchmark, kind=kind)


def find_of_any_kind(
    settings: BenchmarkSettings, kind_of_file: Kind, permissions: Permissions = NOTHING_ALLOWED
) -> Benchmark:
    """Return the benchmark with that name, whatever it measures; a file of prompts gets the given kind.

    Raises:
        ConfigError: no benchmark has that name.
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
            f"'{name}' has its own metrics, but {', '.join(settings.metrics)} were given",
            remedy="metrics are for your own files; remove them.",
        )
    factory: Any = resolve(BENCHMARKS, name, permissions)
    if "permissions" in inspect.signature(factory).parameters:  # it runs code that models write
        made: Benchmark = factory(settings, permissions=permissions)
    else:
        made = factory(settings)
    return replace(made, code=code_of(name))


def _as_asked(benchmark: Benchmark, settings: BenchmarkSettings) -> Benchmark:
    """Return the benchmark with the changes that the settings make."""
    if not benchmark.examples:
        raise DataError(f"'{settings.name}' has no prompts of the required kind", remedy="check its data.")
    drawn = settings.model_dump(include=SAMPLING, exclude_none=True)
    if benchmark.choices is not None and (drawn or settings.prefill or settings.max_new_tokens):
        raise ConfigError(
            f"'{benchmark.name}' compares likelihoods and generates nothing",
            remedy="remove its sampling, its limit and its prefill.",
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
