"""A LoRA adapter on its base, seen as a checkpoint: W + scale · B·A, formed one tensor at a time."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
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
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

# these start from a base that they changed, so their factors are no delta of the base as published
REBASING_INITS = ("pissa", "olora", "corda", "loftq")


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
        """The tuned tensor: the base's own where the adapter leaves it, else in float32 and not yet rounded."""
        if name in self._replaced:
            saved: Tensor = self._file.get_tensor(self._replaced[name])
            return saved.float()
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
            if match is None:
                weight = name.removeprefix(PREFIX)
                if weight not in self.base.infos:
                    raise CheckpointError(
                        f"{self.directory / TENSORS} holds '{name}', which is neither a LoRA factor nor a tensor of "
                        f"the base {self.base.directory}",
                        remedy="this adapter is of a kind that backmerge does not read, or of another base.",
                    )
                replaced[weight] = name
            elif match["side"] == "A":
                module = match["module"].removeprefix(PREFIX)
                partner = f"{match['module']}.lora_B.weight"
                if partner not in names:
                    raise CheckpointError(f"{self.directory / TENSORS} holds '{name}' but no '{partner}'")
                rank = self._file.get_slice(name).get_shape()[0]
                factors[f"{module}.weight"] = Factors(name, partner, _scale(self.config, module, rank))
        return factors, replaced

    def _check_shapes(self) -> None:
        for name, factors in self._factors.items():
            if name not in self.base.infos:
                raise CheckpointError(
                    f"the adapter {self.directory} changes '{name}', which the base {self.base.directory} lacks",
                    remedy=self._other_base(),
                )
            rows, columns = (
                self._file.get_slice(factors.b).get_shape()[0],
                self._file.get_slice(factors.a).get_shape()[1],
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
        "it is DoRA, whose update is not a sum of low rank": bool(config.get("use_dora")),
        f"it trains biases ({config.get('bias')})": config.get("bias", "none") != "none"
        or bool(config.get("lora_bias")),
        f"it was initialised by {init}, which changes the base": isinstance(init, str)
        and init.lower().startswith(REBASING_INITS),
        "it targets parameters (target_parameters) rather than modules": bool(config.get("target_parameters")),
    }
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
