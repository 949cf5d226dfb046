"""Write a PEFT adapter in numpy alone: names and settings as peft expects them, every scale already in the factors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from backmerge.checkpoints.adapter import PREFIX, TENSORS, TRAINED_BIAS
from backmerge.checkpoints.adapter_config import CONFIG, AdapterConfig
from backmerge.checkpoints.files import NUMPY_NAMES, TensorInfo, header_bytes
from backmerge.errors import MergeError

# what an adapter says of its base and its purpose, which a merge leaves as it is
KEPT = {"base_model_name_or_path", "revision", "task_type", "auto_mapping"}


class Module(NamedTuple):
    """A module with factors.

    Attributes:
        inputs: Columns of A; of an embedding, its tokens.
        outputs: Rows of B.
        is_embedding: Whether it is one.
    """

    inputs: int
    outputs: int
    is_embedding: bool = False


class Names:
    """How peft calls what an adapter changes.

    Peft takes its lists by the ends of names, and wraps whatever matches: the lists here match the modules that are
    meant and no others, in short where that is possible.

    Args:
        tensors: The names of all tensors of the base.
        adapted: Modules with factors.
        whole: Tensors that are given whole, such as norms.

    Attributes:
        saved: The tensors that the adapter holds whole, by the name in the base: its name in the adapter. Next to those
            that were asked for, their modules' others, since peft loads a module whole.
        targets: `target_modules`.
        modules_to_save: `modules_to_save`.
        bias: Which biases are trained, in peft's words.
        obstacle: Why peft would not load this, if it would not.
    """

    def __init__(self, tensors: Iterable[str], adapted: Set[str], whole: Set[str]) -> None:
        held: dict[str, set[str]] = {}  # module -> its own tensors
        for tensor in tensors:
            held.setdefault(tensor.rpartition(".")[0], set()).add(tensor)
        modules = {module for name in held for module in _upwards(name)}
        self.saved: dict[str, str] = {}
        self.bias = "none"
        replaced, obstacles = self._place(held, adapted, whole)
        if not adapted:
            obstacles.append("no tensor has low-rank factors, and peft asks for a module to adapt")
        for module in sorted(replaced & {above for name in modules for above in _upwards(name)[1:]}):
            obstacles.append(f"tensors of '{module}' itself are trained whole, and peft would wrap all modules in it")
        saved = _exact_list(replaced, lambda ends: {m for m in modules if m.endswith(tuple(ends))})
        targets = _exact_list(adapted, lambda ends: {m for m in modules if not ends.isdisjoint(_ends(m))})
        for meant, ends in ((replaced, saved), (adapted, targets)):
            if ends is None:
                obstacles.append(f"peft takes modules by the ends of names, and none mean just {sorted(meant)[:3]}")
        self.modules_to_save, self.targets = saved or [], targets or []
        self.obstacle = next(iter(obstacles), None)

    def _place(self, held: Mapping[str, Set[str]], adapted: Set[str], whole: Set[str]) -> tuple[set[str], list[str]]:
        """Name each whole tensor; gives the modules that are saved, and what is in the way."""
        replaced: set[str] = set()
        obstacles = []
        for tensor in sorted(whole):
            module, _, leaf = tensor.rpartition(".")
            is_lone_bias = leaf == "bias" and f"{module}.weight" not in whole
            if module in adapted and leaf == "bias":
                self.saved[tensor] = f"{PREFIX}{module}{TRAINED_BIAS}"
                self.bias = "lora_only" if self.bias == "none" else self.bias
            elif module in adapted:
                obstacles.append(f"'{tensor}' is trained whole, and its module has low-rank factors, too")
            elif is_lone_bias:
                self.saved[tensor] = PREFIX + tensor
                self.bias = "all"
            else:
                replaced.add(module)
                self.saved |= {name: PREFIX + name for name in sorted(held[module])}
        return replaced, obstacles


def _upwards(module: str) -> list[str]:
    """A module's name and those of all that it lies in."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _ends(module: str) -> list[str]:
    """A module's name and all that follows a dot in it."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _exact_list(meant: Set[str], matched: Callable[[Set[str]], Set[str]]) -> list[str] | None:
    """The shortest names that match just what is meant: last parts, or whole names; nothing if neither does."""
    for ends in ({module.rpartition(".")[2] for module in meant}, set(meant)):
        if not ends or matched(ends) == meant:
            return sorted(ends)
    return None


class AdapterForm(NamedTuple):
    """What an adapter's two files are to hold, values excepted.

    Attributes:
        modules: With factors, by name.
        names: Of all that it changes.
        rank: Of all factors.
        dtype: Of all tensors, as safetensors names it: "F32", "BF16" or "F16".
        is_transposed: Whether the base's linear layers are stored (in, out).
        source: The configuration of an adapter on the same base.
    """

    modules: Mapping[str, Module]
    names: Names
    rank: int
    dtype: str
    is_transposed: bool
    source: AdapterConfig

    @property
    def config(self) -> dict[str, Any]:
        """`adapter_config.json`: alpha is the rank, so that B·A is the change itself, for every reader."""
        return self.source.model_dump(include=KEPT, exclude_unset=True) | {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.rank,
            "rank_pattern": {},
            "alpha_pattern": {},
            "target_modules": self.names.targets,
            "modules_to_save": self.names.modules_to_save or None,
            "bias": self.names.bias,
            "fan_in_fan_out": self.is_transposed,
            "lora_dropout": 0.0,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
            "inference_mode": True,
        }

    def factor_names(self, module: str) -> tuple[str, str]:
        """What A and B are called in the file."""
        if self.modules[module].is_embedding:
            return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
        return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"

    def infos(self, base: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """The tensors of the file, each with its shape.

        Args:
            base: The base's, whose shapes whole tensors have.
        """
        shapes = {saved: base[name].shape for name, saved in self.names.saved.items()}
        for module, (inputs, outputs, _) in self.modules.items():
            a, b = self.factor_names(module)
            shapes |= {a: (self.rank, inputs), b: (outputs, self.rank)}
        return {name: TensorInfo(shapes[name], self.dtype, Path(TENSORS)) for name in sorted(shapes)}


class AdapterWriter:
    """An adapter's two files in a folder that nobody reads yet; a context.

    Args:
        directory: An empty one.
        form: What they hold.
        base: The base's tensors.

    Raises:
        OSError: the disk is full, or cannot be written to.
    """

    def __init__(self, directory: Path, form: AdapterForm, base: Mapping[str, TensorInfo]) -> None:
        infos = form.infos(base)
        header, self._begins, length = header_bytes(list(infos), infos, {})
        self._dtype = form.dtype
        self._descriptor = os.open(directory / TENSORS, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.truncate(self._descriptor, length)
        self._put(memoryview(header), 0)
        text = json.dumps(form.config, indent=2, sort_keys=True)
        (directory / CONFIG).write_text(text + "\n", encoding="utf-8")

    def write(self, name: str, values: np.ndarray, start: int = 0) -> None:
        """Put elements in their place.

        Args:
            name: Of the tensor in the file.
            values: As `encoded` gives them; in order from the element `start` on.
            start: The first.
        """
        self._put(values.reshape(-1).view(np.uint8).data, self._begins[name] + start * values.itemsize)

    def _put(self, raw: memoryview, offset: int) -> None:
        done = 0
        while done < len(raw):
            done += os.pwrite(self._descriptor, raw[done:], offset + done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def encoded(values: np.ndarray, dtype: str, what: str) -> np.ndarray:
    """Numbers rounded to the nearest of a dtype, ties to even, in the order of their elements.

    Args:
        values: Float32 or float64.
        dtype: "F32", "BF16" or "F16".
        what: They are, for the message.

    Raises:
        MergeError: one is NaN or beyond the dtype's range.
    """
    result: np.ndarray
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.ascontiguousarray(values, dtype="<f4")
        # one sum instead of a look at each; where finite numbers overflow in it, each is looked at
        is_finite = bool(np.isfinite(values.sum()) or np.isfinite(values).all())
        if dtype == "BF16":  # the upper half of a float32, rounded by what is cut off
            bits = values.view("<u4")
            result = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
            is_finite = is_finite and bool(((result & 0x7F80) != 0x7F80).all())
        else:
            result = values.astype(NUMPY_NAMES[dtype], copy=False)
            is_finite = is_finite and (dtype == "F32" or bool(np.isfinite(result).all()))
    if not is_finite:
        raise MergeError(
            f"{what} holds NaN or values beyond {dtype}",
            remedy="the training diverged, or the change is too large for this dtype: give --dtype float32.",
        )
    return result
