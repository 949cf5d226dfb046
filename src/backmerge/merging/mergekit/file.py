"""Read and check a mergekit file; nothing is opened except the configuration of models whose layers it counts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from backmerge.checkpoints.companions import Side
from backmerge.checkpoints.files import MERGED_DTYPES
from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.reader import read_json
from backmerge.config import Document, KeyPath
from backmerge.errors import ConfigError
from backmerge.merging.method import find_method
from backmerge.registry import closest

TOP_KEYS = ("merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
            "chat_template")  # fmt: skip
NOT_TAKEN = {
    "modules": "merging modules of a model separately",
    "tokenizer": "building another tokenizer",
}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")

# what each method takes in mergekit: parameters of a model, and of the merge
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
    "nearswap": ("t",),
    "arcee_fusion": (),
    "model_stock": ("filter_wise",),
    "nuslerp": ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
    "multislerp": ("weight", "normalize_weights", "eps"),
    "karcher": ("max_iter", "tol"),
    "anchored": ("lambda", "ridge"),  # ours, not mergekit's
    **{name: ("weight", "lambda", "normalize", "rescale", "int8_mask", *own) for name, own in TASK_VECTORS.items()},
}
# parameters that are supported only with mergekit's own default
FIXED: Mapping[str, Any] = {
    "filter_wise": False, "nuslerp_flatten": True, "nuslerp_row_wise": False, "normalize_weights": True, "eps": 1e-8,
    "max_iter": 10, "tol": 1e-5,
}  # fmt: skip
# parameters with a value for each model; mergekit reads all others from the merge's parameters alone
PER_MODEL = ("weight", "density", "epsilon", "gamma")
SWITCHES = ("normalize", "rescale", "int8_mask", "filter_wise", "nuslerp_flatten", "nuslerp_row_wise",
            "normalize_weights")  # fmt: skip
SEVERAL_BY_ANOTHER = ("linear", "dare_linear")  # take one tuned model here; another method makes the sum of several
RESCALED = ("dare_linear", "dare_ties", "della", "della_linear")
NORMALISED = ("ties", "della")  # by default
DEFAULTS = {"density": 1.0, "epsilon": 0.15, "gamma": 0.01}  # mergekit's


class Scope(NamedTuple):
    """Parameters, and their place in the file."""

    values: Mapping[str, Any]
    place: KeyPath


@dataclass(frozen=True)
class Source:
    """One of the models of a file, with its own parameters."""

    model: str
    parameters: Scope
    place: KeyPath

    @property
    def adapter(self) -> str | None:
        """The adapter in mergekit's `BASE+LORA`."""
        return self.model.partition("+")[2] or None


@dataclass(frozen=True)
class MergekitRecipe:
    """A file's content, checked, with nothing opened yet.

    Attributes:
        method: Its name, the same here and in mergekit.
        base: Our base: mergekit's, or the first model if the method needs none there.
        sources: The other models, in order.
        base_source: The base's own entry, if it has one.
        parameters: Parameters of the merge; the first that gives a tensor a value counts.
        dtype: The result's dtype, as safetensors names it; `None` for the base's own.
        tokenizer_from: The side that the tokenizer is taken from.
        notes: Differences that a user should know, in sentences.
        document: The file, for messages.
    """

    method: str
    base: str
    sources: tuple[Source, ...]
    base_source: Source | None
    parameters: tuple[Scope, ...]
    dtype: str | None
    tokenizer_from: Side
    notes: tuple[str, ...]
    document: Document


def read_mergekit(document: Document) -> MergekitRecipe:
    """Read and check a file.

    Raises:
        ConfigError: it has something that is not supported; the message names key and line.
    """
    for key in document.values:
        if key in NOT_TAKEN:
            raise refusal(document, (key,), f"{NOT_TAKEN[key]} is not supported", "remove it, or use mergekit.")
        if key not in TOP_KEYS:
            raise refusal(document, (key,), f"unknown key{closest(str(key), TOP_KEYS)}", "mergekit would ignore it.")
    # null means the same as no key, here and in mergekit
    document = replace(document, values={key: value for key, value in document.values.items() if value is not None})
    method = _method(document)
    listed, shared = _sources(document, method)
    base = _base(document, method, listed)
    base_source = next((source for source in listed if source.model == base), None)
    others = tuple(source for source in listed if source is not base_source)
    _check_models(document, method, base, base_source, others)
    tokenizer_from = _tokenizer_from(document, base, others)
    notes = _notes(document, method, others, shared)
    return MergekitRecipe(method, base, others, base_source, shared, _dtype(document), tokenizer_from, notes, document)


def _method(document: Document) -> str:
    if "merge_method" not in document.values:
        raise ConfigError(f"{document.source}: 'merge_method' is missing", remedy=f"give one of: {', '.join(TAKEN)}.")
    method = str(document.values["merge_method"])
    if method not in TAKEN:
        hint, known = closest(method, TAKEN), ", ".join(TAKEN)
        raise refusal(document, ("merge_method",), f"'{method}' is not supported{hint}", f"give one of: {known}.")
    return method


def _base(document: Document, method: str, listed: Sequence[Source]) -> str:
    """Return our base: mergekit's, or the first model for methods that need none."""
    base: Any
    place: KeyPath
    if "base_model" in document.values:
        base, place = document.values["base_model"], ("base_model",)
    elif method in ("linear", "karcher"):
        base, place = listed[0].model, (*listed[0].place, "model")
    else:
        raise ConfigError(f"{document.source}: {method} needs a 'base_model'", remedy="name the model that was tuned.")
    if not isinstance(base, str):
        raise refusal(document, place, f"{base!r} is not a folder or hub id", "for example base_model: ./base.")
    if "+" in base:
        raise refusal(document, place, f"'{base}' is an adapter and cannot be the base", "name the model under it.")
    return base


def _check_models(
    document: Document, method: str, base: str, base_source: Source | None, others: Sequence[Source]
) -> None:
    """Check that there are as many tuned models as the method takes, and adapters on the base alone."""
    if not others:
        raise ConfigError(f"{document.source}: there is no model other than the base", remedy="list the tuned models.")
    if "slices" in document.values and base_source is None:
        raise refusal(
            document,
            ("base_model",),
            "it is not among the sources of the slice, so mergekit would merge without it",
            "add it to the sources, or list 'models' instead.",
        )
    least, most = (1, None) if method in SEVERAL_BY_ANOTHER else find_method(method).num_tuned
    if len(others) < least or (most is not None and len(others) > most):
        takes = f"{least}" if least == most else f"at least {least}"
        raise refusal(
            document,
            others[-1].place[:-1],
            f"{method} takes {takes} in addition to the base '{base}', but {len(others)} "
            f"{'is' if len(others) == 1 else 'are'} listed",
            "list that number.",
        )
    for source in others:
        if source.model.count("+") > 1:
            raise refusal(document, (*source.place, "model"), "more than one '+'", "for example BASE+LORA.")
        if source.adapter is not None and source.model.partition("+")[0] != base:
            raise refusal(
                document,
                (*source.place, "model"),
                f"an adapter must be on the base, which is '{base}'",
                "or merge it into its own base first.",
            )


def _sources(document: Document, method: str) -> tuple[list[Source], tuple[Scope, ...]]:
    """Return the listed models and the merge's own parameters, with those of a single slice before the file's."""
    values = document.values
    shared = [_parameters(document, ("parameters",), values.get("parameters"), method)]
    if ("models" in values) == ("slices" in values):
        raise ConfigError(f"{document.source}: give either 'models' or 'slices'", remedy="list the models to merge.")
    at: KeyPath = ("models",)
    listed = values.get("models")
    if "slices" in values:
        slices = values["slices"]
        if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], dict):
            raise refusal(document, ("slices",), "only one slice is supported", "list 'models' instead.")
        for key in ("base_model", "residual_weight"):
            if key in slices[0]:
                raise refusal(document, ("slices", 0, key), "a slice cannot have its own here", "remove it.")
        _check_keys(document, ("slices", 0), slices[0], ("sources", "parameters"))
        at, listed = ("slices", 0, "sources"), slices[0].get("sources")
        shared.insert(0, _parameters(document, ("slices", 0, "parameters"), slices[0].get("parameters"), method))
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise refusal(document, at, "it is not a list of models", "for example - model: ./tuned.")
    found = []
    for number, entry in enumerate(listed):
        place = (*at, number)
        _check_keys(document, place, entry, ("model", "parameters", "layer_range"))
        if not isinstance(entry.get("model"), str):
            raise refusal(
                document, place, "'model' is missing or is not a folder or hub id", "for example model: ./tuned."
            )
        if "layer_range" in entry:
            _check_whole(document, place, entry["model"], entry["layer_range"])
        own = _parameters(document, (*place, "parameters"), entry.get("parameters"), method, is_of_model=True)
        found.append(Source(entry["model"], own, place))
    names = [source.model for source in found]
    for name in names:
        if names.count(name) > 1:
            raise refusal(document, at, f"'{name}' is listed twice", "list each model once.")
    return found, tuple(shared)


def _check_whole(document: Document, place: KeyPath, model: str, layers: Any) -> None:
    """Check that a slice is the whole model: layers cannot be dropped or moved here."""
    config = read_json(locate_model(model.partition("+")[0]) / "config.json")
    if layers != [0, config.get("num_hidden_layers")]:
        raise refusal(
            document,
            (*place, "layer_range"),
            f"{layers} is not the whole of {model}, which has {config.get('num_hidden_layers')} layers",
            "merge whole models: layers cannot be dropped or moved here.",
        )


def _parameters(document: Document, at: KeyPath, given: Any, method: str, *, is_of_model: bool = False) -> Scope:
    if given is None:
        return Scope({}, at)
    if not isinstance(given, dict):
        raise refusal(document, at, "it is not a mapping of parameters", "for example {weight: 0.5}.")
    values = {name: _with_numbers(value) for name, value in given.items()}
    for name, value in values.items():
        place = (*at, name)
        if name not in TAKEN[method]:
            takes = ", ".join(TAKEN[method]) or "none"
            raise refusal(
                document, place, f"{method} has no such key{closest(str(name), TAKEN[method])}", f"it takes {takes}."
            )
        if is_of_model and name not in PER_MODEL:
            raise refusal(
                document,
                place,
                "all models share it; mergekit would ignore it here",
                "move it to the 'parameters' of the file.",
            )
        _check_value(document, place, name, value, method)
    return Scope(values, at)


def _check_value(document: Document, place: KeyPath, name: str, value: Any, method: str) -> None:
    if name in FIXED and value != FIXED[name]:
        raise refusal(document, place, f"{value} is not supported", f"give {FIXED[name]}, mergekit's default.")
    if name == "rescale" and value is not (method in RESCALED):
        raise refusal(document, place, f"{value} is not supported", f"give {method in RESCALED}, the default.")
    if name not in SWITCHES:
        _check_setting(document, place, value)
    elif not isinstance(value, bool):
        raise refusal(document, place, "expected true or false", "all tensors share it.")


def _with_numbers(value: Any) -> Any:
    """Convert words to numbers as mergekit does: YAML 1.1 reads 1e-5 as a word."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    if isinstance(value, Mapping) and "value" in value:
        return {**value, "value": _with_numbers(value["value"])}
    return value


def conditions_of(value: Any) -> list[Mapping[str, Any]] | None:
    """Return the values with filters that a parameter consists of; `None` for a number or a gradient."""
    if isinstance(value, Mapping):
        return [value]
    is_list = isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in value)
    return list(value) if is_list else None


def _check_setting(document: Document, place: KeyPath, value: Any) -> None:
    conditions = conditions_of(value)
    if conditions is None:
        _check_plain(document, place, value)
        return
    for number, condition in enumerate(conditions):
        row = place if isinstance(value, Mapping) else (*place, number)
        _check_keys(document, row, condition, ("filter", "value"))
        if "value" not in condition:
            raise refusal(document, row, "a condition has no 'value'", "for example {filter: mlp, value: 0.5}.")
        if not isinstance(condition.get("filter"), str | None):
            raise refusal(document, (*row, "filter"), "it is not a part of a tensor's name", "for example filter: mlp.")
        _check_plain(document, (*row, "value"), condition["value"])


def _check_plain(document: Document, place: KeyPath, value: Any) -> None:
    """Check that a value is a number or a gradient of numbers."""
    if isinstance(value, list):
        if not value or not all(_is_number(item) for item in value):
            raise refusal(document, place, f"{value} is not a gradient", "a gradient is a list of numbers.")
    elif not _is_number(value):
        raise refusal(document, place, f"{value!r} is not a number", "for example 0.5.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _tokenizer_from(document: Document, base: str, others: Sequence[Source]) -> Side:
    """Return the side that the tokenizer comes from: the base if the file does not say, as in mergekit."""
    source = document.values.get("tokenizer_source", "base")
    of_tuned = [others[0].model] if others else []
    if source not in ("base", base, *of_tuned):
        raise refusal(
            document,
            ("tokenizer_source",),
            f"'{source}' is not supported",
            "the tokenizer is the base's or that of the first tuned model: name one of the two.",
        )
    template = document.values.get("chat_template", "auto")
    if template != "auto":
        raise refusal(document, ("chat_template",), "another template is not supported", "give auto.")
    return "base" if source in ("base", base) else "tuned"


def _dtype(document: Document) -> str | None:
    """Return the result's dtype: mergekit's `out_dtype`, or else the dtype that it computes in."""
    return _dtype_named(document, "out_dtype") or _dtype_named(document, "dtype")


def _dtype_named(document: Document, key: str) -> str | None:
    if key not in document.values:
        return None
    name = str(document.values[key]).removeprefix("torch.")
    if name not in MERGED_DTYPES:
        known = ", ".join(MERGED_DTYPES)
        raise refusal(document, (key,), f"'{name}' is unknown{closest(name, MERGED_DTYPES)}", f"known: {known}.")
    return MERGED_DTYPES[name]


def _notes(document: Document, method: str, others: Sequence[Source], shared: Sequence[Scope]) -> tuple[str, ...]:
    notes = []
    if _dtype_named(document, "dtype") in ("BF16", "F16"):
        notes.append("arithmetic is always in float32 here, not in 'dtype'; results may differ in the last bit")
    if method in RESCALED:
        notes.append("kept elements are rescaled by their probability, as in the paper, and masks depend on --seed")
    if method == "anchored":
        notes.append("anchored is a method of backmerge: mergekit does not read this file")
    if method == "dare_linear" and len(others) > 1:
        notes.append("dare_linear of several models is computed as della_linear with epsilon 0, which is the same sum")
    if "base_model" not in document.values:
        notes.append("config and tokenizer are those of the first model; mergekit takes any")
    if document.values.get("chat_template") == "auto":
        notes.append("the chat template is the base's here; mergekit's 'auto' takes the one that most models have")
    if any(scope.values.get("int8_mask") for scope in shared):
        notes.append("int8_mask has no effect here")
    return tuple(notes)


def scopes_of(recipe: MergekitRecipe) -> Iterator[Scope]:
    """Yield all places of a file that contain parameters."""
    yield from recipe.parameters
    for source in (recipe.base_source, *recipe.sources):
        if source is not None:
            yield source.parameters


def _check_keys(document: Document, at: KeyPath, given: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in given:
        if key not in known:
            raise refusal(document, (*at, key), f"unknown key{closest(str(key), known)}", f"known: {', '.join(known)}.")


def refusal(document: Document, at: KeyPath, what: str, remedy: str) -> ConfigError:
    """Return the error that names a key, its line and what to do."""
    line = next((document.lines[at[:end]] for end in range(len(at), 0, -1) if at[:end] in document.lines), None)
    where = f", line {line}" if line else ""
    return ConfigError(f"{document.source}{where}: '{'.'.join(map(str, at))}': {what}", remedy=remedy)
