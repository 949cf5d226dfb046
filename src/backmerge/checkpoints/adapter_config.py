"""Validate an adapter's `adapter_config.json`; fields that it omits have peft's own defaults."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from backmerge.checkpoints.locate import folder_named
from backmerge.checkpoints.reader import Checkpoint, read_json
from backmerge.errors import CheckpointError
from backmerge.progress import say

if TYPE_CHECKING:
    from backmerge.checkpoints.adapter import AdapterOnBase


CONFIG = "adapter_config.json"
SHOWN = 3  # faults of a file that are listed; the rest are counted
LONGEST = 120  # characters of foreign text in a message
MAX_PATTERN = 1000  # characters; a module's name has fewer than a hundred
PATTERN_SECONDS = 10.0  # for all matches of an adapter; normal ones take microseconds
# an expression without groups and with at most two repetitions: its time is at most the cube of a name's length
SIMPLE = re.compile(r"\^?[\w.\\-]*(\*[\w.\\-]*){0,2}\$?")
MATCHED = r"(.*\.)?({})$"  # as in peft
MATCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
json.dump([[name for name in names if re.match(pattern, name)] for pattern in patterns], sys.stdout)
"""

# these keep the published base; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it, and their factors are not a
# delta of the weights on disk. An unknown one is refused, since it may change the base too
FAITHFUL_INITS = ("gaussian", "eva", "orthogonal", "mica")

# options of peft's LoraConfig under which the tuned weights are not W + scale·B·A
OTHER_SUMS = {
    "alora_invocation_tokens": "it is an activated LoRA, which changes only the tokens after its invocation",
    "layer_replication": "it replicates layers (layer_replication), so it has more layers than the base",
    "use_qalora": "it is QALoRA, whose input is pooled",
    "use_bdlora": "it is BD-LoRA, whose factors are block-diagonal",
    "arrow_config": "it routes between adapters (arrow_config)",
    "megatron_config": "it was trained with Megatron (megatron_config), and peft imports the code that it names",
    "kasa_config": "it is KaSA, which truncates the base",
    "monteclora_config": "it is MonteCLoRA, which samples its factors",
    "trainable_token_indices": "it trains single rows of the embedding (trainable_token_indices)",
}


def shown(text: object) -> str:
    """Return foreign text, cut to a length that fits into a message."""
    line = str(text)
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."


def _is_pattern(pattern: str) -> str:
    try:
        with warnings.catch_warnings(action="ignore"):
            re.compile(MATCHED.format(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"is not a regular expression: {error}") from error
    return pattern


# an int stays an int, so that peft's own value is written back unchanged
Number = Annotated[int, Field(strict=True, ge=-(10**9), le=10**9)] | Annotated[float, Field(strict=True)]
Alpha = Annotated[Number, Field(allow_inf_nan=False)]
Rank = Annotated[int, Field(strict=True, ge=1)]
Pattern = Annotated[StrictStr, Field(max_length=MAX_PATTERN), AfterValidator(_is_pattern)]
Dropout = Annotated[Number, Field(ge=0, le=1)]
Names = list[StrictStr] | StrictStr | None
SubConfig = dict[StrictStr, Any] | None


class AdapterConfig(BaseModel):
    """The fields of peft's `LoraConfig`, with its types and defaults: peft checks only few of them before using them.

    Unknown fields, such as those of a later version, are kept as they are, and peft ignores them.

    Attributes:
        r: Rank of the factors, unless `rank_pattern` has another for a module.
        lora_alpha: Divided by the rank it is the scale, unless `alpha_pattern` has another for a module.
        use_rslora: Whether alpha is divided by the square root of the rank instead.
        target_parameters: Parameters that are adapted instead of modules: stacked experts.
    """

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    peft_type: StrictStr | None = None
    base_model_name_or_path: StrictStr | None = None
    revision: StrictStr | None = None
    task_type: StrictStr | None = None
    auto_mapping: dict[str, Any] | None = None
    r: Rank = 8
    lora_alpha: Alpha = 8
    rank_pattern: dict[Pattern, Rank] = Field(default_factory=dict)
    alpha_pattern: dict[Pattern, Alpha] = Field(default_factory=dict)
    use_rslora: StrictBool = False
    use_dora: StrictBool = False
    fan_in_fan_out: StrictBool = False
    init_lora_weights: StrictBool | StrictStr | None = True
    target_modules: Names = None
    exclude_modules: Names = None
    modules_to_save: Names = None
    target_parameters: list[StrictStr] | None = None
    ensure_weight_tying: StrictBool = False
    peft_version: StrictStr | None = None
    inference_mode: StrictBool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    lora_bias: StrictBool = False
    lora_dropout: Dropout = 0.0
    layers_to_transform: list[StrictInt] | StrictInt | None = None
    layers_pattern: Names = None
    layer_replication: list[tuple[StrictInt, StrictInt]] | None = None
    trainable_token_indices: list[StrictInt] | dict[StrictStr, list[StrictInt]] | None = None
    alora_invocation_tokens: list[StrictInt] | None = None
    use_qalora: StrictBool = False
    qalora_group_size: StrictInt = 16
    use_bdlora: SubConfig = None
    arrow_config: SubConfig = None
    corda_config: SubConfig = None
    eva_config: SubConfig = None
    kasa_config: SubConfig = None
    loftq_config: SubConfig = Field(default_factory=dict)
    lora_ga_config: SubConfig = None
    monteclora_config: SubConfig = None
    velora_config: SubConfig = None
    megatron_config: SubConfig = None
    megatron_core: StrictStr | None = "megatron.core"

    @classmethod
    def read(cls, directory: Path) -> AdapterConfig:
        """Read an adapter's configuration.

        Raises:
            CheckpointError: it is missing or damaged, a field has a value of the wrong kind, or its kind is not a
                low-rank sum.
        """
        file = directory / CONFIG
        try:
            config = cls.model_validate(read_json(file))
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)
            places = [shown(".".join(str(part) for part in one["loc"])) for one in found]
            faults = [f"{place}: {shown(one['msg'])}" for place, one in zip(places, found, strict=True)]
            more = f", and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
            raise CheckpointError(
                f"{file} is not the configuration of an adapter: {'; '.join(faults[:SHOWN])}{more}",
                remedy="the file is damaged or was edited by hand: save or download the adapter again.",
            ) from error
        config._refuse_other_kinds(directory)
        return config

    def _refuse_other_kinds(self, directory: Path) -> None:
        init, values = self.init_lora_weights, dict(self)
        refused = {
            f"its kind is {shown(self.peft_type)}, not LORA": self.peft_type != "LORA",
            f"it was initialised by {shown(init)}, which changes the base": isinstance(init, str)
            and init.lower() not in FAITHFUL_INITS,
        } | {reason: values[option] not in (None, False) for option, reason in OTHER_SUMS.items()}
        for reason, applies in refused.items():
            if applies:
                raise CheckpointError(
                    f"the adapter {directory} cannot be read as W + scale·B·A: {reason}",
                    remedy="merge it with peft's merge_and_unload() and give the full checkpoint as TUNED.",
                )


class Scaling(NamedTuple):
    """How peft scales a module's change.

    Attributes:
        rank: Rank of its factors.
        scale: Factor of B·A: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    rank: int
    scale: float


def scaling_of(config: AdapterConfig, names: Sequence[str], directory: Path) -> dict[str, Scaling]:
    """Return rank and scale of modules, found as peft finds them.

    Args:
        config: An adapter's configuration.
        names: Names of modules, and of parameters that are adapted directly.
        directory: The adapter's folder, for messages.

    Raises:
        CheckpointError: a pattern takes too long to match.
    """
    ranks, alphas = config.rank_pattern, config.alpha_pattern
    matched = _matched([*ranks, *alphas], names, directory)
    found: dict[str, Scaling] = {}
    for name in names:
        # as in peft the first pattern that matches counts
        rank = next((ranks[pattern] for pattern in ranks if name in matched[pattern]), config.r)
        alpha = next((alphas[pattern] for pattern in alphas if name in matched[pattern]), config.lora_alpha)
        found[name] = Scaling(rank, float(alpha) / (math.sqrt(rank) if config.use_rslora else rank))
    return found


def _matched(patterns: Sequence[str], names: Sequence[str], directory: Path) -> dict[str, set[str]]:
    """Return the names that each pattern matches, as in peft: the whole name, or the part after a dot.

    A foreign expression may backtrack for hours, and `re` cannot be stopped: all but the simple ones are matched in a
    process that can be stopped.
    """
    simple = {pattern for pattern in patterns if SIMPLE.fullmatch(pattern)}
    found = {pattern: {name for name in names if re.match(MATCHED.format(pattern), name)} for pattern in simple}
    others = [pattern for pattern in dict.fromkeys(patterns) if pattern not in simple]
    if not others:
        return found
    try:
        answer = subprocess.run(
            [sys.executable, "-I", "-S", "-W", "ignore", "-c", MATCHER],
            input=json.dumps([[MATCHED.format(pattern) for pattern in others], names]),
            capture_output=True,
            text=True,
            timeout=PATTERN_SECONDS,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        raise CheckpointError(
            f"{directory / CONFIG}: one of the expressions in rank_pattern and alpha_pattern, such as "
            f"'{shown(others[0])}', takes more than {PATTERN_SECONDS:.0f} s to match, here and in peft",
            remedy="replace them by names of modules or simpler expressions.",
        ) from error
    return found | {pattern: set(hits) for pattern, hits in zip(others, json.loads(answer.stdout), strict=True)}


# relative difference of a tensor, in norm, that no rounding to 16 bits explains (bfloat16: at most 2^-9 per element)
OTHER_WEIGHTS = 0.005
_warned: set[tuple[Path, Path]] = set()


def check_kinship(adapter: AdapterOnBase) -> None:
    """Compare the base that an adapter names with the given one.

    Names prove little: the same weights can be a hub id, a mirror or a folder. So if the shapes fit, another name is
    only a warning. It is certain only if the named folder is on this machine and has other weights.

    Raises:
        CheckpointError: `other_base`.
    """
    named, given = adapter.config.base_model_name_or_path, adapter.base.companions
    if not named or _is_called(named, given):
        return
    folder = folder_named(named)
    if (folder / "config.json").is_file():
        if not _differs(adapter, folder):
            return
        raise CheckpointError(
            f"other_base: the adapter {adapter.directory} was trained on {shown(named)}, which has other weights "
            f"than {given}: its change belongs to those weights",
            remedy="give that folder as the base.",
        )
    note_once(
        adapter,
        f"the adapter {adapter.directory} names {shown(named)} as its base, but the base here is {given}. Their shapes "
        "fit; make sure that they have the same weights.",
    )


def note_once(adapter: AdapterOnBase, text: str) -> None:
    """Print a note that an adapter's base may be another one, once for an adapter and a base."""
    pair = adapter.directory, adapter.base.companions
    if pair not in _warned:
        _warned.add(pair)
        say(f"Note: other_base: {text}")


def _is_called(named: str, given: Path) -> bool:
    """Return whether the name is that of the folder, of its place in the hub's cache, or of a copy so named."""
    repo = named.partition("@")[0].rstrip("/")
    cached = f"models--{repo.replace('/', '--')}"
    last = Path(repo).name.casefold()
    return folder_named(named).absolute() == given.absolute() or cached in given.parts or last == given.name.casefold()


def _differs(adapter: AdapterOnBase, folder: Path) -> bool:
    """Return whether a tensor that the adapter changes is different in that folder, beyond rounding."""
    other = Checkpoint(folder)
    name = min(adapter.factors.keys() & other.infos.keys(), default=None)
    if name is None or other.infos[name].shape != adapter.base.infos[name].shape:
        return True
    ours, theirs = adapter.base.tensor(name).float(), other.tensor(name).float()
    return bool((ours - theirs).norm() > OTHER_WEIGHTS * theirs.norm())
