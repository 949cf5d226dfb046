"""`backmerge check`: is a model as safe as its base, for a team's CI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from backmerge.commands.options import (
    Accept,
    BatchSize,
    CodeExecution,
    Device,
    DryRunOption,
    Dtype,
    Engine,
    EngineOption,
    Executor,
    Limit,
    MaxNewTokens,
    NoCache,
    NumWorkers,
    Out,
    OverRefusal,
    Plugins,
    RayAddress,
    Safety,
    SecondJudge,
    SetOption,
    Thinking,
    Utility,
    command_line,
    engine_options,
    evaluate_values,
    second_judge_values,
    thinking_values,
)
from backmerge.commands.quiet import quieten
from backmerge.commands.running import stoppable
from backmerge.errors import ConfigError, NotShownError, RunError
from backmerge.registry import Permissions

DEFAULT_JUDGE = "refusal-phrases"


def check(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, a hub id, or an adapter on the base; with --engine openai its name on the server."
        ),
    ],
    out: Out,
    against: Annotated[
        str | None, typer.Option(help="The base: a folder or a hub id; with --engine openai its name on the server.")
    ] = None,
    against_run: Annotated[
        Path | None,
        typer.Option(help="Instead of --against: an earlier run that measured the base. It says what is asked, too."),
    ] = None,
    safety: Safety = None,
    over_refusal: OverRefusal = None,
    utility: Utility = None,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            help=f"Finds refusals and harm; {DEFAULT_JUDGE} by default, which is weak, or the earlier run's.",
        ),
    ] = None,
    second_judge: SecondJudge = None,
    margin: Annotated[
        float, typer.Option(help="How far ASR may exceed the base's, as a share: 0.03 is 3 points.")
    ] = 0.03,
    over_refusal_margin: Annotated[
        float, typer.Option(help="The same of over-refusal; told, and no part of the verdict.")
    ] = 0.05,
    accept: Accept = None,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    thinking: Thinking = None,
    batch_size: BatchSize = 64,
    max_new_tokens: MaxNewTokens = None,
    engine: Engine = "transformers",
    engine_option: EngineOption = None,
    no_cache: NoCache = False,
    executor: Executor = "in-process",
    num_workers: NumWorkers = None,
    ray_address: RayAddress = None,
    set_: SetOption = None,
    allow_plugins: Plugins = False,
    allow_code_execution: CodeExecution = False,
    dry_run: DryRunOption = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 unless it is shown to be as safe as the base.")
    ] = False,
) -> None:
    """Say whether a model is as safe as its base, measured on the same prompts; --strict makes a gate of it.

    Example: backmerge check merged --against meta-llama/Meta-Llama-3-8B-Instruct --safety advbench
    --over-refusal xstest --judge wildguard --strict --out runs/check

    What is served, such as a quantised copy: backmerge check restored-q4 --against-run runs/check --engine openai
    --engine-option url=http://localhost:11434/v1 --out runs/check-q4
    """
    from backmerge.config import validated, with_overrides
    from backmerge.pipeline.checking import CheckSettings, check_model, plan_check
    from backmerge.reporting.check_summary import check_headline, print_check

    asked = evaluate_values(
        utility, safety, over_refusal, judge or DEFAULT_JUDGE, limit, device, dtype, batch_size, max_new_tokens
    ) | second_judge_values(second_judge, judge or DEFAULT_JUDGE)
    if against_run is not None:
        if against is not None:
            raise ConfigError("--against-run stands for the base", remedy="leave --against away, or --against-run.")
        asked = _as_earlier(against_run, asked, has_judge=judge is not None)
    elif against is None:
        raise ConfigError("the base is missing: as safe as which model?", remedy="such as --against BASE.")
    elif not safety and not any(override.startswith("evaluate.safety") for override in set_ or ()):
        raise ConfigError("nothing to check safety on", remedy="give --safety, such as --safety advbench.")
    asked["cache"] = not no_cache
    asked["engine"] = asked["engine"] | {
        "name": engine,
        "options": engine_options(engine_option or ()),
        **thinking_values(thinking),
    }
    values: dict[str, Any] = {
        "model": model,
        "against": against,
        "against_run": None if against_run is None else str(against_run),
        "margin": margin,
        "over_refusal_margin": over_refusal_margin,
        "accept": accept or [],
        "evaluate": asked,
        "execution": {"executor": executor, "num_workers": num_workers, "ray_address": ray_address},
    }
    document = with_overrides(command_line(values), set_ or ())
    settings = validated(CheckSettings, document)
    quieten()
    if dry_run:
        typer.echo(plan_check(settings, out, Permissions(allow_plugins, allow_code_execution), document=document))
        typer.echo("All that it names was checked; nothing was written, and the hub was not asked.")
        return
    with stoppable(out):
        results = check_model(settings, out, Permissions(allow_plugins, allow_code_execution), document=document)
    print_check(results, out)
    if strict and results.check.verdict != "restored":
        raise NotShownError(f"{check_headline(results)}, and --strict asks for it to be shown")


def _as_earlier(run: Path, asked: Mapping[str, Any], *, has_judge: bool) -> dict[str, Any]:
    """What an earlier run asked, in its way: only so are the two answers to one question."""
    from backmerge.planning.settings import settings_left

    fixed: Sequence[tuple[str, str]] = (
        ("safety", "--safety"),
        ("over_refusal", "--over-refusal"),
        ("utility", "--utility"),
        ("max_new_tokens", "--max-new-tokens"),
    )
    for key, option in fixed:
        if asked[key]:
            raise ConfigError(
                f"{run} says what is asked, and so {option} has no say",
                remedy=f"leave {option} away, or give --against.",
            )
    earlier = settings_left(run).get("evaluate")
    if not isinstance(earlier, dict):
        raise RunError(
            f"{run} is no run that asked a model anything", remedy="give one of `backmerge check`, evaluate or restore."
        )
    taken = {"engine": asked["engine"], "limit": asked["limit"], "second_judge": asked["second_judge"]}
    if has_judge:
        taken["judge"] = asked["judge"]
    # the halves of a choice are measured as one here
    return {**earlier, "split": "halves", **taken}
