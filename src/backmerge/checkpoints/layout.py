"""Map tensors on disk to the model in memory: transformers renames, stacks and fuses some when it loads them.

Adapters use names in memory. The rules are transformers' own; its model is built without weights.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from backmerge.checkpoints.reader import Weights, read_json
from backmerge.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STACKED = 3  # dimensions of stacked experts: (experts, rows, columns)


class Region(NamedTuple):
    """The part of a parameter in memory that a tensor on disk makes up.

    Attributes:
        num_experts: How many experts the parameter stacks; 1 if it is a plain matrix.
        first: The tensor's first expert.
        start: Its first row in each expert.
        rows: Its rows in each expert.
        height: The parameter's rows in each expert.
    """

    num_experts: int
    first: int
    start: int
    rows: int
    height: int


class Place(NamedTuple):
    """The position of a tensor on disk in memory.

    Attributes:
        parameter: Its name in memory.
        region: The part of the parameter; `None` for the whole, unchanged parameter.
    """

    parameter: str
    region: Region | None = None


@dataclass(frozen=True)
class Layout:
    """A model in memory, compared with its files.

    Attributes:
        shapes: Shapes of all tensors in memory, by name; within a module in the order in which it declares them.
        places: Places of the tensors on disk. A tensor that transformers converts in an unsupported way has none.
        transposed: Parameters of shape (in, out) rather than (out, in), for each expert.
        ignored: Tensors on disk that the model does not load, such as buffers that it computes.
    """

    shapes: Mapping[str, tuple[int, ...]]
    places: Mapping[str, Place]
    transposed: frozenset[str]
    ignored: frozenset[str]

    @functools.cached_property
    def on_disk(self) -> Mapping[str, Sequence[str]]:
        """The tensors on disk that make up each parameter."""
        found: dict[str, list[str]] = {}
        for name, place in self.places.items():
            found.setdefault(place.parameter, []).append(name)
        return found

    @functools.cached_property
    def own_tensors(self) -> Mapping[str, Sequence[str]]:
        """The names of each module's own tensors, in the order in which it declares them."""
        found: dict[str, list[str]] = {}
        for name in self.shapes:
            module, _, leaf = name.rpartition(".")
            found.setdefault(module, []).append(leaf)
        return found


def layout_of(weights: Weights) -> Layout:
    """Return how transformers arranges a model in memory.

    Raises:
        CheckpointError: this version of transformers does not have the architecture.
    """
    config = json.dumps(read_json(weights.companions / "config.json"), sort_keys=True)
    shapes = tuple((name, info.shape) for name, info in weights.infos.items())
    return _layout(weights.companions, config, shapes)


@functools.lru_cache(maxsize=4)
def _layout(directory: Path, config: str, shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> Layout:  # noqa: ARG001
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    model = empty_model(directory)
    in_memory = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    on_disk = dict(shapes)
    places: dict[str, Place] = {}
    gathered: dict[str, dict[str, list[str]]] = {}  # parameter -> pattern -> tensors on disk, in their order
    unknown = set()
    for name in sorted(on_disk, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, in_memory)
        if renamed not in in_memory and name in in_memory:
            renamed, pattern = name, None
        if renamed not in in_memory:
            unknown.add(name)
        elif pattern is not None:
            gathered.setdefault(renamed, {}).setdefault(pattern, []).append(name)
        elif tuple(in_memory[renamed].shape) == on_disk[name]:
            places[name] = Place(renamed)
    for parameter, sources in gathered.items():
        converter = by_pattern[next(iter(sources))]
        places |= _converted(parameter, tuple(in_memory[parameter].shape), converter, sources, on_disk)
    return Layout(
        {name: tuple(tensor.shape) for name, tensor in in_memory.items()},
        places,
        _transposed(model),
        _ignored(model, unknown),
    )


def empty_model(directory: Path) -> PreTrainedModel:
    """Build a folder's model with transformers, without weights.

    Raises:
        CheckpointError: this version of transformers does not have the architecture, or the config is damaged.
    """
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError, ImportError) as error:
        kind = read_json(directory / "config.json").get("model_type")
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot build the {kind} model of {directory}, which is needed "
            f"for its names in memory: {str(error)[:300]}",
            remedy="a newer version may support it; or give the tuned model as a full checkpoint.",
        ) from error


def _converted(
    parameter: str,
    shape: tuple[int, ...],
    converter: Any,
    sources: Mapping[str, Sequence[str]],
    on_disk: Mapping[str, tuple[int, ...]],
) -> dict[str, Place]:
    """Return the places of tensors that are stacked by expert, concatenated by rows, or both, in one parameter."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    kinds = [(type(step), step.dim) for step in converter.operations]
    is_stack = kinds[:1] == [(MergeModulelist, 0)]
    if kinds not in (
        [(MergeModulelist, 0)],
        [(MergeModulelist, 0), (Concatenate, 1)],
        [(Concatenate, 0)],
    ) or len(shape) != (STACKED if is_stack else 2):
        return {}
    num_experts = shape[0] if is_stack else 1
    found: dict[str, Place] = {}
    start = 0
    for pattern in (pattern for pattern in converter.source_patterns if pattern in sources):
        names = sources[pattern]
        rows = on_disk[names[0]][0]
        if len(names) != num_experts or any(on_disk[name] != (rows, shape[-1]) for name in names):
            return {}
        for expert, name in enumerate(names):
            found[name] = Place(parameter, Region(num_experts, expert, start, rows, shape[-2]))
        start += rows
    return found if start == shape[-2] else {}


def _transposed(model: PreTrainedModel) -> frozenset[str]:
    from transformers.pytorch_utils import Conv1D

    found = set()
    for name, module in model.named_modules():
        # transformers sets this on its modules of experts, where peft reads it
        if isinstance(module, Conv1D) or vars(module).get("is_transposed") is True:
            found |= {f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)}
    return frozenset(found)


def _ignored(model: PreTrainedModel, unknown: set[str]) -> frozenset[str]:
    """Return those of the unknown tensors that transformers silently ignores."""
    from transformers.utils.loading_report import LoadStateDictInfo

    report = LoadStateDictInfo(set(), set(unknown), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(report)
    return frozenset(unknown - report.unexpected_keys)
