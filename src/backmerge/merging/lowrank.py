"""The adapter realisation: if the tuned models are LoRAs, so is their merge, which is written as a few megabytes.

A method with a merge of the form base + Σ cᵢ·Δᵢ needs only the inner products of the deltas Δᵢ = sᵢ·Bᵢ·Aᵢ, and these
are known from the factors alone:

    <Δi, Δj> = sᵢ·sⱼ·Σ (BᵢᵀBⱼ) ∘ (AᵢAⱼᵀ)        (∘ element by element)
    Σ cᵢ·Δᵢ  = [c₁·s₁·B₁ .. cₙ·sₙ·Bₙ] · [A₁; ..; Aₙ]

So the base is not read, torch is not imported, and no dense delta is formed. Tensors that were trained whole
(`modules_to_save`, norms, biases) are merged element by element.

The written adapter has one rank, `lora_alpha` equal to it, and no patterns: vLLM reads nothing else of a configuration,
and parsers that expect an integer would truncate an alpha that includes λ.

The coefficients come from the unrounded factors. Those of Model Stock, which depend on angles, therefore differ a
little from the ones that merged bfloat16 checkpoints of the same adapters give: those deltas contain rounding noise.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from backmerge import __version__
from backmerge.checkpoints.adapter import (
    TIED_NAMES,
    AdapterOnBase,
    TrainedOn,
    own_fingerprint,
    ties_embeddings,
    trained_on,
)
from backmerge.checkpoints.adapter_writer import AdapterForm, AdapterWriter, Module, Names, encoded
from backmerge.checkpoints.files import BLOCK, FLOATS, MERGED_DTYPES, SafetensorsFile, TensorInfo
from backmerge.checkpoints.reader import CARD, Checkpoint, Weights
from backmerge.checkpoints.writer import check_room
from backmerge.errors import CheckpointError, MergeError, remedy_for
from backmerge.merging.factors import Core, Losses, Part, Recompression, Stack, scaled
from backmerge.merging.inputs import LamByDirection, LayerInputs
from backmerge.merging.method import Method, call, check_inputs
from backmerge.merging.recipe import Variant
from backmerge.merging.schedule import Settings
from backmerge.outputs import listed_files
from backmerge.runs import key_of, whole_directory

MAX_VLLM_RANK = 512  # largest value of vLLM's --max-lora-rank


class WrittenAdapter(NamedTuple):
    """A merge on disk, as an adapter.

    Attributes:
        directory: The adapter's folder.
        rank: Rank of all its factors.
        recompression: The loss by a lower rank, if one was requested.
        vllm_obstacle: Why vLLM cannot serve it, if it cannot.
    """

    directory: Path
    rank: int
    recompression: Recompression | None
    vllm_obstacle: str | None


def adapter_obstacle(variant: Variant) -> str | None:
    """Return why a recipe is not an exact low-rank adapter that peft loads, or `None` if it is. Reads no values.

    Raises:
        ConfigError: there is no such method.
    """
    return next(_obstacles(variant), None)


def write_adapter(
    variant: Variant,
    directory: Path,
    *,
    rank: int | None = None,
    replace: bool = False,
    verify: Callable[[Path, Variant], None] | None = None,
) -> WrittenAdapter:
    """Write one merge as an adapter; see `write_adapters`."""
    one = {directory: variant}
    return write_adapters(one, rank=rank, replace=replace, verify=verify)[0]


def write_adapters(
    outputs: Mapping[Path, Variant],
    *,
    rank: int | None = None,
    replace: bool = False,
    add_files: Callable[[Path, WrittenAdapter], None] | None = None,
    verify: Callable[[Path, Variant], None] | None = None,
) -> list[WrittenAdapter]:
    """Write merges as PEFT adapters, each whole or not at all, reading the factors once.

    The tensors are in the variants' dtype, or float32 if they name none. In it the written B·A is cᵢ·sᵢ·Bᵢ·Aᵢ with one
    rounding of each element of B.

    `backmerge.json` next to them has the recipe's identity. It names the base by its fingerprint only if that is
    already known, since computing it reads the whole base; else by the names, shapes and dtypes of its tensors.

    Args:
        outputs: Directory to variant; the variants differ in λ alone.
        rank: Recompress every module to this rank: the nearest matrix of that rank, by the singular values of the
            change.
        replace: Whether to replace adapters that backmerge wrote in these directories.
        add_files: Writes other files of a merge, such as a model card, into its folder before the folder is moved into
            place.
        verify: Checks the last one before any is moved into place; not called if the rank is lowered.

    Raises:
        MergeError: the recipe is not an adapter (see `adapter_obstacle`), or is wrong, or a factor is not finite.
        CheckpointError: the disk has not enough room or cannot be written to, or a file was damaged.
    """
    variants = list(outputs.values())
    obstacle = adapter_obstacle(variants[0])
    if obstacle is not None:
        raise MergeError(f"this recipe cannot be written as an adapter: {obstacle}", remedy="write it as a checkpoint.")
    if rank is not None and rank < 1:
        raise MergeError(f"an adapter's rank cannot be {rank}", remedy="give a rank of at least 1.")
    merge = LowRankMerge(variants, rank=rank)
    try:
        with ExitStack() as stack:
            places = [stack.enter_context(whole_directory(directory, replace=replace)) for directory in outputs]
            infos = merge.infos
            check_room(places[0].parent, [merge.form.infos(infos)] * len(places))
            writers = [stack.enter_context(AdapterWriter(place, merge.form, infos)) for place in places]
            losses = merge.write_factors(writers)
            merge.write_whole_tensors(writers)
            written = [
                WrittenAdapter(directory, merge.form.rank, loss.summary if rank else None, merge.vllm_obstacle)
                for directory, loss in zip(outputs, losses, strict=True)
            ]
            for place, variant, result in zip(places, variants, written, strict=True):
                variant.companions.beyond(variant.base.directory).write(place)
                _write_card(place, variant, result)
                if add_files is not None:
                    add_files(place, result)
            if verify is not None and rank is None:
                verify(places[-1], _as_adapter(variants[-1]))
    except OSError as error:
        where = next(iter(outputs)) if len(outputs) == 1 else next(iter(outputs)).parent
        raise CheckpointError(
            f"cannot write {where}: {error}",
            remedy=f"{remedy_for(error) or 'Give another --out.'} Nothing was left there.",
        ) from error
    return written


def _as_adapter(variant: Variant) -> Variant:
    return replace(variant, served_as="adapter")


def _parts(adapters: Sequence[AdapterOnBase]) -> dict[str, list[Part]]:
    """Return the low-rank changes of each tensor, in the order of the base's names."""
    found: dict[str, list[Part]] = {}
    for number, adapter in enumerate(adapters):
        for name, factors in adapter.factors.items():
            found.setdefault(name, []).append(Part(number, adapter, factors))
    return dict(sorted(found.items()))


def _whole_tensors(base: Weights, adapters: Sequence[AdapterOnBase]) -> list[str]:
    """Return the tensors that an adapter trained whole, without copies of a tied base's embedding."""
    found = {name for adapter in adapters for name in (*adapter.replaced, *adapter.added)}
    if ties_embeddings(base):  # any other change to these is refused when the adapter is opened
        found = {name for name in found if not name.endswith(TIED_NAMES)}
    return sorted(found)


def _in_memory(base: Weights, adapters: Sequence[AdapterOnBase]) -> Mapping[str, str]:
    """Return the base's tensors on disk, each with its name in memory, which adapters use."""
    renamed = (adapter.in_memory for adapter in adapters if adapter.is_renamed)
    return next(renamed, {name: name for name in base.infos})


def _names(base: Weights, adapters: Sequence[AdapterOnBase]) -> Names:
    in_memory = _in_memory(base, adapters)
    adapted = {in_memory[name].removesuffix(".weight") for name in _parts(adapters)}
    return Names(in_memory.values(), adapted, {in_memory[name] for name in _whole_tensors(base, adapters)})


def _obstacles(variant: Variant) -> Iterator[str]:
    """Yield the reasons; each may assume that the earlier ones do not hold."""
    base = variant.base
    if not variant.tuned_models:
        yield "it is the base itself"
    method = variant.method
    if method.coefficients is None:
        yield f"'{method.name}' is not a weighted sum of the tuned models' changes"
    if method.survey is not None and method.survey.is_needed(variant.parameters):
        yield f"'{method.name}' measures all tensors of the models before it merges the first"
    if variant.extra:
        yield f"'{method.name}' needs more models than base and tuned"
    if variant.rounding != "nearest":
        yield f"{variant.rounding} rounding is noise of full rank"
    if variant.dtype is not None and variant.dtype not in MERGED_DTYPES.values():
        yield f"adapters are not written in {variant.dtype}"
    if not isinstance(base, Checkpoint):
        yield f"the base {base.directory} is not an unchanged checkpoint on disk"
    for tuned in variant.tuned_models:
        if not isinstance(tuned, AdapterOnBase):
            yield f"the tuned model {tuned.directory} is a full checkpoint"
        elif tuned.base is not base and tuned.base.directory.resolve() != base.directory.resolve():
            yield f"{tuned.directory} is an adapter on {tuned.base.directory}, not on the base {base.directory}"
    yield from _obstacles_of_adapters(base, cast(tuple[AdapterOnBase, ...], variant.tuned_models))


def _obstacles_of_adapters(base: Weights, adapters: Sequence[AdapterOnBase]) -> Iterator[str]:
    for adapter in adapters:
        for name, factors in adapter.factors.items():
            if factors.magnitude is not None:
                yield f"{adapter.directory} is DoRA: its change of '{name}' is not low-rank"
            if factors.region is not None:
                yield f"{adapter.directory} adapts stacked experts (target_parameters), at '{name}'"
        tied = [name for name in (*adapter.factors, *adapter.replaced) if name.endswith(TIED_NAMES)]
        if tied and ties_embeddings(base) and adapter.config.ensure_weight_tying:
            yield f"{adapter.directory} changes '{tied[0]}' together with the tensor tied to it (ensure_weight_tying)"
    turned: dict[bool, str] = {}
    for name, parts in _parts(adapters).items():
        if len({part.factors.is_embedding for part in parts}) > 1:
            yield f"'{name}' is adapted as an embedding by one adapter and as a linear layer by another"
        turned |= {part.factors.is_transposed: name for part in parts if not part.factors.is_embedding}
    if len(turned) > 1:
        yield f"the adapters differ in fan_in_fan_out, at '{turned[True]}' and '{turned[False]}'"
    for name in _whole_tensors(base, adapters):
        if base.infos[name].dtype not in FLOATS:
            yield f"'{name}' is trained whole and has dtype {base.infos[name].dtype}"
    names = _names(base, adapters)
    if names.obstacle is not None:
        yield names.obstacle


class LowRankMerge:
    """The merge of several λs as adapters, ready to be written.

    Args:
        variants: At least one, without an obstacle; they differ in λ alone.
        rank: The rank to recompress to.

    Attributes:
        form: Names, shapes and dtype of the files' tensors.

    Raises:
        MergeError: the method does not take these models or parameters.
    """

    def __init__(self, variants: Sequence[Variant], *, rank: int | None = None) -> None:
        recipe = variants[0]
        assert all(variant.at(None) == recipe.at(None) for variant in variants), "variants differ in λ alone"
        self.variants = tuple(variants)
        self.base = recipe.base
        self.adapters = cast(tuple[AdapterOnBase, ...], recipe.tuned_models)
        self.method: Method = recipe.method
        self._settings = Settings(variants)
        check_inputs(self.method, recipe.inputs)
        for statistics in recipe.inputs.values():
            statistics.check_fits(self.base)
        self._parts = _parts(self.adapters)
        self._in_memory = _in_memory(self.base, self.adapters)
        self._ranks = {
            name: sum(part.adapter.file.infos[part.factors.a].shape[0] for part in parts)
            for name, parts in self._parts.items()
        }
        self._most = rank if rank is not None else max(self._ranks.values())
        self.form = AdapterForm(
            modules={self._module_name(name): _module(parts[0]) for name, parts in self._parts.items()},
            names=_names(self.base, self.adapters),
            rank=min(self._most, max(self._ranks.values())),
            dtype=recipe.dtype or "F32",
            is_transposed=any(p.factors.is_transposed and not p.factors.is_embedding for p in self._all_parts()),
            source=self.adapters[0].config,
        )
        self._files: dict[Path, SafetensorsFile] = {}

    def _module_name(self, name: str) -> str:
        return self._in_memory[name].removesuffix(".weight")

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Return the base's tensors by their names in memory."""
        return {self._in_memory[name]: info for name, info in self.base.infos.items() if name in self._in_memory}

    def _all_parts(self) -> Iterator[Part]:
        return (part for parts in self._parts.values() for part in parts)

    @property
    def vllm_obstacle(self) -> str | None:
        """Return why vLLM cannot serve the adapter, or may not (embeddings: that depends on the model); else `None`."""
        if self.form.rank > MAX_VLLM_RANK:
            return f"its rank is {self.form.rank}, and vLLM takes at most {MAX_VLLM_RANK}: recompress it"
        if self.form.names.saved:
            return f"it contains whole tensors, such as '{next(iter(self.form.names.saved))}'"
        embeddings = [name for name in self._parts if name.endswith(TIED_NAMES)]
        if embeddings:
            return f"it adapts '{embeddings[0]}', which vLLM supports for some architectures only"
        return None

    def write_factors(self, writers: Sequence[AdapterWriter]) -> list[Losses]:
        """Write the low-rank part of each variant; return the loss by recompression of each."""
        losses = [Losses() for _ in writers]
        for name, parts in self._parts.items():
            module = self._module_name(name)
            read = Stack.read(parts)
            shares = self._coefficients(name, read.gram(len(self.adapters)))
            inputs = {kind: statistics.of(name) for kind, statistics in self.variants[0].inputs.items()}
            known = {**inputs, "factors": read}
            plain = self._prepared(module, read)
            for writer, variant, share, loss in zip(writers, self.variants, shares, losses, strict=True):
                weight, (stack, core, whole_a) = read.spread(share), plain
                by_direction = self._through_inputs(name, known, variant)
                if by_direction is not None:  # in place of the coefficients
                    weight = read.scales
                    stack, core, whole_a = self._prepared(module, read.with_a(by_direction.of_rows(read.a)))
                if core is None:
                    a, b = whole_a, self._encoded(module, "B", scaled(stack.b, weight))
                    loss.add(module, float(weight @ stack.products @ weight), 0.0)
                else:
                    low_a, low_b, squares = core.cut(weight, self._most)
                    a, b = self._encoded(module, "A", low_a), self._encoded(module, "B", low_b)
                    loss.add(module, float(squares.sum()), float(squares[self._most :].sum()))
                assert a is not None
                for saved, values in zip(self.form.factor_names(module), (a, b), strict=True):
                    writer.write(saved, values)
        return losses

    def _prepared(self, module: str, stack: Stack) -> tuple[Stack, Core | None, np.ndarray | None]:
        """Return a module's factors, and either the core used to lower their rank or A as it is written."""
        if len(stack.numbers) > self._most:
            return stack, Core(stack), None
        return stack, None, self._encoded(module, "A", stack.a)

    def _through_inputs(
        self, name: str, known: Mapping[str, LayerInputs | Stack | None], variant: Variant
    ) -> LamByDirection | None:
        """Return the right-hand factor of a tensor's delta, if the method has more than a number for it."""
        if self.method.through_inputs is None:
            return None
        found: LamByDirection | None = call(self.method.through_inputs, known, self._settings.at(name, variant))
        return found

    def _encoded(self, module: str, side: str, factor: np.ndarray) -> np.ndarray:
        """Return a factor in the dtype of the file, padded with rows (A) or columns (B) of zeros up to its rank."""
        axis = "AB".index(side)
        missing = self.form.rank - factor.shape[axis]
        if missing:
            factor = np.pad(factor, [(0, missing), (0, 0)] if axis == 0 else [(0, 0), (0, missing)])
        return encoded(factor, self.form.dtype, f"factor {side} of the merged '{module}'")

    def _coefficients(self, name: str, gram: np.ndarray) -> list[np.ndarray]:
        """Return the tuned models' shares in a tensor's merge, for each variant.

        Args:
            name: The tensor's name.
            gram: Inner products of the deltas, float64, shape (tuned, tuned).
        """
        if not np.isfinite(gram).all():
            worst = int(np.argmin(np.isfinite(np.diagonal(gram))))
            raise MergeError(
                f"the change of tensor '{name}' in the adapter {self.adapters[worst].directory} holds NaN or infinity",
                remedy="the training diverged or the file is damaged; this adapter cannot be used.",
            )
        assert self.method.coefficients is not None
        found = []
        for variant in self.variants:
            shares = call(self.method.coefficients, {"gram": gram}, self._settings.at(name, variant))
            found.append(np.array(shares, dtype=np.float64).reshape(len(self.adapters)))
        return found

    def write_whole_tensors(self, writers: Sequence[AdapterWriter]) -> None:
        """Merge and write the tensors that were trained whole, in blocks: in float64, rounded once."""
        changed = set(_whole_tensors(self.base, self.adapters))
        on_disk = {in_memory: name for name, in_memory in self._in_memory.items()}
        for in_memory, saved in self.form.names.saved.items():
            name = on_disk[in_memory]
            total = self.base.infos[name].num_elements
            blocks = [(start, min(start + BLOCK, total)) for start in range(0, total, BLOCK)]
            coefficients = [np.zeros(len(self.adapters))] * len(writers)
            if name in changed:
                gram = np.zeros((len(self.adapters), len(self.adapters)))
                for start, stop in blocks:
                    deltas = self._deltas(name, start, stop, self._base_block(name, start, stop))
                    with np.errstate(invalid="ignore"):  # NaN is reported by the tensor's name
                        gram += deltas @ deltas.T
                coefficients = self._coefficients(name, gram)
            for start, stop in blocks:
                base = self._base_block(name, start, stop)
                deltas = self._deltas(name, start, stop, base)
                for writer, shares in zip(writers, coefficients, strict=True):
                    merged = self._endpoint(name, start, stop, base, shares)
                    merged = base + shares @ deltas if merged is None else merged
                    writer.write(saved, encoded(merged, self.form.dtype, f"the merged '{name}'"), start)

    def _endpoint(self, name: str, start: int, stop: int, base: np.ndarray, shares: np.ndarray) -> np.ndarray | None:
        """Return the bits if a merge is one whole model: base + (tuned - base) would lose the sign of −0.0."""
        taken = np.flatnonzero(shares)
        if not len(taken):
            return base
        adapter = self.adapters[int(taken[0])]
        if len(taken) == 1 and shares[taken[0]] == 1 and name in adapter.replaced:
            return adapter.file.float32_block(adapter.replaced[name], start, stop)
        return None

    def _base_block(self, name: str, start: int, stop: int) -> np.ndarray:
        path = self.base.infos[name].file
        if path not in self._files:
            self._files[path] = SafetensorsFile(path)
        block = self._files[path].float32_block(name, start, stop).astype(np.float64)
        if not np.isfinite(block).all():
            raise MergeError(
                f"tensor '{name}' of the base {self.base.directory} holds NaN or infinity",
                remedy="the file is damaged; this model cannot be used.",
            )
        return block

    def _deltas(self, name: str, start: int, stop: int, base: np.ndarray) -> np.ndarray:
        """Return each tuned model's change of a whole tensor's elements, shape (tuned, elements)."""
        deltas = np.zeros((len(self.adapters), stop - start))
        for delta, adapter in zip(deltas, self.adapters, strict=True):
            if name in adapter.replaced:
                delta[:] = adapter.file.float32_block(adapter.replaced[name], start, stop) - base
            elif name in adapter.added:
                saved, scale = adapter.added[name]
                delta[:] = scale * adapter.file.float32_block(saved, start, stop).astype(np.float64)
        return deltas


def _module(part: Part) -> Module:
    infos, factors = part.adapter.file.infos, part.factors
    return Module(infos[factors.a].shape[1], infos[factors.b].shape[0], factors.is_embedding)


@dataclass(frozen=True)
class _Named:
    """Weights in a recipe's identity, by a name that does not require reading them."""

    fingerprint: str


def _known_fingerprint(variant: Variant) -> str | None:
    """Return the base's fingerprint if an adapter's card or an earlier reading has it, without computing it."""
    known = vars(variant.base).get("fingerprint")
    for adapter in variant.tuned_models:
        recorded = trained_on(adapter.directory)
        known = known or (recorded.fingerprint if recorded is not None else None)
    return known


def adapter_identity(variant: Variant) -> dict[str, Any]:
    """Return the data that determine the adapter, without reading the base.

    The base is named by its fingerprint if that is known, and otherwise by the names, shapes and dtypes of its tensors.
    """
    layout = [[name, info.shape, info.dtype] for name, info in variant.base.infos.items()]
    base = _Named(_known_fingerprint(variant) or f"layout:{key_of(layout)}")
    adapters = cast(tuple[AdapterOnBase, ...], variant.tuned_models)
    tuned = [_Named(f"{base.fingerprint}+{adapter.own_fingerprint}") for adapter in adapters]
    # the card records that it is an adapter
    plain = replace(variant, base=cast(Weights, base), tuned=cast(list[Weights], tuned), served_as="checkpoint")
    return plain.weights_identity | variant.files_identity


def _write_card(place: Path, variant: Variant, result: WrittenAdapter) -> None:
    known = _known_fingerprint(variant)
    card: dict[str, Any] = {
        "backmerge": __version__,
        "realisation": "adapter",
        "recipe": adapter_identity(variant),
        "fingerprint": own_fingerprint(place),
        "rank": result.rank,
    }
    if known is not None:
        base = variant.base
        # with a fingerprint, the tensors have been read
        is_read = isinstance(base, Checkpoint) and "fingerprint" in vars(base)
        card |= TrainedOn(known, cast(Checkpoint, base).tensors_fingerprint if is_read else None).as_card()
    if result.recompression is not None:
        card["recompression"] = result.recompression._asdict()
    card["files"] = listed_files(place)
    (place / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
