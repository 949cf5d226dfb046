"""`backmerge restore`: from a base and tuned models to a safe one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from backmerge.commands.merge import numbers
from backmerge.commands.options import (
    Accept,
    As,
    BatchSize,
    CodeExecution,
    ConfigFrom,
    Device,
    DryRunOption,
    Dtype,
    DtypeOut,
    Engine,
    EngineOption,
    Executor,
    GuardOption,
    JudgeName,
    Keep,
    KeepAgainst,
    KeepMargin,
    Limit,
    MaxNewTokens,
    NoCache,
    NumWorkers,
    OverRefusal,
    Plugins,
    RayAddress,
    ReportTo,
    RoundingOut,
    Safety,
    SecondJudge,
    SetOption,
    ShardOption,
    Strict,
    Thinking,
    TokenizerFrom,
    Utility,
    asked_benchmarks,
    command_line,
    engine_options,
    evaluate_values,
    files_values,
    guard_values,
    output_values,
    second_judge_values,
    thinking_values,
)
from backmerge.commands.running import run_document
from backmerge.commands.suggestions import Asked, check_complete
from backmerge.errors import ConfigError
from backmerge.registry import Permissions


def restore(
    base: Annotated[
        str | None, typer.Argument(metavar="BASE", help="The aligned model: a folder or a hub id.", show_default=False)
    ] = None,
    tuned: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TUNED",
            help="Its tuned version: a checkpoint or a LoRA adapter; several seeds.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="The run directory; given again, the run goes on where it was, and other settings replace its "
            "results.",
        ),
    ] = None,
    utility: Utility = None,
    safety: Safety = None,
    over_refusal: OverRefusal = None,
    keep: Keep = None,
    keep_margin: KeepMargin = 0.05,
    keep_against: KeepAgainst = "base",
    judge: JudgeName = "refusal-phrases",
    second_judge: SecondJudge = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Merge method; several, such as linear,slerp,model_stock, are compared. By default linear, and with "
            "--guard linear,anchored."
        ),
    ] = None,
    guard: GuardOption = None,
    lam: Annotated[str, typer.Option(help="λs to try, the share of the tuned side.")] = "0.2,0.4,0.6,0.8",
    search: Annotated[
        str,
        typer.Option(
            help="grid measures every λ in full; race asks each as long as it may be chosen, under half of the "
            "answers; auto: race for rule safe, else grid."
        ),
    ] = "auto",
    refine: Annotated[
        int,
        typer.Option(
            help="λs beyond --lam that are measured at most, below the smallest one that fails; for rule safe.",
            min=0,
            max=20,
        ),
    ] = 2,
    rule: Annotated[str, typer.Option(help="How λ is chosen: safe, target, weighted, pareto, paper.")] = "safe",
    margin: Annotated[
        float, typer.Option(help="How far ASR may exceed the base's, as a share: 0.03 is 3 points.")
    ] = 0.03,
    as_: As = "auto",
    dtype_out: DtypeOut = None,
    config_from: ConfigFrom = None,
    tokenizer_from: TokenizerFrom = None,
    rounding: RoundingOut = "nearest",
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Compare the merge of an adapter with transformers and peft before it is kept."
        ),
    ] = True,
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
    report_to: ReportTo = None,
    strict: Strict = False,
    shard: ShardOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Give back a safe version of a tuned model: sweep λ, choose it, confirm it on other prompts, write it, report.

    Example: backmerge restore meta-llama/Meta-Llama-3-8B-Instruct ./my-lora --utility mine.jsonl
    --safety harmful_behaviors.csv --out restored
    """
    from backmerge.checkpoints.locate import short_name

    given = tuple(name.partition("=")[0] for name in set_ or ())
    check_complete(
        Asked(base, tuple(tuned or ()), tuple(utility or ()), tuple(safety or ()), out),
        Path.cwd(),
        has_utility="evaluate.utility" in given,
        has_safety="evaluate.safety" in given,
    )
    assert base is not None
    assert tuned
    assert out is not None
    method = method or ("linear" if guard is None else "linear,anchored")
    permissions = Permissions(allow_plugins, allow_code_execution)
    values: dict[str, Any] = {
        "name": short_name(tuned[0]),
        "base": base,
        "tuned": list(tuned),
        "merge": _sweeps(method, lam, guard, permissions),
        **output_values(as_, dtype_out, rounding),
        "merged_verified": verify,
        **files_values(config_from, tokenizer_from),
        "evaluate": evaluate_values(
            utility, safety, over_refusal, judge, limit, device, dtype, batch_size, max_new_tokens
        )
        | second_judge_values(second_judge, judge)
        | {"cache": not no_cache, "keep": asked_benchmarks(keep)},
        "search": {"name": "grid" if search == "auto" and shard else search, "refine": refine},
        "choice": {"rule": rule, "margin": margin, "compare": "," in method, "accept": accept or []}
        | ({"keep_margin": keep_margin, "keep_against": keep_against} if keep else {}),
    }
    values["execution"] = {"executor": executor, "num_workers": num_workers, "ray_address": ray_address}
    values["evaluate"]["engine"] |= {
        "name": engine,
        "options": engine_options(engine_option or ()),
        **thinking_values(thinking),
    }
    if dry_run:
        from backmerge.commands.run import look_through
        from backmerge.config import validated, with_overrides
        from backmerge.planning.settings import Experiment

        document = with_overrides(command_line(values), set_ or ())
        experiment = validated(Experiment, document)
        look_through({experiment.name: experiment}, permissions, document)
        return
    run_document(
        command_line(values),
        set_ or (),
        out,
        permissions,
        strict=strict,
        report_to=report_to or (),
        shard=shard,
    )


def _sweeps(methods: str, lam: str, guard: str | None, permissions: Permissions) -> list[dict[str, Any]]:
    """The methods, each with λs if it has one and the guard if it takes one."""
    from backmerge.merging.method import find_method

    names = [name.strip() for name in methods.split(",")]
    found = {name: find_method(name, permissions) for name in names}
    if guard is not None and not any(method.inputs for method in found.values()):
        raise ConfigError(
            f"--guard is for merges by direction, and {methods} makes none", remedy="take --method linear,anchored."
        )
    return [
        {"method": name, "lam": numbers("--lam", lam) if method.has_lam else None}
        | (guard_values(guard) if method.inputs else {})
        for name, method in ((name, found[name]) for name in names)
    ]
