"""Options that several commands share, and their settings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from backmerge.errors import ConfigError

if TYPE_CHECKING:
    from backmerge.api.calls import Measuring
    from backmerge.config import CommandLine

Base = Annotated[str, typer.Argument(help="The aligned model: a folder or a hub id.")]
RUN_DIRECTORY = typer.Option(
    "--out",
    help="The run directory. If it holds an interrupted run, the run continues. Earlier results with other settings "
    "are moved to its folder earlier/.",
)
Out = Annotated[Path, RUN_DIRECTORY]
Method = Annotated[str, typer.Option(help="Merge method; `backmerge methods` describes them.")]
OtherModels = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=FOLDER", help="Another model that the method needs, e.g. unaligned=FOLDER."),
]
MergedDtype = Annotated[
    str | None, typer.Option(help="Dtype of the merged model: float32, bfloat16 or float16. By default the base's.")
]
Verify = Annotated[
    bool,
    typer.Option(
        "--verify/--no-verify",
        help="For the merge of an adapter: compare its logits with those of transformers and peft.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the model that backmerge wrote at --out.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. evaluate.max_unscored=0.05."),
]
Plugins = Annotated[
    bool,
    typer.Option("--allow-plugins", help="Allow names of the form package.module:function, which run your own code."),
]
Executor = Annotated[
    str, typer.Option(help="Where answers are generated: in-process; pool (one process per GPU); ray (a cluster).")
]
NumWorkers = Annotated[int | None, typer.Option(help="Number of processes in the pool; by default one per GPU.")]
RayAddress = Annotated[str | None, typer.Option(help="Address of the Ray cluster, e.g. ray-head:6379.")]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Do only part I of N of the work before λ is chosen, in a run directory that all parts share. "
        "Afterwards the same command without --shard finishes the run.",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with code 3 unless the verdict is 'restored'.")]
Accept = Annotated[
    list[str] | None,
    typer.Option(
        "--accept",
        metavar="FINDING",
        help="Continue despite a finding, e.g. base_not_aligned; may be repeated.",
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Only check everything and print the expected cost. Does not contact the hub, load weights or write "
        "anything.",
    ),
]
ReportTo = Annotated[
    list[str] | None,
    typer.Option(
        "--report-to", metavar="NAME", help="Also report the results to mlflow, wandb or trackio; may be repeated."
    ),
]
Utility = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|FILE",
        help="The task that the model was tuned for: a benchmark (NAME=DATA to use your copy of its data), "
        "lm-eval:TASK, or a .jsonl or .csv file with prompts and answers.",
    ),
]
Safety = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME|FILE", help="Harmful requests: a benchmark or a file with prompts."),
]
OverRefusal = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Harmless requests, to measure how many are refused: a benchmark or a file with prompts.",
    ),
]
GuardOption = Annotated[
    str | None,
    typer.Option(
        "--guard",
        metavar="NAME|FILE|own",
        help="For --method anchored: prompts on which the merge should act like the base. A benchmark (NAME=DATA to "
        "use your copy), a file with prompts, a file from `backmerge inputs`, or own for prompts that the base writes.",
    ),
]
RestoreGuard = Annotated[
    str | None,
    typer.Option(
        "--guard",
        metavar="NAME|FILE|own|none",
        help="For --method anchored: prompts on which the merge should act like the base. own (the default): prompts "
        "that the base writes. A benchmark (NAME=DATA to use your copy) or a file of harmful requests keeps more of "
        "the task. none: Linear only.",
    ),
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="NAME|FILE",
        help="Abilities that must not get worse, e.g. general knowledge or another language: a benchmark, "
        "lm-eval:TASK, or a file with prompts and answers; may be repeated.",
    ),
]
KeepMargin = Annotated[
    float, typer.Option(help="Largest accepted loss on each --keep benchmark, as a share: 0.05 is 5 points.")
]
Margin = Annotated[
    float | None,
    typer.Option(
        help="How far the attack success rate (ASR) may exceed the base's, as a share. 0.03 (3 points) by default.",
        show_default=False,
    ),
]
KeepAgainst = Annotated[str, typer.Option(help="The model that the loss is measured against: base or tuned.")]
SecondJudge = Annotated[
    str | None,
    typer.Option(
        help="A second judge, reported with the agreement of the two. If they put the model on different sides of "
        "the margin, the verdict is 'not shown'. With a published judge, the default is another published judge "
        "whose weights are on this machine; 'none' turns it off."
    ),
]
CodeExecution = Annotated[
    bool,
    typer.Option(
        "--allow-code-execution",
        help="Run code that a model wrote (HumanEval) with weaker isolation if bubblewrap does not work.",
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Do not use or store answers in the cache shared by runs.")]
Engine = Annotated[str, typer.Option(help="The engine that runs the models: transformers, vllm, openai (a server).")]
EngineOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-option", metavar="KEY=VALUE", help="An option of the engine, e.g. url=http://localhost:8000/v1."
    ),
]
Thinking = Annotated[
    str | None,
    typer.Option(
        "--thinking",
        help="Turn the reasoning of the model on or off, if its chat template has a switch for it. By default the "
        "template decides.",
    ),
]
SWITCH = {"on": True, "off": False}
As = Annotated[
    str,
    typer.Option(
        "--as",
        help="Form in which merged models are measured and written: adapter; checkpoint; or auto, an adapter if that "
        "represents the merge exactly (e.g. LoRAs merged linearly), else a checkpoint.",
    ),
]
DtypeOut = Annotated[
    str | None,
    typer.Option(
        "--dtype-out",
        help="Dtype of the merged models: float32, bfloat16 or float16. By default the base's for a checkpoint, "
        "float32 for an adapter.",
    ),
]
RoundingOut = Annotated[
    str, typer.Option("--rounding", help="Rounding to --dtype-out: nearest, or stochastic (random, unbiased).")
]
ConfigFrom = Annotated[
    str | None,
    typer.Option(
        "--config-from",
        help="The model that config.json and generation_config.json are taken from: base or tuned. By default tuned, "
        "if it has them.",
    ),
]
TokenizerFrom = Annotated[
    str | None,
    typer.Option(
        "--tokenizer-from",
        help="The model that the tokenizer, chat templates and processors are taken from: base or tuned. By default "
        "tuned, if it has them.",
    ),
]
FORMS = ("auto", "adapter", "checkpoint")
DTYPES = ("float32", "bfloat16", "float16")
ROUNDINGS = ("nearest", "stochastic")
JudgeName = Annotated[
    str | None,
    typer.Option(
        "--judge", help="Decides whether answers are harmful or refusals. The default, refusal-phrases, is weak."
    ),
]
Limit = Annotated[int | None, typer.Option(help="Use at most this many prompts of each split, for a quick try.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Dtype = Annotated[str, typer.Option(help="Dtype of the computation: auto, float32, bfloat16 or float16.")]
BatchSize = Annotated[int, typer.Option(help="Prompts per batch.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(help="Limit on the length of answers, in tokens; the benchmark's own limit applies if it is lower."),
]


# The option of each setting: messages name what the user typed.
OPTIONS: dict[tuple[str | int, ...], str] = {
    tuple(key.split(".")): option
    for key, option in {
        "model": "MODEL",
        "base": "BASE",
        "tuned": "TUNED",
        "against": "--against",
        "against_run": "--against-run",
        "lam": "--lam",
        "merge.lam": "--lam",
        "method": "--method",
        "merge.method": "--method",
        "margin": "--margin",
        "choice.margin": "--margin",
        "over_refusal_margin": "--over-refusal-margin",
        "choice.rule": "--rule",
        "choice.keep_margin": "--keep-margin",
        "choice.keep_against": "--keep-against",
        "keep_margin": "--keep-margin",
        "guard": "--guard",
        "merged_as": "--as",
        "merged_dtype": "--dtype-out",
        "config_from": "--config-from",
        "tokenizer_from": "--tokenizer-from",
        "merge.guard": "--guard",
        "merge.task": "--task-inputs",
        "choice.accept": "--accept",
        "accept": "--accept",
        "search.name": "--search",
        "search.refine": "--refine",
        "evaluate.utility": "--utility",
        "evaluate.safety": "--safety",
        "evaluate.over_refusal": "--over-refusal",
        "evaluate.judge": "--judge",
        "evaluate.second_judge": "--second-judge",
        "evaluate.keep": "--keep",
        "evaluate.limit": "--limit",
        "evaluate.max_new_tokens": "--max-new-tokens",
        "evaluate.engine.name": "--engine",
        "evaluate.engine.options": "--engine-option",
        "evaluate.engine.device": "--device",
        "evaluate.engine.dtype": "--dtype",
        "evaluate.engine.batch_size": "--batch-size",
        "execution.executor": "--executor",
        "execution.num_workers": "--num-workers",
        "execution.ray_address": "--ray-address",
        "dataset": "--data",
        "data.num_examples": "--num-examples",
        "data.validation": "--validation",
        "seeds": "--seeds",
        "epochs": "--epochs",
        "steps": "--steps",
        "snapshot_steps": "--snapshot-steps",
        "keep_every": "--keep-every",
        "batch_size": "--batch-size",
        "micro_batch_size": "--micro-batch-size",
        "learning_rate": "--learning-rate",
        "cutoff": "--cutoff",
        "ema": "--ema",
        "device": "--device",
        "lora.r": "--rank",
        "lora.alpha": "--alpha",
    }.items()
}


def command_line(values: dict[str, Any], overrides: Sequence[str] | None = None, **named: str) -> CommandLine:
    """Return the settings of a command that are not arguments of the API function.

    Args:
        values: The settings.
        overrides: The `--set KEY=VALUE` options.
        **named: Settings whose option has another name in this command, with that name.
    """
    from backmerge.config import CommandLine, Document

    options = OPTIONS | {(key,): option for key, option in named.items()}
    remedy = "correct the named options; --help describes the values that each takes."
    return CommandLine(Document("the command line", values, {}, options=options, remedy=remedy), overrides or ())


@contextmanager
def options_named(*options: str) -> Iterator[None]:
    """Replace the argument at the start of a user error by its option: `--lam` for `lam`."""
    try:
        yield
    except ConfigError as error:
        argument, space, rest = error.message.partition(" ")
        option = f"--{argument.replace('_', '-')}"
        if option in options:
            error.message = f"{option}{space}{rest}"
        raise


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions:
    """The options that `restore`, `evaluate` and `check` share; `with_groups` makes them options of a command."""

    utility: Utility = None
    safety: Safety = None
    over_refusal: OverRefusal = None
    judge: JudgeName = None
    second_judge: SecondJudge = None
    limit: Limit = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    thinking: Thinking = None
    batch_size: BatchSize = 64
    max_new_tokens: MaxNewTokens = None
    engine: Engine = "transformers"
    engine_option: EngineOption = None
    no_cache: NoCache = False
    executor: Executor = "in-process"
    num_workers: NumWorkers = None
    ray_address: RayAddress = None
    set_: SetOption = None
    allow_plugins: Plugins = False
    allow_code_execution: CodeExecution = False
    dry_run: DryRunOption = False

    def arguments(self) -> Measuring:
        """Return the options as arguments of the functions of `backmerge.api`, except --set.

        Raises:
            ConfigError: an option has an unknown value.
        """
        return {
            "utility": self.utility or (),
            "safety": self.safety or (),
            "over_refusal": self.over_refusal or (),
            "judge": self.judge,
            "second_judge": self.second_judge,
            "limit": self.limit,
            "device": self.device,
            "dtype": self.dtype,
            "thinking": thinking_of(self.thinking),
            "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens,
            "engine": self.engine,
            "engine_options": engine_options(self.engine_option or ()),
            "cache": not self.no_cache,
            "executor": self.executor,
            "num_workers": self.num_workers,
            "ray_address": self.ray_address,
            "allow_plugins": self.allow_plugins,
            "allow_code_execution": self.allow_code_execution,
        }


@dataclass(frozen=True, kw_only=True)
class MergedOptions:
    """The options of the form of merged models; `with_groups` makes them options of a command."""

    as_: As = "auto"
    dtype_out: DtypeOut = None
    config_from: ConfigFrom = None
    tokenizer_from: TokenizerFrom = None

    def values(self) -> dict[str, Any]:
        """Return the options as settings.

        Raises:
            ConfigError: an option has an unknown value.
        """
        return {**output_values(self.as_, self.dtype_out), **files_values(self.config_from, self.tokenizer_from)}


def with_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter of a command that is a group of options by these options, for typer."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: p.annotation for name, p in signature.parameters.items() if is_dataclass(p.annotation)
    }
    shown: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        if name not in groups:
            shown.append(parameter)
            continue
        hints = get_type_hints(groups[name], include_extras=True)
        shown += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=hints[field.name],
            )
            for field in fields(groups[name])
        ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shown]
    )
    return run


def numbers(option: str, text: str) -> list[float]:
    """Parse numbers separated by commas.

    Raises:
        ConfigError: the text is not a list of numbers.
    """
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ConfigError(
            f"{option} {text}: expected numbers separated by commas", remedy="for example 0.2,0.4,0.6"
        ) from None


def pairs(option: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return NAME=VALUE texts as pairs.

    Raises:
        ConfigError: a text is not NAME=VALUE.
    """
    found = []
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"{option} {text}: expected NAME=VALUE")
        found.append((name, value))
    return found


def output_values(as_: str | None, dtype_out: str | None, rounding: str | None = None) -> dict[str, str]:
    """Return the settings of the form of merged models.

    Raises:
        ConfigError: an option has an unknown value; the message names the closest known one.
    """
    asked = (
        ("--as", "merged_as", as_, FORMS),
        ("--dtype-out", "merged_dtype", dtype_out, DTYPES),
        ("--rounding", "merged_rounding", rounding, ROUNDINGS),
    )
    values = {}
    for option, key, value, known in asked:
        if value is not None:
            check_choice(option, value, known)
            values[key] = value
    return values


def files_values(config_from: str | None, tokenizer_from: str | None) -> dict[str, Any]:
    """Return the settings of the files of merged models.

    Raises:
        ConfigError: an option is neither base nor tuned.
    """
    values = {}
    for option, key, value in (
        ("--config-from", "config_from", config_from),
        ("--tokenizer-from", "tokenizer_from", tokenizer_from),
    ):
        if value is not None:
            check_choice(option, value, ("base", "tuned"))
            values[key] = value
    return values


def check_choice(option: str, given: str, known: Sequence[str] | Mapping[str, str]) -> None:
    """Check that an option has a known value.

    ConfigError: the value is unknown; the message names the closest one and all others.
        ConfigError: the value is unknown; names the closest one and all others.
    """
    from backmerge.registry import closest

    if given not in known:
        raise ConfigError(
            f"{option} {given}: unknown{closest(given, known)}", remedy=f"it is one of: {', '.join(known)}."
        )


def thinking_of(text: str | None) -> bool | None:
    """Return the value of --thinking.

    Raises:
        ConfigError: the value is neither on nor off.
    """
    if text is None:
        return None
    check_choice("--thinking", text, tuple(SWITCH))
    return SWITCH[text]


def engine_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse KEY=VALUE options, with values in YAML."""
    import yaml

    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key and equals):
            raise ConfigError(f"--engine-option {pair}: expected KEY=VALUE", remedy="for example max_model_len=4096.")
        options[key] = yaml.safe_load(text)
    return options
