"""What is timed: each case as our command, as mergekit's configurations, and with a check that both are right."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.comparison import SMALL, distance, opened, sample, ulps_apart

if TYPE_CHECKING:
    from torch import Tensor

LAMS = (0.2, 0.4, 0.6, 0.8)
DROP = 0.5
MAX_SHARE_ERROR = 0.02  # chance is far below, over so many elements; rounding to bfloat16 adds up to 0.01
# mergekit takes norms with torch.norm in float32, which loses 0.4 % over 33 million elements, 0.5 % over twice as many
# and nothing to speak of below this size; a cosine, and with it the ratio of Model Stock, is off by twice that
EXACT_NORMS = 2**22
NORM_ERROR = 0.03
NUM_ROWS = 256  # of each adapted matrix that are looked at


class Inputs(NamedTuple):
    """What the cases merge, each a folder."""

    base: Path
    tuned: Sequence[Path]
    adapter: Path


class Outputs(NamedTuple):
    """Where a case's results are, one folder for each λ."""

    ours: Sequence[Path]
    theirs: Sequence[Path]


class Case(NamedTuple):
    """A merge to time.

    Attributes:
        name: As on the command line.
        lams: One output for each; mergekit is run once for each.
        num_tuned: How many tuned models it reads; 0 where the adapter is merged.
        arguments: Of `backmerge merge`, without models, λ and place.
        configuration: mergekit's, from the inputs and λ.
        check: Raises AssertionError where the two tools' results are not the merge that they should be.
        cpu_ratio: How many times less CPU time than mergekit is the aim, if there is one.
        wall_ratio: The same for wall time.
        floor_ratio: The wall time without the imports, over the floor's: the aim.
        reads_once: Whether the aim is to read each input once.
    """

    name: str
    lams: Sequence[float]
    num_tuned: int
    arguments: Sequence[str]
    configuration: Callable[[Inputs, float], dict[str, Any]]
    check: Callable[[Inputs, Outputs, Sequence[float]], None]
    cpu_ratio: float | None = None
    wall_ratio: float | None = None
    floor_ratio: float | None = None
    reads_once: bool = False

    def read(self, inputs: Inputs) -> list[Path]:
        """The folders that a merge reads: of an adapter made from an adapter, that alone."""
        return [inputs.base, *inputs.tuned[: self.num_tuned]] if self.num_tuned else [inputs.adapter]

    def command(self, inputs: Inputs, out: Path) -> list[str]:
        """The arguments of our program."""
        tuned = inputs.tuned[: self.num_tuned] if self.num_tuned else [inputs.adapter]
        lam = [] if self.name == "model_stock" else ["--lam", ",".join(map(str, self.lams))]
        return ["merge", str(inputs.base), *map(str, tuned), *self.arguments, *lam, "--out", str(out)]

    def our_outputs(self, out: Path) -> list[Path]:
        """The folders that our program makes."""
        return [out / f"lam-{lam:g}" for lam in self.lams] if len(self.lams) > 1 else [out]


def _linear(inputs: Inputs, lam: float) -> dict[str, Any]:
    return _of_two(inputs, str(inputs.tuned[0]), lam)


def _lora(inputs: Inputs, lam: float) -> dict[str, Any]:
    return _of_two(inputs, f"{inputs.base}+{inputs.adapter}", lam)


def _of_two(inputs: Inputs, tuned: str, lam: float) -> dict[str, Any]:
    models = [_weighted(str(inputs.base), weight=1 - lam), _weighted(tuned, weight=lam)]
    # base_model decides nothing but whose configuration and tokenizer are copied
    return {"merge_method": "linear", "base_model": str(inputs.base), "models": models, "dtype": "bfloat16"}


def _slerp(inputs: Inputs, lam: float) -> dict[str, Any]:
    return {
        "merge_method": "slerp",
        "base_model": str(inputs.base),
        "models": [{"model": str(inputs.base)}, {"model": str(inputs.tuned[0])}],
        "parameters": {"t": lam},
        "dtype": "bfloat16",
    }


def _dare_linear(inputs: Inputs, lam: float) -> dict[str, Any]:
    return {
        "merge_method": "dare_linear",
        "base_model": str(inputs.base),
        "models": [_weighted(str(inputs.tuned[0]), weight=lam, density=1 - DROP)],
        "dtype": "bfloat16",
    }


def _model_stock(inputs: Inputs, lam: float) -> dict[str, Any]:  # noqa: ARG001 - has no λ
    return {
        "merge_method": "model_stock",
        "base_model": str(inputs.base),
        "models": [{"model": str(directory)} for directory in inputs.tuned[:3]],
        # it computes in its working dtype, and in bfloat16 is wrong by many ulps
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def _weighted(model: str, **parameters: float) -> dict[str, Any]:
    return {"model": model, "parameters": parameters}


def same_within_an_ulp(inputs: Inputs, outputs: Outputs, lams: Sequence[float]) -> None:  # noqa: ARG001 - a check's form
    """Both tools wrote the same tensors, at most one value of bfloat16 apart where |x| > 1e-4."""
    for ours, theirs in zip(outputs.ours, outputs.theirs, strict=True):
        found = distance(ours, theirs)
        assert found.only_ours == found.only_theirs == (), f"not the same tensors: {found}"
        assert found.num_tensors, f"{ours} holds no tensors"
        assert found.ulps <= 1, f"{ours} and {theirs} are {found.ulps} ulps apart in {found.where}"


def same_but_for_norms(inputs: Inputs, outputs: Outputs, lams: Sequence[float]) -> None:  # noqa: ARG001 - a check's form
    """As `same_within_an_ulp`, but for what mergekit's norms of large tensors miss: a small share of the change."""
    for ours, theirs in zip(outputs.ours, outputs.theirs, strict=True):
        with ExitStack() as stack:
            base, mine, other = (opened(directory, stack) for directory in (inputs.base, ours, theirs))
            assert set(base) == set(mine) == set(other), f"{ours}, {theirs} and the base have not the same tensors"
            for name in base:
                start, x, y = (sample(files[name], name) for files in (base, mine, other))
                apart, x = ulps_apart(x, y), x.float()
                is_large = math.prod(base[name].get_slice(name).get_shape()) > EXACT_NORMS
                excess = (x - y.float()).abs() - NORM_ERROR * is_large * (x - start.float()).abs()
                wrong = (apart > 1) & (x.abs() > SMALL) & (excess > x.abs() * 2**-8)  # at most an ulp, at least half
                assert not wrong.any(), f"{ours} and {theirs} differ in {name} by up to {int(apart[wrong].max())} ulps"


def moved_by_lam(inputs: Inputs, outputs: Outputs, lams: Sequence[float]) -> None:
    """Both wrote the base's tensors, moved by λ of the delta on average: masks are random and differ."""
    for side in outputs:
        for directory, lam in zip(side, lams, strict=True):
            with ExitStack() as stack:
                base, tuned, merged = (opened(d, stack) for d in (inputs.base, inputs.tuned[0], directory))
                assert set(merged) == set(base), f"{directory} has other tensors than the base"
                along = square = 0.0
                for name in base:
                    start = sample(base[name], name).double()
                    delta = sample(tuned[name], name).double() - start
                    along += float(((sample(merged[name], name).double() - start) * delta).sum())
                    square += float((delta * delta).sum())
            assert abs(along / square - lam) < MAX_SHARE_ERROR, f"{directory} moved by {along / square}, not {lam}"


def adapter_scaled_by_lam(inputs: Inputs, outputs: Outputs, lams: Sequence[float]) -> None:
    """Our adapter's delta is λ times the given one's; mergekit's checkpoint has moved by as much on average."""
    for ours, theirs, lam in zip(outputs.ours, outputs.theirs, lams, strict=True):
        with ExitStack() as stack:
            base, merged = opened(inputs.base, stack), opened(theirs, stack)
            given, scaled = (Factors(directory, stack) for directory in (inputs.adapter, ours))
            assert set(given.modules) == set(scaled.modules), f"{ours} adapts other modules than {inputs.adapter}"
            assert set(base) == set(merged), f"{theirs} has other tensors than the base"
            along = square = 0.0
            for module in given.modules:
                delta, name = given.delta(module), f"{module}.weight"
                off = float((scaled.delta(module) - lam * delta).norm() / (lam * delta.norm()))
                assert off < MAX_SHARE_ERROR, f"{ours}: the delta of {module} is off by {off} of its norm"
                start = base[name].get_slice(name)[:NUM_ROWS].double()
                along += float(((merged[name].get_slice(name)[:NUM_ROWS].double() - start) * delta).sum())
                square += float((delta * delta).sum())
        assert abs(along / square - lam) < MAX_SHARE_ERROR, f"{theirs} moved by {along / square}, not {lam}"


class Factors:
    """The factors of an adapter's modules.

    Args:
        directory: The adapter.
        stack: Closes its file.
    """

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        config = json.loads((directory / "adapter_config.json").read_text())
        assert not config.get("use_rslora"), f"{directory}: a scale of its own kind"
        self.scale = config["lora_alpha"] / config["r"]
        self.files = opened(directory, stack)
        ends = [name for name in self.files if name.endswith(".lora_A.weight")]
        self.modules = [name.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for name in ends]

    def delta(self, module: str) -> Tensor:
        """The first rows of scale · B · A, in float64."""
        b, a = (f"base_model.model.{module}.lora_{side}.weight" for side in "BA")
        rows = self.files[b].get_slice(b)[:NUM_ROWS].double()
        found: Tensor = self.scale * (rows @ self.files[a].get_tensor(a).double())
        return found


CASES = (
    Case(
        "linear",
        (0.6,),
        1,
        ["--method", "linear"],
        _linear,
        same_within_an_ulp,
        cpu_ratio=5,
        wall_ratio=5,
        floor_ratio=2,
    ),
    Case("slerp", (0.6,), 1, ["--method", "slerp"], _slerp, same_within_an_ulp, cpu_ratio=5),
    Case("dare_linear", (0.6,), 1, ["--method", "dare_linear"], _dare_linear, moved_by_lam, cpu_ratio=5),
    Case("model_stock", (1.0,), 3, ["--method", "model_stock"], _model_stock, same_but_for_norms, cpu_ratio=4),
    Case("sweep", LAMS, 1, ["--method", "linear"], _linear, same_within_an_ulp, cpu_ratio=6, reads_once=True),
    # without the proof against peft, which loads the base in float32, and which mergekit does not give
    Case("lora", LAMS, 0, ["--as", "adapter", "--no-verify"], _lora, adapter_scaled_by_lam, wall_ratio=100),
)
