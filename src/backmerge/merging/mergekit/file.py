"""A mergekit file, read and checked; nothing is opened but the configuration of models whose layers it counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.reader import read_json
from backmerge.config import Document
from backmerge.errors import ConfigError
from backmerge.registry import closest

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
TOP_KEYS = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
            "chat_template")  # fmt: skip
NOT_TAKEN = {
    "modules": "merging modules of a model apart",
    "tokenizer": "building another tokenizer",
    "residual_weight": "residual weights",
}

# what each method takes there: parameters of a model, and of the merge
TASK_VECTORS = {
    "task_arithmetic": (),
    "ties": ("density",),
    "dare_linear": ("density",),
    "dare_ties": ("density",),
    "della": ("density", "epsilon"),
    "della_linear": ("density", "epsilon"),
    "breadcrumbs": ("density", "gamma"),
    "breadcrumbs_ties": ("density", "gamma"),
}
TAKEN: Mapping[str, tuple[str, ...]] = {
    "linear": ("weight", "normalize"),
    "slerp": ("t",),
    "model_stock": ("filter_wise",),
    "nuslerp": ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
    "multislerp": ("weight", "normalize_weights", "eps"),
    "karcher": ("max_iter", "tol"),
    **{name: ("weight", "lambda", "normalize", "rescale", "int8_mask", *own) for name, own in TASK_VECTORS.items()},
}
# parameters of which only mergekit's own default can be had here
FIXED: Mapping[str, Any] = {
    "filter_wise": False, "nuslerp_flatten": True, "nuslerp_row_wise": False, "normalize_weights": True, "eps": 1e-8,
    "max_iter": 10, "tol": 1e-5,
}  # fmt: skip
RESCALED = ("dare_linear", "dare_ties", "della", "della_linear")
NORMALISED = ("ties", "della")  # by default
DEFAULTS = {"density": 1.0, "epsilon": 0.15, "gamma": 0.01}  # mergekit's


@dataclass(frozen=True)
class Source:
    """One of the models of a file, with its own parameters."""

    model: str
    parameters: Mapping[str, Any]
    place: tuple[str | int, ...]


@dataclass(frozen=True)
class MergekitRecipe:
    """A file's content, checked, with nothing opened yet.

    Attributes:
        method: Its name, here as there.
        base: Our base: theirs, or where they need none, the first model.
        sources: The other models, in order.
        base_source: The base's own entry, if it has one.
        parameters: Those of the merge.
        dtype: Of the result, as safetensors names it; nothing for the base's own.
        notes: What a person should know, in sentences.
    """

    method: str
    base: str
    sources: tuple[Source, ...]
    base_source: Source | None
    parameters: Mapping[str, Any]
    dtype: str | None
    notes: tuple[str, ...]


def read_mergekit(document: Document) -> MergekitRecipe:
    """What a file says, checked.

    Raises:
        ConfigError: it says something that cannot be had here; the message names key and line.
    """
    values = document.values
    for key in values:
        if key in NOT_TAKEN:
            raise _wrong(document, (key,), f"{NOT_TAKEN[key]} is not done here", "leave it away, or use mergekit.")
        if key not in TOP_KEYS:
            raise _wrong(document, (key,), f"unknown key{closest(str(key), TOP_KEYS)}", "mergekit would ignore it.")
    method = str(values.get("merge_method"))
    if method not in TAKEN:
        known = ", ".join(TAKEN)
        raise _wrong(
            document, ("merge_method",), f"'{method}' is not here{closest(method, TAKEN)}", f"one of: {known}."
        )
    listed, shared = _sources(document, method)
    base_name = values.get("base_model")
    if base_name is None and method not in ("linear", "karcher"):
        raise ConfigError(f"{document.source}: {method} needs a 'base_model'", remedy="name the model that was tuned.")
    base = str(base_name) if base_name is not None else listed[0].model
    base_source = next((source for source in listed if source.model == base), None)
    others = tuple(source for source in listed if source is not base_source)
    if not others:
        raise ConfigError(f"{document.source}: there is no model but the base", remedy="list the tuned models.")
    _check_ends(document, base)
    dtype = _dtype(document)
    notes = _notes(document, method, base_name, shared)
    return MergekitRecipe(method, base, others, base_source, shared, dtype, notes)


def _sources(document: Document, method: str) -> tuple[list[Source], dict[str, Any]]:
    """The models that are listed, and the merge's own parameters, those of a single slice included."""
    values = document.values
    shared = _parameters(document, ("parameters",), values.get("parameters"), method)
    if ("models" in values) == ("slices" in values):
        raise ConfigError(f"{document.source}: give either 'models' or 'slices'", remedy="list the models to merge.")
    at: tuple[str | int, ...] = ("models",)
    listed = values.get("models")
    if "slices" in values:
        slices = values["slices"]
        if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict):
            raise _wrong(document, ("slices",), "several slices are not put together here", "merge whole models.")
        _check_keys(document, ("slices", 0), slices[0], ("sources", "parameters"))
        at, listed = ("slices", 0, "sources"), slices[0].get("sources")
        own = _parameters(document, ("slices", 0, "parameters"), slices[0].get("parameters"), method)
        shared = {**shared, **own}
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise _wrong(document, at, "no list of models", "such as - model: ./tuned.")
    found = []
    for number, entry in enumerate(listed):
        place = (*at, number)
        _check_keys(document, place, entry, ("model", "parameters", "layer_range"))
        if not isinstance(entry.get("model"), str):
            raise _wrong(document, place, "'model' is missing, or no folder or hub id", "such as model: ./tuned.")
        if "layer_range" in entry:
            _check_whole(document, place, entry["model"], entry["layer_range"])
        own = _parameters(document, (*place, "parameters"), entry.get("parameters"), method)
        found.append(Source(entry["model"], own, place))
    names = [source.model for source in found]
    for name in names:
        if names.count(name) > 1:
            raise _wrong(document, at, f"'{name}' is listed twice", "list each model once.")
    return found, shared


def _check_whole(document: Document, place: tuple[str | int, ...], model: str, layers: Any) -> None:
    """A slice must be the whole model: layers cannot be dropped or moved here."""
    config = read_json(locate_model(model.partition("+")[0]) / "config.json")
    if layers != [0, config.get("num_hidden_layers")]:
        raise _wrong(
            document,
            (*place, "layer_range"),
            f"{layers} is not the whole of {model}, which has {config.get('num_hidden_layers')} layers",
            "merge whole models: layers are not dropped or moved here.",
        )


def _parameters(document: Document, at: tuple[str | int, ...], given: Any, method: str) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise _wrong(document, at, "no mapping of parameters", "such as {weight: 0.5}.")
    for name, value in given.items():
        place = (*at, name)
        if name not in TAKEN[method]:
            takes = ", ".join(TAKEN[method])
            raise _wrong(
                document, place, f"{method} has none here{closest(str(name), TAKEN[method])}", f"it takes {takes}."
            )
        if name in FIXED and value != FIXED[name]:
            raise _wrong(document, place, f"{value} cannot be had here", f"only {FIXED[name]}, mergekit's default.")
        if name == "normalize" and method == "linear" and value is not True:
            raise _wrong(document, place, "linear weights are always normalised here", "use task_arithmetic.")
        if name == "rescale" and value is not (method in RESCALED):
            raise _wrong(document, place, f"{value} cannot be had here", f"only {method in RESCALED}, the default.")
        if name in ("normalize", "int8_mask") and not isinstance(value, bool):
            raise _wrong(document, place, "expected true or false", "it is one for all tensors here.")
        _check_setting(document, place, value)
    return dict(given)


def _check_setting(document: Document, place: tuple[str | int, ...], value: Any) -> None:
    if isinstance(value, Mapping) or is_conditional(value):
        for number, condition in enumerate([value] if isinstance(value, Mapping) else value):
            row = place if isinstance(value, Mapping) else (*place, number)
            _check_keys(document, row, condition, ("filter", "value"))
            if "value" not in condition:
                raise _wrong(document, row, "a condition has no 'value'", "such as {filter: mlp, value: 0.5}.")
            _check_setting(document, (*row, "value"), condition["value"])
    elif isinstance(value, list):
        if not value or not all(_is_number(item) for item in value):
            raise _wrong(document, place, f"{value} is no gradient", "a gradient is a list of numbers.")
    elif not isinstance(value, bool) and not _is_number(value):
        raise _wrong(document, place, f"{value!r} is no number", "such as 0.5.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_ends(document: Document, base: str) -> None:
    """Tokenizer and chat template are the base's here."""
    source = document.values.get("tokenizer_source", "base")
    if source not in ("base", base):
        raise _wrong(document, ("tokenizer_source",), f"'{source}' is not done here", "the tokenizer is the base's.")
    template = document.values.get("chat_template", "auto")
    if template != "auto":
        raise _wrong(document, ("chat_template",), "another template is not put in", "the base's is kept: auto.")


def _dtype(document: Document) -> str | None:
    for key in ("out_dtype", "dtype"):
        name = document.values.get(key)
        if name is None:
            continue
        if name not in DTYPES:
            raise _wrong(document, (key,), f"'{name}' is unknown{closest(str(name), DTYPES)}", f"{', '.join(DTYPES)}.")
        if key == "out_dtype" or "out_dtype" not in document.values:
            return DTYPES[name]
    return None


def _notes(document: Document, method: str, base_model: Any, shared: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if document.values.get("dtype") in ("bfloat16", "float16"):
        notes.append("arithmetic is in float32 here, whatever 'dtype' says; results may differ in their last bit")
    if method in RESCALED:
        notes.append("what is kept is rescaled by its probability here, as in the paper, and masks depend on --seed")
    if base_model is None:
        notes.append("config and tokenizer are those of the first model; mergekit takes any")
    if shared.get("int8_mask"):
        notes.append("int8_mask has no meaning here")
    return tuple(notes)


def _check_keys(document: Document, at: tuple[str | int, ...], given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise _wrong(document, (*at, key), f"unknown key{closest(str(key), known)}", f"known: {', '.join(known)}.")


def _wrong(document: Document, at: tuple[str | int, ...], what: str, remedy: str) -> ConfigError:
    line = next((document.lines[at[:end]] for end in range(len(at), 0, -1) if at[:end] in document.lines), None)
    where = f", line {line}" if line else ""
    return ConfigError(f"{document.source}{where}: '{'.'.join(map(str, at))}': {what}", remedy=remedy)


def is_conditional(value: Any) -> bool:
    """Whether a parameter is a list of values with filters."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
