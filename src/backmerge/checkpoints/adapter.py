"""A LoRA adapter on its base, seen as a checkpoint: W + scale · B·A, formed one tensor at a time."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError, safe_open

from backmerge.checkpoints.reader import Checkpoint, TensorInfo, Weights, fingerprint_of_files, read_json
from backmerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
COPY = ".base_layer.weight"  # beside an adapted embedding peft saves the base's own
TIED_NAMES = ("embed_tokens.weight", "lm_head.weight", "wte.weight")
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# these leave the base as published; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it, and their factors are no
# delta of what is on disk. An unknown one is refused: it may change the base, too
FAITHFUL_INITS = ("gaussian", "eva", "orthogonal", "mica")

# options of peft's LoraConfig under which the tuned weights are not W + scale·B·A
OTHER_SUMS = {
    "use_dora": "it is DoRA, whose update is not a sum of low rank",
    "target_parameters": "it targets parameters (target_parameters) rather than modules",
    "alora_invocation_tokens": "it is an activated LoRA, which changes only the tokens after its invocation",
    "layer_replication": "it replicates layers (layer_replication), so that it has more of them than the base",
    "use_qalora": "it is QALoRA, whose input is pooled",
    "use_bdlora": "it is BD-LoRA, whose factors are block-diagonal",
    "arrow_config": "it routes between adapters (arrow_config)",
    "kasa_config": "it is KaSA, which truncates the base",
    "monteclora_config": "it is MonteCLoRA, which samples its factors",
    "trainable_token_indices": "it trains single rows of the embedding (trainable_token_indices)",
}


class Factors(NamedTuple):
    """One module's low-rank delta: scale · B·A, transposed where the module stores (in, out).

    Attributes:
        a: Tensor name of A, shape (r, in).
        b: Tensor name of B, shape (out, r).
        scale: alpha / r, or alpha / sqrt(r) for rsLoRA.
    """

    a: str
    b: str
    scale: float


def is_adapter(directory: Path) -> bool:
    """Whether a folder holds a PEFT adapter rather than a model."""
    return (directory / CONFIG).is_file()


class AdapterOnBase:
    """The tuned model that an adapter makes of a base.

    Args:
        directory: Holds `adapter_config.json` and `adapter_model.safetensors`.
        base: The weights that it was trained on.

    Raises:
        CheckpointError: the adapter is damaged, is of a kind that is not a low-rank sum, or does not fit this base.
    """

    def __init__(self, directory: Path, base: Checkpoint) -> None:
        self.directory = directory
        self.base = base
        self.config = read_json(directory / CONFIG)
        _refuse_other_kinds(directory, self.config)
        self._file = _opened(directory)
        self._factors, self._replaced = self._parsed(set(self._file.keys()))
        self._check_tied_embeddings(self._factors.keys() | self._replaced.keys())
        self._check_copies()
        self._check_shapes()
        self._check_base()

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Those of the base: an adapter changes values, not shapes."""
        return self.base.infos

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the base and of the adapter's two files."""
        own = fingerprint_of_files({self.directory / CONFIG, self.directory / TENSORS})
        return f"{self.base.fingerprint}+{own}"

    def tensor(self, name: str) -> Tensor:
        """The tuned tensor: the base's own or the adapter's where it is whole, else in float32 and not yet rounded."""
        if name in self._replaced:
            saved: Tensor = self._file.get_tensor(self._replaced[name])
            return saved
        weight = self.base.tensor(name)
        if name not in self._factors:
            return weight
        factors = self._factors[name]
        a, b = self._file.get_tensor(factors.a).float(), self._file.get_tensor(factors.b).float()
        delta: Tensor = b @ a
        if self.config.get("fan_in_fan_out"):
            delta = delta.T
        return weight.float() + factors.scale * delta

    def _parsed(self, names: set[str]) -> tuple[dict[str, Factors], dict[str, str]]:
        factors: dict[str, Factors] = {}
        replaced: dict[str, str] = {}
        for name in sorted(names):
            match = FACTOR.fullmatch(name)
            if match is None and name.endswith(COPY):
                continue
            if match is None:
                weight = name.removeprefix(PREFIX)
                if weight not in self.base.infos:
                    raise CheckpointError(
                        f"{self.directory / TENSORS} holds '{name}', which is neither a LoRA factor nor a tensor of "
                        f"the base {self.base.directory}",
                        remedy="this adapter is of a kind that backmerge does not read, or of another base.",
                    )
                replaced[weight] = name
                continue
            module = match["module"].removeprefix(PREFIX)
            partner = f"{match['module']}.lora_{'B' if match['side'] == 'A' else 'A'}.weight"
            if partner not in names:
                raise CheckpointError(
                    f"{self.directory / TENSORS} holds '{name}' but no '{partner}'",
                    remedy="the adapter is incomplete: save or download it again.",
                )
            if match["side"] == "A":
                rank = self._file.get_slice(name).get_shape()[0]
                factors[f"{module}.weight"] = Factors(name, partner, _scale(self.config, module, rank))
        if not names:
            raise CheckpointError(
                f"{self.directory / TENSORS} holds no tensors", remedy="save or download the adapter again."
            )
        for weight in sorted(factors.keys() & replaced.keys()):
            raise CheckpointError(
                f"{self.directory / TENSORS} both replaces '{weight}' and adds a low-rank change to it",
                remedy="bake it with peft's merge_and_unload() and give the full checkpoint as TUNED.",
            )
        return factors, replaced

    def _check_tied_embeddings(self, changed: Set[str]) -> None:
        """Tied embeddings are one tensor on disk, and peft changes one of its two uses: there is no place for both."""
        config = read_json(self.base.directory / "config.json")
        is_tied = config.get("tie_word_embeddings", False) or "lm_head.weight" not in self.base.infos
        if not is_tied or self.config.get("ensure_weight_tying"):
            return
        for name in sorted(changed):
            if name.endswith(TIED_NAMES) and not (
                name in self._replaced and self._repeats_base(name, self._replaced[name])
            ):
                raise CheckpointError(
                    f"the adapter {self.directory} changes '{name}', which the base {self.base.directory} ties to its "
                    "other embedding: the two differ after tuning, and the base has one tensor for both",
                    remedy="bake it with peft's merge_and_unload(), and untie the base's embeddings likewise.",
                )

    def _repeats_base(self, name: str, saved: str) -> bool:
        """Whether the adapter saved the base's own tensor, as peft does with `save_embedding_layers`."""
        if name not in self.base.infos:
            return False
        theirs, ours = self._file.get_tensor(saved), self.base.tensor(name)
        return theirs.shape == ours.shape and bool((theirs == ours).all())

    def _check_copies(self) -> None:
        for saved in sorted(name for name in self._file.keys() if name.endswith(COPY)):  # noqa: SIM118 - no dict
            name = saved.removeprefix(PREFIX).removesuffix(COPY) + ".weight"
            if not self._repeats_base(name, saved):
                raise CheckpointError(
                    f"the adapter {self.directory} holds '{saved}', which is not the base's '{name}'",
                    remedy=self._other_base(),
                )

    def _check_shapes(self) -> None:
        for name, factors in self._factors.items():
            if name not in self.base.infos:
                raise CheckpointError(
                    f"the adapter {self.directory} changes '{name}', which the base {self.base.directory} lacks",
                    remedy=self._other_base(),
                )
            (rows, rank), (rank_of_a, columns) = (self._file.get_slice(f).get_shape() for f in (factors.b, factors.a))
            if rank != rank_of_a:
                raise CheckpointError(
                    f"{self.directory / TENSORS}: the factors of '{name}' do not fit each other: A has rank "
                    f"{rank_of_a}, B {rank}",
                    remedy="the adapter is damaged: save or download it again.",
                )
            delta = (columns, rows) if self.config.get("fan_in_fan_out") else (rows, columns)
            if delta != self.base.infos[name].shape:
                raise CheckpointError(
                    f"the adapter {self.directory} changes '{name}' by a {delta} delta, but the base "
                    f"{self.base.directory} has {self.base.infos[name].shape} there",
                    remedy=self._other_base(),
                )
        for name, saved in self._replaced.items():
            shape = tuple(self._file.get_slice(saved).get_shape())
            if shape != self.base.infos[name].shape:
                raise CheckpointError(
                    f"the adapter {self.directory} replaces '{name}' with shape {shape}, but the base "
                    f"{self.base.directory} has {self.base.infos[name].shape}",
                    remedy=self._other_base(),
                )

    def _check_base(self) -> None:
        """Adapters that backmerge trained say which base they were trained on."""
        card = self.directory / "backmerge.json"
        if not card.is_file():
            return
        trained_on = read_json(card).get("base_fingerprint")
        if trained_on is not None and trained_on != self.base.fingerprint:
            raise CheckpointError(
                f"the adapter {self.directory} was trained on other weights than {self.base.directory} holds "
                f"(fingerprints {trained_on[:12]} and {self.base.fingerprint[:12]})",
                remedy=self._other_base(),
            )

    def _other_base(self) -> str:
        named = self.config.get("base_model_name_or_path")
        return f"give the base that it was trained on{f': {named}' if named else ''}."


def _opened(directory: Path) -> Any:
    if not (directory / TENSORS).is_file():
        raise CheckpointError(
            f"{directory} has {CONFIG} but no {TENSORS}",
            remedy="save the adapter as safetensors (peft does so by default); pickles are not read.",
        )
    try:
        return safe_open(directory / TENSORS, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{directory / TENSORS} is not a whole safetensors file: {error}",
            remedy="it is truncated or damaged: save or download it again.",
        ) from error


def _refuse_other_kinds(directory: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    init = config.get("init_lora_weights")
    refused = {
        f"its kind is {kind}, not LORA": kind != "LORA",
        f"it trains biases ({config.get('bias')})": config.get("bias", "none") != "none"
        or bool(config.get("lora_bias")),
        f"it was initialised by {init}, which changes the base": isinstance(init, str)
        and init.lower() not in FAITHFUL_INITS,
    } | {reason: bool(config.get(option)) for option, reason in OTHER_SUMS.items()}
    for reason, applies in refused.items():
        if applies:
            raise CheckpointError(
                f"the adapter {directory} cannot be read as W + scale·B·A: {reason}",
                remedy="bake it with peft's merge_and_unload() and give the full checkpoint as TUNED.",
            )


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
    # as peft matches them: the pattern is the module's name, or its end after a dot
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(matching, config.get("lora_alpha", rank))
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def open_weights(directory: Path, base: Checkpoint) -> Weights:
    """A tuned model's weights, whether a full checkpoint or an adapter on `base`."""
    return AdapterOnBase(directory, base) if is_adapter(directory) else Checkpoint(directory)
