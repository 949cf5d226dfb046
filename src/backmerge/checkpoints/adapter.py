"""A LoRA adapter on its base, seen as a checkpoint: W + scale · B·A, formed a few rows at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from backmerge.checkpoints.adapter_config import (
    CONFIG,
    AdapterConfig,
    Scaling,
    check_kinship,
    note_once,
    scaling_of,
    shown,
)
from backmerge.checkpoints.files import FLOATS, SafetensorsFile, TensorInfo, fingerprint_of_files
from backmerge.checkpoints.layout import STACKED, Layout, Region, layout_of
from backmerge.checkpoints.locate import folder_named
from backmerge.checkpoints.lora import Factors, rescaled_rows, tuned_rows
from backmerge.checkpoints.model_config import check_unquantised, read_config
from backmerge.checkpoints.one_sided import has_same_values, settle_one_sided
from backmerge.checkpoints.reader import CARD, Checkpoint, Weights, read_json
from backmerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

TENSORS = "adapter_model.safetensors"
BASE, BASE_TENSORS = "base_fingerprint", "base_tensors"  # fields of an adapter's card
PREFIX = "base_model.model."
COMPILED = "_orig_mod."  # a part that torch.compile adds to names
COPY = ".base_layer.weight"  # next to an adapted embedding peft saves the base's own
TRAINED_BIAS = ".base_layer.bias"  # a trained bias of an adapted layer, with bias="all" or "lora_only"
WRAPPED = ".base_layer"  # if two parameters of one module are adapted, the second wraps the first
TIED_NAMES = ("embed_tokens.weight", "lm_head.weight", "wte.weight")
# a linear layer's factors, and an embedding's
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?P<end>\.weight)?")
MAGNITUDE = ".lora_magnitude_vector"
BIAS_DELTA = ".lora_B.bias"
FOUR_BITS = re.compile(r"4.?bit|nf4|bnb|gptq|awq", re.IGNORECASE)
# architectures of transformers whose linear layers are Conv1D, with weights of shape (in, out)
CONV1D_KINDS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


def ties_embeddings(base: Weights) -> bool:
    """Return whether a model's embeddings, of input and output, are one tensor."""
    config = read_json(base.companions / "config.json")
    return bool(config.get("tie_word_embeddings")) or "lm_head.weight" not in base.infos


class TrainedOn(NamedTuple):
    """Which base an adapter was trained on, as backmerge records it with the adapter.

    Attributes:
        fingerprint: `Checkpoint.fingerprint`, which also covers the base's config, tokenizer and text files.
        tensors: `Checkpoint.tensors_fingerprint`; `None` if an earlier version wrote the adapter.
    """

    fingerprint: str
    tensors: str | None

    def as_card(self) -> dict[str, str]:
        """Return the entries of an adapter's card, as `trained_on` reads them."""
        return {BASE: self.fingerprint} | ({BASE_TENSORS: self.tensors} if self.tensors is not None else {})


def trained_on(directory: Path) -> TrainedOn | None:
    """Return the base that backmerge trained an adapter on; `None` if it is not recorded.

    Raises:
        CheckpointError: the file that records it is damaged.
    """
    card = directory / CARD
    recorded = read_json(card) if card.is_file() else {}
    for field in (BASE, BASE_TENSORS):
        if not isinstance(recorded.get(field), str | None):
            raise CheckpointError(
                f"{card}: {field} is not a text",
                remedy="the file is damaged: save or download the adapter again, or delete that file.",
            )
    return TrainedOn(recorded[BASE], recorded.get(BASE_TENSORS)) if recorded.get(BASE) is not None else None


def own_fingerprint(directory: Path) -> str:
    """Return a hash of an adapter's two files, without reading its base."""
    return fingerprint_of_files({directory / CONFIG, directory / TENSORS})


def is_adapter(directory: Path) -> bool:
    """Return whether a folder contains a PEFT adapter rather than a model."""
    return (directory / CONFIG).is_file()


class AdapterOnBase:
    """The tuned model that an adapter and its base make together.

    Args:
        directory: Folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: The weights that it was trained on.

    Raises:
        CheckpointError: the adapter is damaged, is not a low-rank sum, or does not fit this base.
    """

    def __init__(self, directory: Path, base: Weights) -> None:
        self.directory = directory
        self.base = base
        self.config = AdapterConfig.read(directory)
        self.file = _opened(directory)
        self.factors: dict[str, Factors] = {}
        self.replaced: dict[str, str] = {}
        self.added: dict[str, tuple[str, float]] = {}
        self.is_renamed = False
        self.is_base_proven = False  # whether the base has the tensors that the adapter's card records
        self._parse()
        self._check_num_tokens()
        self._settle_tied()
        self._place_on_disk()
        self._check_copies()
        self._check_shapes()
        self._check_base()

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """The base's: an adapter changes values, not shapes."""
        return self.base.infos

    @property
    def companions(self) -> Path:
        """The base's folder."""
        return self.base.companions

    @property
    def metadata(self) -> Mapping[str, str]:
        """The base's."""
        return self.base.metadata

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the base and of the adapter's two files."""
        return f"{self.base.fingerprint}+{self.own_fingerprint}"

    @functools.cached_property
    def own_fingerprint(self) -> str:
        """A hash of the adapter's two files alone, without reading the base."""
        return own_fingerprint(self.directory)

    @property
    def dense_changes(self) -> list[str]:
        """Tensors whose change is not a product of factors: trained whole (norms, biases, embeddings), or DoRA's."""
        scaled = {name for name, factors in self.factors.items() if factors.magnitude is not None}
        return sorted(scaled | self.replaced.keys() | self.added.keys())

    @property
    def note(self) -> str | None:
        """A remark about how this adapter was trained that a user should know, if there is one."""
        name = self.config.base_model_name_or_path or ""
        if not FOUR_BITS.search(name):
            return None
        return (
            f"the adapter {self.directory} was trained on a quantised base ({shown(name)}), and is merged onto the "
            f"unquantised {self.base.directory}: the base in training differed from it by the quantisation error"
        )

    def is_base(self, name: str) -> bool:
        """Return whether the adapter leaves a tensor unchanged."""
        return name not in self.factors and name not in self.replaced and name not in self.added

    def tensor(self, name: str) -> Tensor:
        """Return the tuned tensor: the base's own or the adapter's if it is whole, else in float32 and unrounded."""
        info = self.infos[name]
        return self.block(name, 0, info.num_elements).reshape(info.shape)

    def block(self, name: str, start: int, stop: int, buffer: Tensor | None = None) -> Tensor:
        """Return elements of the tuned tensor, flat, as in `tensor`; whole rows are computed and then cut."""
        if name in self.replaced:
            return self.file.block(self.replaced[name], start, stop, buffer)
        if name in self.added:
            return self._moved_bias(name)[start:stop]
        if name not in self.factors or start == stop:
            return self.base.block(name, start, stop, buffer)
        factors, columns = self.factors[name], self.infos[name].shape[-1]
        first, last = start // columns, -(-stop // columns)
        # DoRA's norms need whole rows; elements of a sum of products do not depend on which others are computed
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

    @functools.cached_property
    def in_memory(self) -> Mapping[str, str]:
        """The base's tensors on disk with their names in memory; without those that are only part of a tensor there."""
        if not self.is_renamed:
            return {name: name for name in self.base.infos}
        return {name: place.parameter for name, place in self._layout.places.items() if place.region is None}

    @functools.cached_property
    def _layout(self) -> Layout:
        return layout_of(self.base)

    def _parse(self) -> None:
        """Find the changed tensors, by their names in memory."""
        names = set(self.file.infos)
        if not names:
            raise CheckpointError(
                f"{self.directory / TENSORS} contains no tensors", remedy="save or download the adapter again."
            )
        wrapper = next((name for name in sorted(names) if COMPILED in name), None)
        if wrapper is not None:
            raise CheckpointError(
                f"the adapter {self.directory} was saved from a compiled model: the name '{shown(wrapper)}' contains "
                f"'{COMPILED}', and no library loads such names",
                remedy="save it again from the original model (model._orig_mod.save_pretrained), or remove "
                f"'{COMPILED}' from the names in {TENSORS}.",
            )
        matches = {name: match for name in sorted(names) if (match := _factor(name)) is not None}
        adapted = {name: self._adapted(match["module"].removeprefix(PREFIX)) for name, match in matches.items()}
        biases = {
            name: name.removesuffix(BIAS_DELTA).removeprefix(PREFIX) for name in names if name.endswith(BIAS_DELTA)
        }
        known = {pattern_name for _, pattern_name in adapted.values()} | set(biases.values())
        scalings = scaling_of(self.config, sorted(known), self.directory)
        for name in sorted(names):
            if name in matches:
                weight, pattern_name = adapted[name]
                self._parse_factor(name, matches[name], weight, scalings[pattern_name])
            elif name in biases:
                self.added[f"{biases[name]}.bias"] = (name, scalings[biases[name]].scale)
            elif not name.endswith(COPY) and not (name.endswith(MAGNITUDE) and self.config.use_dora):
                weight = name.removeprefix(PREFIX)
                if weight.endswith(TRAINED_BIAS):
                    weight = weight.removesuffix(TRAINED_BIAS) + ".bias"
                self.replaced[weight] = name
        for weight in sorted(self.factors.keys() & self.replaced.keys()):
            raise CheckpointError(
                f"{self.directory / TENSORS} both replaces '{shown(weight)}' and adds a low-rank change to it",
                remedy="merge it with peft's merge_and_unload() and give the full checkpoint as TUNED.",
            )

    def _parse_factor(self, name: str, match: re.Match[str], weight: str, scaling: Scaling) -> None:
        kind, end = match["kind"] or "", match["end"] or ""
        partner = f"{match['module']}.lora_{kind}{'B' if match['side'] == 'A' else 'A'}{end}"
        if partner not in self.file.infos:
            raise CheckpointError(
                f"{self.directory / TENSORS} has '{shown(name)}' but no '{shown(partner)}'",
                remedy="the adapter is incomplete: save or download it again.",
            )
        if match["side"] == "B":
            return
        module = match["module"].removeprefix(PREFIX)
        shapes = self.file.infos[name].shape, self.file.infos[partner].shape
        if [len(shape) for shape in shapes] != [2, 2] or shapes[0][0] != shapes[1][1]:
            raise CheckpointError(
                f"{self.directory / TENSORS}: the factors of '{shown(weight)}' do not fit together: A has the shape "
                f"{shapes[0]}, B {shapes[1]}",
                remedy="the adapter is damaged: save or download it again.",
            )
        num_experts = self._num_experts(weight)
        rank = shapes[0][0] // num_experts
        if rank * num_experts != shapes[0][0] or rank != scaling.rank:
            raise CheckpointError(
                f"the factors of '{shown(weight)}' in {self.directory / TENSORS} have rank "
                f"{shapes[0][0] / num_experts:g}, but {CONFIG} says {scaling.rank} (r, 8 by default, and "
                "rank_pattern): the scale of the change depends on it, and peft does not load such an adapter",
                remedy=f"correct {CONFIG}, or save or download the adapter again.",
            )
        magnitude = match["module"] + MAGNITUDE
        self.factors[weight] = Factors(
            name,
            partner,
            scaling.scale,
            bool(kind) or self._is_turned(weight, (shapes[1][0], shapes[0][1])),
            magnitude if magnitude in self.file.infos else None,
        )
        if self.config.use_dora and (self.factors[weight].is_transposed or magnitude not in self.file.infos):
            is_transposed = self.factors[weight].is_transposed
            raise CheckpointError(
                f"the adapter {self.directory} is DoRA, and its '{shown(module)}' has a form that backmerge does not "
                f"read ({'transposed' if is_transposed else 'without ' + MAGNITUDE})",
                remedy="merge it with peft's merge_and_unload() and give the full checkpoint as TUNED.",
            )

    def _adapted(self, module: str) -> tuple[str, str]:
        """Return the weight that a module's factors change, and its name in peft's patterns."""
        if self.config.target_parameters:
            inner = module
            while inner.endswith(WRAPPED):
                inner = inner.removesuffix(WRAPPED)
            wrappers = (len(module) - len(inner)) // len(WRAPPED)
            # peft wraps a module once for each of its targeted parameters, in the order of their declaration
            targeted = [
                leaf for leaf in self._layout.own_tensors.get(inner, ()) if self._is_targeted(f"{inner}.{leaf}")
            ]
            if wrappers < len(targeted):
                parameter = f"{inner}.{targeted[len(targeted) - 1 - wrappers]}"
                return parameter, parameter
        return f"{module}.weight", module

    def _is_targeted(self, parameter: str) -> bool:
        targets = self.config.target_parameters or ()
        return any(parameter == target or parameter.endswith(f".{target}") for target in targets)

    def _num_experts(self, weight: str) -> int:
        """Return how many experts a parameter stacks; only called for those that are adapted as parameters."""
        shape = self._layout.shapes.get(weight, ()) if self._is_targeted(weight) else ()
        return shape[0] if len(shape) == STACKED else 1

    def _is_turned(self, weight: str, delta: tuple[int, int]) -> bool:
        """Return whether a weight is stored (in, out).

        peft decides by the layer's type, and overrides `fan_in_fan_out` if that says otherwise.
        """
        if self._is_targeted(weight) and len(self._layout.shapes.get(weight, ())) == STACKED:
            return weight in self._layout.transposed
        if not self.config.fan_in_fan_out and self._kind not in CONV1D_KINDS:
            return False
        if delta[0] != delta[1]:
            info = self.base.infos.get(weight)
            return info is not None and info.shape == delta[::-1]
        return weight in self._layout.transposed

    @functools.cached_property
    def _kind(self) -> str | None:
        kind = read_json(self.base.companions / "config.json").get("model_type")
        return kind if isinstance(kind, str) else None

    def _check_num_tokens(self) -> None:
        """Report the cause if the adapter was trained on embeddings with another number of tokens."""
        infos = self.file.infos
        rows = {name: infos[saved].shape[0] for name, saved in self.replaced.items() if infos[saved].shape}
        for name, factors in self.factors.items():
            rows[name] = infos[factors.a].shape[1] if factors.is_embedding else infos[factors.b].shape[0]
        for name, theirs in rows.items():
            place = next(iter(self._embedding_places(name)), None)
            if place is not None and theirs != self.base.infos[place].shape[0]:
                raise CheckpointError(
                    f"the adapter {self.directory} was trained on embeddings of {theirs} tokens ('{shown(name)}'), and "
                    f"the base {self.base.directory} has {self.base.infos[place].shape[0]}: tokens were added, or rows "
                    "padded, before the training",
                    remedy=f"resize the base in the same way: load it, call resize_token_embeddings({theirs}), "
                    "save it, and give that as BASE; or give the base that the adapter was trained on.",
                )

    def _embedding_places(self, name: str) -> Sequence[str]:
        """Return the base's tensors on disk for an embedding or head in memory; empty if it is neither."""
        if not name.endswith(TIED_NAMES):
            return ()
        return self._tied_on_disk or ([name] if name in self.base.infos else self._parts_of(name))

    @functools.cached_property
    def _tied_on_disk(self) -> list[str]:
        """Return the names of the tied embeddings on disk; empty if the base ties none."""
        return [name for name in self.base.infos if name.endswith(TIED_NAMES)] if ties_embeddings(self.base) else []

    def _settle_tied(self) -> None:
        """Drop copies of the base's embeddings; if both tied ones have the same change, keep one.

        Tied embeddings are one tensor, on disk under one name or two. With `ensure_weight_tying` peft trains the one
        tensor, and saves it under one name or both. Without it, peft changes only one of the two uses, which one tensor
        cannot express: it is refused.
        """
        for name, saved in list(self.replaced.items()):
            if self._repeats_base(saved, self._embedding_places(name)):
                del self.replaced[name]
        held = self._tied_on_disk
        if not held:
            return
        changed = sorted(name for name in self.factors.keys() | self.replaced.keys() if name.endswith(TIED_NAMES))
        if not changed:
            return
        is_one = len(changed) == 1 and self.config.ensure_weight_tying
        if not is_one and not (len(changed) == 2 and self._is_same_change(*changed)):
            raise CheckpointError(
                f"the adapter {self.directory} changes '{shown(changed[0])}', which the base {self.base.directory} "
                "ties to its other embedding: the two differ after tuning, but the base has only one tensor for both",
                remedy="merge it with peft's merge_and_unload() and untie the base's embeddings too; or train with "
                "ensure_weight_tying=True, which keeps them one.",
            )
        of_factors, of_whole = self.factors.get(changed[0]), self.replaced.get(changed[0])
        for name in changed:
            self.factors.pop(name, None)
            self.replaced.pop(name, None)
        for name in held:
            if of_factors is not None:
                self.factors[name] = of_factors
            elif of_whole is not None:
                self.replaced[name] = of_whole

    def _repeats_base(self, saved: str, names: Iterable[str]) -> bool:
        """Return whether the adapter saved the base's own tensor, as peft does with `save_embedding_layers`."""
        return any(has_same_values(self.file, saved, self.base, name) for name in names)

    def _is_same_change(self, first: str, second: str) -> bool:
        """Return whether two tied embeddings have the same change: both whole, or by the same product."""
        if first in self.replaced and second in self.replaced:
            return has_same_values(self.file, self.replaced[first], self.file, self.replaced[second])
        if first not in self.factors or second not in self.factors:
            return False
        pairs = []
        for factors in (self.factors[first], self.factors[second]):
            a, b = self.file.float32_array(factors.a), self.file.float32_array(factors.b)
            pairs.append((b.T, a.T) if factors.is_transposed else (a, b))
        is_equal = all(
            one.shape == other.shape and bool((one == other).all()) for one, other in zip(*pairs, strict=True)
        )
        return is_equal and self.factors[first].scale == self.factors[second].scale

    def _place_on_disk(self) -> None:
        """Replace names in memory by those on disk."""
        factors, replaced, added = self.factors, self.replaced, self.added
        self.factors, self.replaced, self.added = {}, {}, {}
        for name, its_factors in factors.items():
            for place, region in self._places(name, its_factors.a):
                self.factors[place] = its_factors._replace(region=region)
        for name, saved in replaced.items():
            self.replaced[self._whole_place(name, saved)] = saved
        for name, (saved, scale) in added.items():
            self.added[self._whole_place(name, saved)] = (saved, scale)

    def _places(self, name: str, saved: str) -> Iterator[tuple[str, Region | None]]:
        """Yield the tensors on disk that make up a parameter in memory, and the part of it that each of them is."""
        on_disk = [name] if name in self.base.infos else self._parts_of(name)
        if not on_disk:
            raise CheckpointError(
                f"{self.directory / TENSORS} has '{shown(saved)}', but the base {self.base.directory} has no tensor "
                f"'{shown(name)}', either on disk or in memory",
                remedy=self._other_base(),
            )
        for place in on_disk:
            region = None if place == name else self._layout.places[place].region
            self.is_renamed |= place != name
            shape = self.base.infos[place].shape
            if region is None and len(shape) == STACKED:
                region = Region(shape[0], 0, 0, shape[1], shape[1])
            yield place, region

    def _parts_of(self, name: str) -> list[str]:
        try:
            return list(self._layout.on_disk.get(name, ()))
        except CheckpointError:
            return []

    def _whole_place(self, name: str, saved: str) -> str:
        if name in self.base.infos:
            return name
        places = list(self._places(name, saved))
        if len(places) == 1 and self._layout.places[places[0][0]].region is None:
            return places[0][0]
        raise CheckpointError(
            f"{self.directory / TENSORS} replaces '{shown(name)}', which is {len(places)} tensors on disk",
            remedy="merge it with peft's merge_and_unload() and give the full checkpoint as TUNED.",
        )

    def _check_copies(self) -> None:
        for saved in sorted(name for name in self.file.infos if name.endswith(COPY)):
            name = saved.removeprefix(PREFIX).removesuffix(COPY) + ".weight"
            tied = self._tied_on_disk if name.endswith(TIED_NAMES) else []
            if not self._repeats_base(saved, tied or [self._whole_place(name, saved)]):
                raise CheckpointError(
                    f"the adapter {self.directory} has '{shown(saved)}', unlike the base's '{shown(name)}'",
                    remedy=self._other_base(),
                )

    def _check_shapes(self) -> None:
        for name, factors in self.factors.items():
            shapes = [self.file.infos[factor].shape for factor in (factors.b, factors.a)]
            delta = (shapes[0][0], shapes[1][1])
            self._check_fits(name, delta[::-1] if factors.is_transposed else delta, "changes", factors.region)
            if factors.magnitude is not None and self.file.infos[factors.magnitude].shape != delta[:1]:
                raise CheckpointError(
                    f"{self.directory / TENSORS}: '{shown(factors.magnitude)}' is not {delta[0]} magnitudes",
                    remedy="the adapter is damaged: save or download it again.",
                )
        for name, saved in self.replaced.items():
            self._check_fits(name, self.file.infos[saved].shape, "replaces")
        for name, (saved, _) in self.added.items():
            self._check_fits(name, self.file.infos[saved].shape, "changes")
        for name in (name for factors in self.factors.values() for name in (factors.a, factors.b)):
            if self.file.infos[name].dtype not in FLOATS:
                raise CheckpointError(
                    f"{self.directory / TENSORS}: '{shown(name)}' has dtype {self.file.infos[name].dtype}",
                    remedy="give an adapter in float32, bfloat16 or float16.",
                )

    def _check_fits(self, name: str, shape: tuple[int, ...], verb: str, region: Region | None = None) -> None:
        there = self.base.infos[name].shape
        if region is not None:
            there = (region.height, there[-1])
        if shape != there:
            raise CheckpointError(
                f"the adapter {self.directory} {verb} '{shown(name)}' with shape {shape}, but in the base "
                f"{self.base.directory} its shape is {there}",
                remedy=self._other_base(),
            )

    def _check_base(self) -> None:
        """Compare the base's tensors with those of the training: adapters that backmerge trained record them."""
        recorded = trained_on(self.directory)
        if recorded is None:
            return
        if recorded.fingerprint == self.base.fingerprint:
            self.is_base_proven = True
        elif recorded.tensors is None or not isinstance(self.base, Checkpoint):
            # the fingerprint also covers text files, so that a different one does not prove other weights
            note_once(
                self,
                f"{self.base.companions} is not exactly the base that the adapter {self.directory} was trained on: its "
                "weights or a text file (config, tokenizer, chat template, licence) changed, and the adapter does not "
                "record which. Make sure that the weights are the same.",
            )
        elif recorded.tensors == self.base.tensors_fingerprint:
            self.is_base_proven = True
        else:
            raise CheckpointError(
                f"other_base: the adapter {self.directory} was trained on other weights than those in "
                f"{self.base.directory} (their fingerprints are {recorded.tensors[:12]} and "
                f"{self.base.tensors_fingerprint[:12]})",
                remedy=self._other_base(),
            )

    def _other_base(self) -> str:
        """Return the remedy for an adapter that does not fit; it never names the base that was just given."""
        named = self.config.base_model_name_or_path
        if named and _is_folder(named, self.base.directory):
            return (
                "the adapter names this base: if the base has changed since the training, give the earlier one; "
                "otherwise save or download the adapter again."
            )
        return f"give the base that the adapter was trained on{f': {shown(named)}' if named else ''}."


def _is_folder(named: str, directory: Path) -> bool:
    """Return whether an adapter's name for its base is this folder, or the one of this folder in the hub's cache."""
    if folder_named(named).absolute() == directory.absolute():
        return True
    return directory.parent.parent.name == f"models--{named.replace('/', '--')}"


def _factor(name: str) -> re.Match[str] | None:
    match = FACTOR.fullmatch(name)
    return match if match is not None and bool(match["kind"]) is not bool(match["end"]) else None


def _opened(directory: Path) -> SafetensorsFile:
    if not (directory / TENSORS).is_file():
        raise CheckpointError(
            f"{directory} has {CONFIG} but no {TENSORS}",
            remedy="save the adapter as safetensors (peft does so by default); pickles are not read.",
        )
    return SafetensorsFile(directory / TENSORS)


def open_weights(directory: Path, base: Weights, *, unwrap: bool = False) -> Weights:
    """Open a tuned model's weights, a full checkpoint or an adapter on `base`.

    Raises:
        CheckpointError: it is damaged, or is an adapter that cannot be used on this base.
        MergeError: only one of the two ties its embeddings.
    """
    if is_adapter(directory):
        check_unquantised(base.directory, read_config(base.companions), "merged")
        adapter = AdapterOnBase(directory, base)
        if not adapter.is_base_proven:
            check_kinship(adapter)
        return adapter
    tuned = Checkpoint(directory, unwrap=unwrap)
    settle_one_sided(tuned, base)
    return tuned
