"""A recipe: which models are merged, how, and at which λ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.companions import Companions, Side, companions_of
from backmerge.checkpoints.reader import Weights
from backmerge.merging.inputs import InputStatistics
from backmerge.merging.method import Method
from backmerge.merging.methods.linear import linear

Rounding = Literal["nearest", "stochastic"]
Form = Literal["adapter", "checkpoint"]


@dataclass(frozen=True)
class Variant:
    """A point in weight space: the base itself, or base and tuned models merged.

    Attributes:
        base: The base's weights.
        tuned: The tuned model's weights, a checkpoint or an adapter on the base; a sequence for methods that take
            several; `None` for the base itself.
        method: How they are merged.
        lam: λ, the share of the tuned side: a number, or a setting that differs from tensor to tensor (see `schedule`).
            Ignored if the method has none.
        parameters: The method's other parameters, each a setting; for a parameter with a value for each tuned model
            (such as `weight`), it may also be a list with one setting for each.
        seed: Seed of the random numbers, if the method or the rounding draws any.
        extra: Other models that the method needs, by the names that it gives them, such as `unaligned`.
        inputs: Statistics of the inputs of layers, by the names that the method gives them, such as `guard_inputs`.
        dtype: Dtype of the merged tensors, as safetensors names it ("F32", "BF16", "F16"); `None` for the base's own.
            For a merge that is served as an adapter, the dtype of its tensors; `None` for float32, or the adapter's own
            at λ=1.
        rounding: To the nearest value of the dtype, or to one of the two next to it, unbiased.
        served_as: What a user loads: a checkpoint, with weights rounded to its dtype, or an adapter on the base, with a
            change that is never rounded to the base's dtype. See `merging.served`.
        config_from: The side that the merged model's configuration comes from, if it has one.
        tokenizer_from: The side that its tokenizer, chat templates and processors come from, if it has them.
    """

    base: Weights
    tuned: Weights | Sequence[Weights] | None = None
    method: Method = linear
    lam: Any = 1.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    extra: Mapping[str, Weights] = field(default_factory=dict)
    inputs: Mapping[str, InputStatistics] = field(default_factory=dict)
    dtype: str | None = None
    rounding: Rounding = "nearest"
    served_as: Form = "checkpoint"
    config_from: Side = "tuned"
    tokenizer_from: Side = "tuned"

    @property
    def tuned_models(self) -> tuple[Weights, ...]:
        """The tuned models; empty for the base itself."""
        if self.tuned is None:
            return ()
        return tuple(self.tuned) if isinstance(self.tuned, Sequence) else (self.tuned,)

    @property
    def companions(self) -> Companions:
        """The files next to the weights that the model is used with; with several tuned models, the first one's."""
        tuned = self.tuned_models[0] if self.tuned_models else None
        return companions_of(
            self.base.directory,
            None if tuned is None else tuned.directory,
            stored=self.base.companions,
            is_adapter=isinstance(tuned, AdapterOnBase),
            config_from=self.config_from,
            tokenizer_from=self.tokenizer_from,
        )

    @property
    def identity(self) -> dict[str, Any]:
        """Return the data that determine the model: equal identities are equal models."""
        return self.weights_identity | self.files_identity

    @property
    def files_identity(self) -> dict[str, Any]:
        """Return the data that determine the files next to the weights, if they differ from the base's."""
        if not self.tuned_models:
            return {}
        files = self.companions.digest
        return {} if files == replace(self, tuned=None).companions.digest else {"files": files}

    @property
    def weights_identity(self) -> dict[str, Any]:
        """Return the data that determine the weights."""
        common: dict[str, Any] = {"base": self.base.fingerprint}
        if self.dtype is not None:
            common["dtype"] = self.dtype
        if self.rounding != "nearest":
            common["rounding"] = self.rounding
        if self.served_as != "checkpoint":
            common["served_as"] = self.served_as
        if self.tuned is None:
            return common
        prints = [weights.fingerprint for weights in self.tuned_models]
        if self.extra:
            common["extra"] = {name: weights.fingerprint for name, weights in self.extra.items()}
        if self.inputs:
            common["inputs"] = {name: statistics.fingerprint for name, statistics in self.inputs.items()}
        # parameters by name: their order does not matter
        order = order_of([self.lam, *(value for _, value in sorted(self.parameters.items()))])
        return common | {
            "tuned": prints[0] if len(prints) == 1 else prints,
            "method": self.method.name,
            "lam": self.lam,
            "parameters": dict(self.parameters),
            "seed": self.seed,
            **({"order": order} if order else {}),
            **({"code": self.method.code} if self.method.code else {}),
        }

    def at(self, lam: Any) -> Variant:
        """Return the same recipe at another λ."""
        return replace(self, lam=lam)


def order_of(setting: Any) -> list[Any]:
    """Return the order of the rows of a setting's tables if there is more than one row; empty for all else.

    The first pattern that matches a tensor decides, while hashes of mappings ignore order: two tables with the same
    rows in different order are two models.
    """
    if isinstance(setting, Mapping):
        rows = [[str(name), order_of(inner)] for name, inner in setting.items()]
        return rows if len(rows) > 1 or any(inner for _, inner in rows) else []
    if isinstance(setting, Sequence) and not isinstance(setting, str):
        found = [order_of(one) for one in setting]
        return found if any(found) else []
    return []


def lam_name(lam: float) -> str:
    """Return λ as part of a name: short, and never the same for two values."""
    return f"{lam:g}" if float(f"{lam:g}") == lam else repr(lam)
