"""The command line: parses, calls the pipeline, and turns errors into one clear message and an exit code."""

from __future__ import annotations

import errno
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backmerge.commands.diff import diff
from backmerge.commands.finetune import finetune
from backmerge.commands.label import label
from backmerge.commands.list import list_
from backmerge.commands.merge import merge, numbers
from backmerge.commands.methods import methods
from backmerge.commands.plan import plan
from backmerge.commands.quiet import quieten
from backmerge.commands.score import score
from backmerge.errors import BackmergeError, ConfigError, NotShownError, RunError

if TYPE_CHECKING:
    from backmerge.config import Document
    from backmerge.pipeline.stages import Finished

app = typer.Typer(
    name="backmerge",
    help="Fine-tune without losing safety: merge a tuned model back with its base, measure, and choose λ.",
    epilog="First try: backmerge demo. With models of your own: backmerge restore BASE TUNED --utility mine.jsonl "
    "--safety advbench --out restored",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

# what the system refuses and a user can mend, wherever it happens
MENDABLE = {
    errno.ENOSPC: "The disk is full: free some of it, and give the command again.",
    errno.EDQUOT: "Your quota of the disk is used up: free some of it, and give the command again.",
    errno.EROFS: "The disk takes no writing: give another --out.",
    errno.ENOTDIR: "A part of that path is a file: give another --out.",
    errno.EACCES: "You have no right to do that there: mend the folder's permissions, or give another --out.",
}

# some versions of typer carry a click of their own; either way this is its UsageError
USAGE_ERROR: Any = typer.BadParameter.__bases__[0]

Out = Annotated[Path, typer.Option("--out", help="The run directory; given again, the run goes on where it was.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as merge.0.lam=[0.5]."),
]
Plugins = Annotated[
    bool,
    typer.Option("--allow-plugins", help="Run your own code where a setting says package.module:function."),
]
Executor = Annotated[
    str, typer.Option(help="Where answers are made: in-process; pool, a process for each GPU; ray, a cluster.")
]
NumWorkers = Annotated[int | None, typer.Option(help="Processes of the pool; by default one for each GPU.")]
RayAddress = Annotated[str | None, typer.Option(help="The cluster, such as ray-head:6379.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with 3 unless safety is shown to be restored.")]
Utility = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|FILE",
        help="What it was tuned for: a benchmark's name (NAME=DATA with your copy of its data), lm-eval:TASK, or a "
        ".jsonl/.csv file with prompts and answers.",
    ),
]
Safety = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME|FILE", help="Harmful requests: a benchmark's name, or a file with prompts."),
]
OverRefusal = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME|FILE", help="Harmless requests that may be refused: a name, or a file with prompts."),
]
SecondJudge = Annotated[
    str | None, typer.Option(help="Another judge, shown beside the first with their agreement; decides nothing.")
]
CodeExecution = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution",
        help="Run code that a model has written (HumanEval) with weaker walls where bubblewrap does not work.",
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Take no answers over from earlier runs, and keep none.")]
Engine = Annotated[str, typer.Option(help="What runs the models: transformers, vllm, openai (a server).")]
EngineOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-option", metavar="KEY=VALUE", help="The engine's own, such as url=http://localhost:8000/v1."
    ),
]
JudgeName = Annotated[
    str,
    typer.Option("--judge", help="Finds refusals and harm. The default looks for phrases, which is weak."),
]
Limit = Annotated[int | None, typer.Option(help="At most so many prompts of each split, for a quick try.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16: of the computation.")]
BatchSize = Annotated[int, typer.Option(help="Prompts at once.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="Generation limit, in tokens, where it is below a benchmark's own.")
]


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    fast: Annotated[bool, typer.Option("--fast", help="One seed and fewer λs.")] = False,
    set_: SetOption = None,
    strict: Strict = False,
) -> None:
    """Run the whole experiment on the tiny model that ships with backmerge; needs no network and no GPU.

    Fine-tunes it, which breaks its refusals; merges it back with its base over a grid of λ; chooses λ; confirms it on
    other prompts; and writes the merged model and a report.

    Example: backmerge demo --fast --out runs/try
    """
    from backmerge.config import load_yaml
    from backmerge.demo import EXPERIMENT, FAST

    _run(load_yaml(EXPERIMENT), [*(FAST if fast else ()), *(set_ or ())], out, strict=strict)


@app.command()
def run(
    experiment: Annotated[Path, typer.Argument(help="The experiment file (YAML).")],
    out: Annotated[Path | None, typer.Option("--out", help="The run directory; default runs/FILE's name.")] = None,
    set_: SetOption = None,
    allow_plugins: Plugins = False,
    allow_code_execution: CodeExecution = False,
    strict: Strict = False,
) -> None:
    """Carry out an experiment file, or go on with it where it was.

    Example: backmerge run experiment.yaml --out runs/mine --set choice.margin=0.05
    """
    from backmerge.config import load_yaml

    place = out if out is not None else Path("runs") / experiment.stem
    _run(
        load_yaml(experiment),
        set_ or (),
        place,
        allow_plugins=allow_plugins,
        allow_code_execution=allow_code_execution,
        strict=strict,
    )


@app.command()
def restore(
    base: Annotated[str, typer.Argument(help="The aligned model: a folder or a hub id.")],
    tuned: Annotated[
        list[str], typer.Argument(help="Its tuned version: a checkpoint or a LoRA adapter; several seeds.")
    ],
    out: Out,
    utility: Utility = None,
    safety: Safety = None,
    over_refusal: OverRefusal = None,
    judge: JudgeName = "refusal-phrases",
    second_judge: SecondJudge = None,
    method: Annotated[str, typer.Option(help="Merge method.")] = "linear",
    lam: Annotated[str, typer.Option(help="λs to try, the share of the tuned side.")] = "0.2,0.4,0.6,0.8",
    search: Annotated[
        str, typer.Option(help="grid measures every λ; bisect about half of them, where ASR rises with λ.")
    ] = "grid",
    rule: Annotated[str, typer.Option(help="How λ is chosen: safe, target, weighted, pareto, paper.")] = "safe",
    margin: Annotated[
        float, typer.Option(help="How far ASR may exceed the base's, as a share: 0.03 is 3 points.")
    ] = 0.03,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
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
    strict: Strict = False,
) -> None:
    """Give back a safe version of a tuned model: sweep λ, choose it, confirm it on other prompts, write it, report.

    Example: backmerge restore meta-llama/Meta-Llama-3-8B-Instruct ./my-lora --utility mine.jsonl
    --safety harmful_behaviors.csv --out restored
    """
    from backmerge.checkpoints.locate import short_name
    from backmerge.config import Document

    values: dict[str, Any] = {
        "name": short_name(tuned[0]),
        "base": base,
        "tuned": list(tuned),
        "merge": [{"method": method, "lam": numbers("--lam", lam)}],
        "evaluate": _evaluate_values(
            utility, safety, over_refusal, judge, limit, device, dtype, batch_size, max_new_tokens
        )
        | {"second_judge": second_judge and {"name": second_judge}, "cache": not no_cache},
        "search": {"name": search},
        "choice": {"rule": rule, "margin": margin},
    }
    values["execution"] = {"executor": executor, "num_workers": num_workers, "ray_address": ray_address}
    values["evaluate"]["engine"] |= {"name": engine, "options": _options(engine_option or ())}
    _run(
        Document("the command line", values, {}),
        set_ or (),
        out,
        allow_plugins=allow_plugins,
        allow_code_execution=allow_code_execution,
        strict=strict,
    )


app.command()(finetune)
app.command()(merge)
app.command()(diff)
app.command()(methods)
app.command()(plan)
app.command()(score)
app.command()(label)
app.command("list")(list_)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model, or an adapter with --base: a folder or a hub id.")],
    out: Out,
    base: Annotated[str | None, typer.Option(help="The base of an adapter, or of merges.")] = None,
    lam: Annotated[
        str | None, typer.Option(help="Measure merges with --base at these λs instead, such as 0,0.4,1.")
    ] = None,
    method: Annotated[str, typer.Option(help="Of the merges.")] = "linear",
    utility: Utility = None,
    safety: Safety = None,
    over_refusal: OverRefusal = None,
    judge: JudgeName = "refusal-phrases",
    second_judge: SecondJudge = None,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
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
) -> None:
    """Measure a model, an adapter, or merges over many λs, on benchmarks or files of your own.

    Example: backmerge evaluate demo --safety demo-harmful --judge demo-rule --out runs/base

    Over λ: backmerge evaluate LORA --base BASE --lam 0,0.2,0.4,0.6,0.8,1 --safety advbench --over-refusal xstest
    --judge wildguard --engine vllm --out runs/sweep
    """
    from backmerge.config import Document, validated, with_overrides
    from backmerge.pipeline.single import SingleEvaluation, evaluate_model
    from backmerge.reporting.console import print_scores

    if not (utility or safety or over_refusal):
        raise ConfigError("nothing to measure", remedy="give --utility, --safety or --over-refusal.")
    values: dict[str, Any] = {
        "model": model,
        "base": base,
        "lam": [] if lam is None else numbers("--lam", lam),
        "method": method,
        "evaluate": _evaluate_values(
            utility, safety, over_refusal, judge, limit, device, dtype, batch_size, max_new_tokens
        )
        | {"second_judge": second_judge and {"name": second_judge}, "cache": not no_cache},
    }
    values["execution"] = {"executor": executor, "num_workers": num_workers, "ray_address": ray_address}
    values["evaluate"]["engine"] |= {"name": engine, "options": _options(engine_option or ())}
    document = with_overrides(Document("the command line", values, {}), set_ or ())
    settings = validated(SingleEvaluation, document)
    quieten()
    with _stoppable(out):
        results = evaluate_model(settings, out, allow_plugins=allow_plugins, allow_code_execution=allow_code_execution)
    print_scores(results, out)


@app.command()
def report(run_directory: Annotated[Path, typer.Argument(help="A finished run.")]) -> None:
    """Write report.html, tables and plots of a finished run again.

    Example: backmerge report runs/demo
    """
    from backmerge.pipeline.preparation import kind_of_run, settings_left
    from backmerge.reporting.report import write_report
    from backmerge.runs import RunDirectory

    if kind_of_run(settings_left(RunDirectory(run_directory))) in ("evaluation", "answers"):
        raise RunError(
            f"{run_directory} holds an evaluation or scored answers, which have no report",
            remedy="its scores are in results.json; `backmerge restore` and `backmerge run` write reports.",
        )
    write_report(run_directory)
    typer.echo(run_directory / "report.html")


@app.command()
def doctor() -> None:
    """Say what this machine has (devices, memory, disk, extras, sandbox) and what can therefore run.

    Example: backmerge doctor
    """
    from backmerge.doctor import examine

    for finding in examine():
        advice = f"  → {finding.advice}" if finding.advice else ""
        typer.echo(f"{finding.what:14} {finding.state}{advice}")


@app.command()
def schema() -> None:
    """Print the JSON schema of experiment files, every key with its meaning; editors can use it.

    Example: backmerge schema > experiment.schema.json
    """
    import json

    from backmerge.pipeline.experiment import Experiment

    typer.echo(json.dumps(Experiment.model_json_schema(), indent=2))


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Options before the command."""
    if show:
        from backmerge import __version__

        typer.echo(__version__)
        raise typer.Exit


def _run(
    document: Document,
    overrides: Sequence[str],
    out: Path,
    *,
    allow_plugins: bool = False,
    allow_code_execution: bool = False,
    strict: bool = False,
) -> None:
    from backmerge.config import validated, with_overrides
    from backmerge.pipeline.experiment import Experiment

    experiment = validated(Experiment, with_overrides(document, overrides))
    quieten()
    from backmerge.pipeline.stages import run_experiment
    from backmerge.reporting.console import print_summary

    with _stoppable(out):
        finished: Finished = run_experiment(
            experiment, out, allow_plugins=allow_plugins, allow_code_execution=allow_code_execution
        )
    print_summary(finished.results, out)
    if strict and finished.verdict != "restored":
        raise NotShownError(f"the verdict is '{finished.verdict}', and --strict asks for 'restored'")


@contextmanager
def _stoppable(out: Path) -> Iterator[None]:
    """Where Ctrl-C stops the block, say how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Stopped. What is done is kept: the same command goes on with {out}.", err=True)
        raise


def _evaluate_values(
    utility: Sequence[str] | None,
    safety: Sequence[str] | None,
    over_refusal: Sequence[str] | None,
    judge: str,
    limit: int | None,
    device: str,
    dtype: str,
    batch_size: int,
    max_new_tokens: int | None,
) -> dict[str, Any]:
    from backmerge.benchmarks.catalogue import named

    def asked(names: Sequence[str] | None) -> list[dict[str, Any]]:
        return [named(name).model_dump(exclude_unset=True) for name in names or ()]

    # as settings, so that --set reaches into each
    return {
        "utility": asked(utility),
        "safety": asked(safety),
        "over_refusal": asked(over_refusal),
        "judge": {"name": judge},
        "limit": limit,
        "engine": {"device": device, "dtype": dtype, "batch_size": batch_size},
        "max_new_tokens": max_new_tokens,
    }


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE options, values read as YAML."""
    import yaml

    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key and equals):
            raise ConfigError(f"--engine-option {pair}: expected KEY=VALUE", remedy="such as max_model_len=4096.")
        options[key] = yaml.safe_load(text)
    return options


def _printable(text: str) -> str:
    """Without what moves a terminal's cursor or recolours it: ids, tensor names and adapters are others' words."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def main() -> None:
    """The `backmerge` command.

    Exit codes: 0; 2 for what the user can mend; 3 for a verdict other than restored under --strict; 130 for Ctrl-C;
    1, with a traceback, for a fault of ours.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no λ shows a sign in its place
    try:
        code = app(standalone_mode=False)
    except BackmergeError as error:
        typer.echo(f"backmerge: {_printable(str(error))}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        typer.echo(f"backmerge: {_printable(str(error))}\n  → {MENDABLE[error.errno]} What is done is kept.", err=True)
        sys.exit(2)
    except USAGE_ERROR as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
