"""`backmerge restore`: turn a base and tuned models into a model that is safe, or has not forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backmerge.commands.options import (
    RUN_DIRECTORY,
    Accept,
    Keep,
    KeepAgainst,
    KeepMargin,
    Margin,
    MeasuringOptions,
    MergedOptions,
    ReportTo,
    RestoreGuard,
    RoundingOut,
    ShardOption,
    Strict,
    Verify,
    command_line,
    numbers,
    output_values,
    with_groups,
)
from backmerge.commands.running import carry_out, run_part
from backmerge.commands.suggestions import Asked, check_complete
from backmerge.registry import Permissions

if TYPE_CHECKING:
    from backmerge.api.calls import Restoring


@with_groups
def restore(
    base: Annotated[
        str | None, typer.Argument(metavar="BASE", help="The aligned model: a folder or a hub id.", show_default=False)
    ] = None,
    tuned: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TUNED",
            help="Its tuned version: a checkpoint or a LoRA adapter. Several are treated as seeds of one tuning.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Annotated[Path | None, RUN_DIRECTORY] = None,
    measuring: MeasuringOptions,
    keep: Keep = None,
    keep_margin: KeepMargin = 0.05,
    keep_against: KeepAgainst = "base",
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Merge method. Several, e.g. linear,slerp,model_stock, are compared. By default linear,anchored, or "
            "linear with --guard none.",
        ),
    ] = None,
    guard: RestoreGuard = None,
    task_inputs: Annotated[
        str | None,
        typer.Option(
            metavar="ROWS|STATS",
            help="For --method anchored: prompts of the task with answers, such as the training rows, on which the "
            "merge should act like the tuned model; these rows are not used for measuring. Or a file from `backmerge "
            "inputs --task`.",
        ),
    ] = None,
    lam: Annotated[
        str | None,
        typer.Option(
            metavar="λ,...",
            help="λs to try, the share of the tuned side. By default 0.2,0.4,0.6,0.8; with --task-inputs "
            "0.03,0.1,0.25,0.5 for anchored.",
            show_default=False,
        ),
    ] = None,
    search: Annotated[
        str,
        typer.Option(
            help="grid: measure every λ in full. race: drop a λ as soon as it can no longer be chosen, which takes "
            "less than half of the answers. auto: race for rule safe; grid for other rules, with --shard, and in the "
            "run that finishes the shards."
        ),
    ] = "auto",
    refine: Annotated[
        int,
        typer.Option(
            help="At most this many additional λs below the smallest one that fails; for rule safe.",
            min=0,
            max=20,
        ),
    ] = 2,
    rule: Annotated[str, typer.Option(help="How λ is chosen: safe, target, weighted, pareto, paper.")] = "safe",
    margin: Margin = None,
    merged: MergedOptions,
    rounding: RoundingOut = "nearest",
    verify: Verify = True,
    accept: Accept = None,
    report_to: ReportTo = None,
    strict: Strict = False,
    shard: ShardOption = None,
) -> None:
    """Restore the safety of a tuned model. Chooses λ, confirms it on other prompts and writes the merged model.

    Example: backmerge restore meta-llama/Meta-Llama-3-8B-Instruct ./my-lora --utility mine.jsonl
    --safety harmful_behaviors.csv --out restored

    To restore abilities that the model lost in tuning, give --keep; --safety can then be omitted.
    """
    given = tuple(name.partition("=")[0] for name in measuring.set_ or ())
    check_complete(
        Asked(
            base,
            tuple(tuned or ()),
            tuple(measuring.utility or ()),
            tuple(measuring.safety or ()),
            out,
            tuple(keep or ()),
        ),
        Path.cwd(),
        has_utility="evaluate.utility" in given,
        has_limit="evaluate.safety" in given or "evaluate.keep" in given,
    )
    assert base is not None
    assert tuned
    assert out is not None

    from backmerge import api
    from backmerge.pipeline.sharding import is_sharded

    # shards share a grid, so what finishes their run must not race over it
    searched_by = "grid" if search == "auto" and (shard is not None or is_sharded(out)) else search
    values: dict[str, Any] = {
        **merged.values(),
        **output_values(None, None, rounding),
        "merged_verified": verify,
        "search": {"name": searched_by, "refine": refine},
        "choice": {"accept": accept or [], **({"keep_against": keep_against} if keep else {})},
    }
    arguments: Restoring = {
        **measuring.arguments(),
        "keep": keep or (),
        "method": method,
        "guard": guard,
        "task_inputs": task_inputs,
        "lam": () if lam is None else numbers("--lam", lam),
        "margin": margin,
        "keep_margin": keep_margin if keep else None,
        "rule": rule,
        "out": out,
        "settings": command_line(values, measuring.set_),
    }
    if measuring.dry_run:
        from backmerge.commands.run import look_through

        call = api.restoring(base, tuned, **arguments)
        look_through({call.settings.name: call.settings}, call.permissions, call.document)
        return
    if shard is not None:
        call = api.restoring(base, tuned, **arguments)
        run_part(call.settings, out, shard, call.permissions)
        return
    permissions = Permissions(measuring.allow_plugins, measuring.allow_code_execution)
    carry_out(lambda: api.restore(base, tuned, **arguments), out, permissions, strict=strict, report_to=report_to or ())
