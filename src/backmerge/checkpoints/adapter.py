"""A LoRA adapter on its base, seen as a checkpoint: W + scale · B·A, formed a few rows at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backmerge.checkpoints.files import FLOATS, SafetensorsFile, TensorInfo
from backmerge.checkpoints.fingerprints import fingerprint_of_files
from backmerge.checkpoints.lora import Factors, rescaled_rows, scale_of, tuned_rows
from backmerge.checkpoints.reader import CARD, Checkpoint, Weights, read_json
from backmerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
COPY = ".base_layer.weight"  # beside an adapted embedding peft saves the base's own
TRAINED_BIAS = ".base_layer.bias"  # of an adapted layer, with bias="all" or "lora_only"
TIED_NAMES = ("embed_tokens.weight", "lm_head.weight", "wte.weight")
# a linear layer's factors, and an embedding's
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?P<end>\.weight)?")
MAGNITUDE = ".lora_magnitude_vector"
BIAS_DELTA = ".lora_B.bias"
FOUR_BITS = re.compile(r"4.?bit|nf4|bnb|gptq|awq", re.IGNORECASE)

# these leave the base as published; others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it, and their factors are no
# delta of what is on disk. An unknown one is refused: it may change the base, too
FAITHFUL_INITS = ("gaussian", "eva", "orthogonal", "mica")

# options of peft's LoraConfig under which the tuned weights are not W + scale·B·A
OTHER_SUMS = {
    "target_parameters": "it targets parameters (target_parameters), such as stacked experts, rather than modules",
    "alora_invocation_tokens": "it is an activated LoRA, which changes only the tokens after its invocation",
    "layer_replication": "it replicates layers (layer_replication), so that it has more of them than the base",
    "use_qalora": "it is QALoRA, whose input is pooled",
    "use_bdlora": "it is BD-LoRA, whose factors are block-diagonal",
    "arrow_config": "it routes between adapters (arrow_config)",
    "kasa_config": "it is KaSA, which truncates the base",
    "monteclora_config": "it is MonteCLoRA, which samples its factors",
    "trainable_token_indices": "it trains single rows of the embedding (trainable_token_indices)",
}


def ties_embeddings(base: Weights) -> bool:
    """Whether a model's embeddings, of input and output, are one tensor."""
    config = read_json(base.companions / "config.json")
    return bool(config.get("tie_word_embeddings")) or "lm_head.weight" not in base.infos


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

    def __init__(self, directory: Path, base: Weights) -> None:
        self.directory = directory
        self.base = base
        self.config = read_json(directory / CONFIG)
        _refuse_other_kinds(directory, self.config)
        self.file = _opened(directory)
        self.factors: dict[str, Factors] = {}
        self.replaced: dict[str, str] = {}
        self.added: dict[str, tuple[str, float]] = {}
        self._parse()
        self._check_tied_embeddings(self.factors.keys() | self.replaced.keys())
        self._check_copies()
        self._check_shapes()
        self._check_base()

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Those of the base: an adapter changes values, not shapes."""
        return self.base.infos

    @property
    def companions(self) -> Path:
        """The base's folder."""
        return self.base.companions

    @property
    def metadata(self) -> Mapping[str, str]:
        """Those of the base."""
        return self.base.metadata

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the base and of the adapter's two files."""
        return f"{self.base.fingerprint}+{self.own_fingerprint}"

    @functools.cached_property
    def own_fingerprint(self) -> str:
        """Of the adapter's two files alone, the base unread."""
        return fingerprint_of_files({self.directory / CONFIG, self.directory / TENSORS})

    @property
    def dense_changes(self) -> list[str]:
        """Tensors whose change is no product of factors: trained whole (norms, biases, embeddings), or DoRA's."""
        scaled = {name for name, factors in self.factors.items() if factors.magnitude is not None}
        return sorted(scaled | self.replaced.keys() | self.added.keys())

    @property
    def note(self) -> str | None:
        """What a person should know of how this adapter was trained, if there is anything."""
        trained_on = str(self.config.get("base_model_name_or_path") or "")
        if not FOUR_BITS.search(trained_on):
            return None
        return (
            f"the adapter {self.directory} was trained on a quantised base ({trained_on}), and is merged onto "
            f"{self.base.directory} as it is: the base that it saw in training differed by the quantisation error"
        )

    def is_base(self, name: str) -> bool:
        """Whether the adapter leaves a tensor alone."""
        return name not in self.factors and name not in self.replaced and name not in self.added

    def tensor(self, name: str) -> Tensor:
        """The tuned tensor: the base's own or the adapter's where it is whole, else in float32 and not yet rounded."""
        info = self.infos[name]
        return self.block(name, 0, info.num_elements).reshape(info.shape)

    def block(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Elements of the tuned tensor, flat, as `tensor` has them; whole rows are computed and then cut."""
        if name in self.replaced:
            return self.file.block(self.replaced[name], start, stop, buffer)
        if name in self.added:
            return self._moved_bias(name)[start:stop]
        if name not in self.factors or start == stop:
            return self.base.block(name, start, stop, buffer)
        factors, columns = self.factors[name], self.infos[name].shape[1]
        first, last = start // columns, -(-stop // columns)
        # DoRA's norms need whole rows; a sum of products comes out the same whichever of its elements are asked for
        weight = self.base.block(name, first * columns, last * columns, buffer if first * columns == start else None)
        rows = tuned_rows(
            weight.view(-1, columns),
            factors,
            self.file.float32_array(factors.a),
            self.file.float32_array(factors.b),
            first,
        )
        if factors.magnitude is not None:
            rows = rescaled_rows(rows, self.file.float32_array(factors.magnitude)[first:last])
        return rows.view(-1)[start - first * columns : stop - first * columns]

    def _moved_bias(self, name: str) -> Tensor:
        import torch

        saved, scale = self.added[name]
        return self.base.tensor(name).float() + scale * torch.from_numpy(self.file.float32_array(saved))

    def _parse(self) -> None:
        names = set(self.file.infos)
        if not names:
            raise CheckpointError(
                f"{self.directory / TENSORS} holds no tensors", remedy="save or download the adapter again."
            )
        for name in sorted(names):
            match = FACTOR.fullmatch(name)
            if match is not None and bool(match["kind"]) is not bool(match["end"]):
                self._parse_factor(name, match, names)
            elif name.endswith(BIAS_DELTA):
                module = name.removesuffix(BIAS_DELTA).removeprefix(PREFIX)
                factor = self.file.infos.get(f"{name.removesuffix(BIAS_DELTA)}.lora_A.weight")
                self.added[f"{module}.bias"] = (name, scale_of(self.config, module, factor.shape[0] if factor else 1))
            elif not name.endswith(COPY) and not (name.endswith(MAGNITUDE) and self.config.get("use_dora")):
                self._parse_whole(name)
        for weight in sorted(self.factors.keys() & self.replaced.keys()):
            raise CheckpointError(
                f"{self.directory / TENSORS} both replaces '{weight}' and adds a low-rank change to it",
                remedy="bake it with peft's merge_and_unload() and give the full checkpoint as TUNED.",
            )

    def _parse_factor(self, name: str, match: re.Match[str], names: Set[str]) -> None:
        kind, end = match["kind"] or "", match["end"] or ""
        module = match["module"].removeprefix(PREFIX)
        partner = f"{match['module']}.lora_{kind}{'B' if match['side'] == 'A' else 'A'}{end}"
        if partner not in names:
            raise CheckpointError(
                f"{self.directory / TENSORS} holds '{name}' but no '{partner}'",
                remedy="the adapter is incomplete: save or download it again.",
            )
        if match["side"] == "B":
            return
        magnitude = match["module"] + MAGNITUDE
        is_transposed = bool(kind) or bool(self.config.get("fan_in_fan_out"))
        if self.config.get("use_dora") and (is_transposed or magnitude not in names):
            raise CheckpointError(
                f"the adapter {self.directory} is DoRA, and its '{module}' is of a form that backmerge does not read "
                f"({'transposed' if is_transposed else 'without ' + MAGNITUDE})",
                remedy="bake it with peft's merge_and_unload() and give the full checkpoint as TUNED.",
            )
        scale = scale_of(self.config, module, self.file.infos[name].shape[0])
        self.factors[f"{module}.weight"] = Factors(
            name, partner, scale, is_transposed, magnitude if magnitude in names else None
        )

    def _parse_whole(self, name: str) -> None:
        weight = name.removeprefix(PREFIX)
        if weight.endswith(TRAINED_BIAS):
            weight = weight.removesuffix(TRAINED_BIAS) + ".bias"
        if weight not in self.base.infos:
            raise CheckpointError(
                f"{self.directory / TENSORS} holds '{name}', which is neither a LoRA factor nor a tensor of "
                f"the base {self.base.directory}",
                remedy="this adapter is of a kind that backmerge does not read, or of another base.",
            )
        self.replaced[weight] = name

    def _check_tied_embeddings(self, changed: Set[str]) -> None:
        """Tied embeddings are one tensor on disk, and peft changes one of its two uses: there is no place for both."""
        if not ties_embeddings(self.base) or self.config.get("ensure_weight_tying"):
            return
        for name in sorted(changed):
            if name.endswith(TIED_NAMES) and not (
                name in self.replaced and self._repeats_base(name, self.replaced[name])
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
        theirs, ours = self.file.tensor(saved), self.base.tensor(name)
        return theirs.shape == ours.shape and bool((theirs == ours).all())

    def _check_copies(self) -> None:
        for saved in sorted(name for name in self.file.infos if name.endswith(COPY)):
            name = saved.removeprefix(PREFIX).removesuffix(COPY) + ".weight"
            if not self._repeats_base(name, saved):
                raise CheckpointError(
                    f"the adapter {self.directory} holds '{saved}', which is not the base's '{name}'",
                    remedy=self._other_base(),
                )

    def _check_shapes(self) -> None:
        for name, factors in self.factors.items():
            if name not in self.base.infos:
                raise CheckpointError(
                    f"the adapter {self.directory} changes '{name}', which the base {self.base.directory} lacks",
                    remedy=self._other_base(),
                )
            shapes = [self.file.infos[factor].shape for factor in (factors.b, factors.a)]
            if [len(shape) for shape in shapes] != [2, 2] or shapes[0][1] != shapes[1][0]:
                raise CheckpointError(
                    f"{self.directory / TENSORS}: the factors of '{name}' do not fit each other: A has the shape "
                    f"{shapes[1]}, B {shapes[0]}",
                    remedy="the adapter is damaged: save or download it again.",
                )
            delta = (shapes[0][0], shapes[1][1])
            self._check_fits(name, delta[::-1] if factors.is_transposed else delta, "changes")
            if factors.magnitude is not None and self.file.infos[factors.magnitude].shape != delta[:1]:
                raise CheckpointError(
                    f"{self.directory / TENSORS}: '{factors.magnitude}' is no vector of {delta[0]} magnitudes",
                    remedy="the adapter is damaged: save or download it again.",
                )
        for name, saved in self.replaced.items():
            self._check_fits(name, self.file.infos[saved].shape, "replaces")
        for name, (saved, _) in self.added.items():
            self._check_fits(name, self.file.infos[saved].shape, "changes")
        for name in (name for factors in self.factors.values() for name in (factors.a, factors.b)):
            if self.file.infos[name].dtype not in FLOATS:
                raise CheckpointError(
                    f"{self.directory / TENSORS}: '{name}' has dtype {self.file.infos[name].dtype}",
                    remedy="give an adapter in float32, bfloat16 or float16.",
                )

    def _check_fits(self, name: str, shape: tuple[int, ...], verb: str) -> None:
        info = self.base.infos.get(name)
        if info is None or shape != info.shape:
            has = f"has {info.shape} there" if info else "has no such tensor"
            raise CheckpointError(
                f"the adapter {self.directory} {verb} '{name}' with shape {shape}, but the base "
                f"{self.base.directory} {has}",
                remedy=self._other_base(),
            )

    def _check_base(self) -> None:
        """Adapters that backmerge trained say which base they were trained on."""
        card = self.directory / CARD
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


def _opened(directory: Path) -> SafetensorsFile:
    if not (directory / TENSORS).is_file():
        raise CheckpointError(
            f"{directory} has {CONFIG} but no {TENSORS}",
            remedy="save the adapter as safetensors (peft does so by default); pickles are not read.",
        )
    return SafetensorsFile(directory / TENSORS)


def _refuse_other_kinds(directory: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    init = config.get("init_lora_weights")
    refused = {
        f"its kind is {kind}, not LORA": kind != "LORA",
        f"it was initialised by {init}, which changes the base": isinstance(init, str)
        and init.lower() not in FAITHFUL_INITS,
    } | {reason: bool(config.get(option)) for option, reason in OTHER_SUMS.items()}
    for reason, applies in refused.items():
        if applies:
            raise CheckpointError(
                f"the adapter {directory} cannot be read as W + scale·B·A: {reason}",
                remedy="bake it with peft's merge_and_unload() and give the full checkpoint as TUNED.",
            )


def open_weights(directory: Path, base: Weights) -> Weights:
    """A tuned model's weights, whether a full checkpoint or an adapter on `base`."""
    return AdapterOnBase(directory, base) if is_adapter(directory) else Checkpoint(directory)
