"""`backmerge score`: answers made elsewhere, or an earlier run's answers seen by another judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from backmerge.commands.options import Plugins
from backmerge.errors import ConfigError
from backmerge.registry import Permissions


def score(
    completions: Annotated[
        Path, typer.Argument(help='JSON Lines of {"id", "completion"}, or an earlier run directory.')
    ],
    out: Annotated[Path, typer.Option("--out", help="Where results.json and the records go.")],
    benchmark: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="What the answers answer; NAME=DATA with your copy of its data."),
    ] = None,
    kind: Annotated[str, typer.Option(help="Of a FILE of prompts: utility, safety, over_refusal.")] = "utility",
    judge: Annotated[str, typer.Option(help="Finds refusals and harm.")] = "refusal-phrases",
    partial: Annotated[bool, typer.Option("--partial", help="Score what is answered, though not all is.")] = False,
    max_unscored: Annotated[float, typer.Option(help="Share of the answers that may stay unscored.")] = 0.02,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Of the judge, such as model=FOLDER.")
    ] = None,
    allow_plugins: Plugins = False,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution", help="Run code that a model wrote with weaker walls where bubblewrap fails."
        ),
    ] = False,
) -> None:
    """Score answers that exist already; an id that occurs again is another sample of that prompt.

    Example: backmerge score answers.jsonl --benchmark humaneval=HumanEval.jsonl.gz --out runs/scored

    Another judge over an earlier run: backmerge score runs/mine --judge wildguard --out runs/mine-wildguard
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
            raise ConfigError("an earlier run knows its benchmarks", remedy="leave --benchmark away.")
        results = judge_again(completions, settings, out, max_unscored=max_unscored, permissions=permissions)
    elif benchmark is None:
        raise ConfigError("--benchmark is missing: what do they answer?", remedy="such as --benchmark humaneval.")
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
