"""`backmerge score`: score answers made elsewhere, or judge the answers of an earlier run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from backmerge.commands.options import CodeExecution, Plugins
from backmerge.errors import ConfigError
from backmerge.registry import Permissions


def score(
    completions: Annotated[
        Path, typer.Argument(help='JSON Lines of {"id", "completion"}, or an earlier run directory.')
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for results.json and the records.")],
    benchmark: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="The benchmark that the answers are for; NAME=DATA to use your copy of its data."
        ),
    ] = None,
    kind: Annotated[str, typer.Option(help="Kind of a FILE of prompts: utility, safety or over_refusal.")] = "utility",
    judge: Annotated[str, typer.Option(help="Decides whether answers are harmful or refusals.")] = "refusal-phrases",
    partial: Annotated[bool, typer.Option("--partial", help="Accept that some prompts have no answer.")] = False,
    max_unscored: Annotated[float, typer.Option(help="Largest accepted share of unscored answers.")] = 0.02,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of a judge that is a model, e.g. model=FOLDER with --judge rubric.",
        ),
    ] = None,
    allow_plugins: Plugins = False,
    allow_code_execution: CodeExecution = False,
) -> None:
    """Score existing answers. If an id occurs several times, the answers are samples for that prompt.

    Example: backmerge score answers.jsonl --benchmark humaneval=HumanEval.jsonl.gz --out runs/scored

    Judge an earlier run again with another judge: backmerge score runs/mine --judge wildguard --out runs/mine-wildguard
    """
    from backmerge.commands.options import check_choice
    from backmerge.config import Document, validated, with_overrides
    from backmerge.generation.quiet import quieten
    from backmerge.judging.protocol import JudgeSettings
    from backmerge.pipeline.rescoring import is_run, judge_again, score_answers
    from backmerge.reporting.console import print_scores

    quieten()
    check_choice("--kind", kind, ("utility", "safety", "over_refusal"))
    settings = validated(JudgeSettings, with_overrides(Document("the command line", {"name": judge}, {}), set_ or ()))
    permissions = Permissions(allow_plugins, allow_code_execution)
    if is_run(completions):
        if benchmark is not None:
            raise ConfigError("an earlier run records its benchmarks", remedy="omit --benchmark.")
        results = judge_again(completions, settings, out, max_unscored=max_unscored, permissions=permissions)
    elif benchmark is None:
        raise ConfigError(
            "--benchmark is missing: which prompts do the answers belong to?",
            remedy="for example --benchmark humaneval.",
        )
    else:
        asked: Any = kind
        results = score_answers(
            completions,
            benchmark,
            settings,
            out,
            kind=asked,
            is_partial=partial,
            max_unscored=max_unscored,
            permissions=permissions,
        )
    print_scores(results, out)
