"""`backmerge evaluate`: a model, or merges over λ, measured."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from backmerge.commands.merge import numbers
from backmerge.commands.options import (
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
    TokenizerFrom,
    Utility,
    command_line,
    engine_options,
    evaluate_values,
    files_values,
    guard_values,
    output_values,
    second_judge_values,
    thinking_values,
)
from backmerge.commands.quiet import quieten
from backmerge.commands.running import stoppable
from backmerge.errors import ConfigError
from backmerge.registry import Permissions


def evaluate(
    model: Annotated[str, typer.Argument(help="A model, or an adapter with --base: a folder or a hub id.")],
    out: Out,
    base: Annotated[str | None, typer.Option(help="The base of an adapter, or of merges.")] = None,
    lam: Annotated[
        str | None, typer.Option(help="Measure merges with --base at these λs instead, such as 0,0.4,1.")
    ] = None,
    method: Annotated[str, typer.Option(help="Of the merges.")] = "linear",
    guard: GuardOption = None,
    as_: As = "auto",
    dtype_out: DtypeOut = None,
    config_from: ConfigFrom = None,
    tokenizer_from: TokenizerFrom = None,
    utility: Utility = None,
    safety: Safety = None,
    over_refusal: OverRefusal = None,
    judge: JudgeName = "refusal-phrases",
    second_judge: SecondJudge = None,
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
) -> None:
    """Measure a model, an adapter, or merges over many λs, on benchmarks or files of your own.

    Example: backmerge evaluate demo --safety demo-harmful --judge demo-rule --out runs/base

    Over λ: backmerge evaluate LORA --base BASE --lam 0,0.2,0.4,0.6,0.8,1 --safety advbench --over-refusal xstest
    --judge wildguard --engine vllm --out runs/sweep
    """
    from backmerge.config import validated, with_overrides
    from backmerge.pipeline.single import SingleEvaluation, evaluate_model, plan_evaluation
    from backmerge.reporting.console import print_scores

    if not (utility or safety or over_refusal):
        raise ConfigError("nothing to measure", remedy="give --utility, --safety or --over-refusal.")
    values: dict[str, Any] = {
        "model": model,
        "base": base,
        "lam": [] if lam is None else numbers("--lam", lam),
        "method": method,
        **guard_values(guard),
        **output_values(as_, dtype_out),
        **files_values(config_from, tokenizer_from),
        "evaluate": evaluate_values(
            utility, safety, over_refusal, judge, limit, device, dtype, batch_size, max_new_tokens
        )
        | second_judge_values(second_judge, None)
        | {"cache": not no_cache},
    }
    values["execution"] = {"executor": executor, "num_workers": num_workers, "ray_address": ray_address}
    values["evaluate"]["engine"] |= {
        "name": engine,
        "options": engine_options(engine_option or ()),
        **thinking_values(thinking),
    }
    document = with_overrides(command_line(values, base="--base"), set_ or ())
    settings = validated(SingleEvaluation, document)
    quieten()
    if dry_run:
        typer.echo(plan_evaluation(settings, out, Permissions(allow_plugins, allow_code_execution), document=document))
        typer.echo("All that it names was checked; nothing was written, and the hub was not asked.")
        return
    with stoppable(out):
        results = evaluate_model(settings, out, Permissions(allow_plugins, allow_code_execution), document=document)
    print_scores(results, out)
