"""Write a PEFT adapter with numpy alone: names and settings as peft expects them, and scales inside the factors."""

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

# fields about an adapter's base and purpose, which a merge does not change
KEPT = {"base_model_name_or_path", "revision", "task_type", "auto_mapping"}


class Module(NamedTuple):
    """A module with factors.

    Attributes:
        inputs: Columns of A; for an embedding, its tokens.
        outputs: Rows of B.
        is_embedding: Whether it is an embedding.
    """

    inputs: int
    outputs: int
    is_embedding: bool = False


class Names:
    """The names that peft uses for an adapter's changes.

    Peft matches its lists with the ends of names, and wraps every match: the lists here match exactly the intended
    modules, with short names if possible.

    Args:
        tensors: The names of all tensors of the base.
        adapted: Modules with factors.
        whole: Tensors that are saved whole, such as norms.

    Attributes:
        saved: Tensors that the adapter saves whole, by their names in the base, with their names in the adapter. They
            include the other tensors of the same modules, since peft loads a module whole.
        targets: `target_modules`.
        modules_to_save: `modules_to_save`.
        bias: Which biases are trained, in peft's terms.
        obstacle: Why peft cannot load this, if it cannot.
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
            obstacles.append("no tensor has low-rank factors, but peft requires a module to adapt")
        for module in sorted(replaced & {above for name in modules for above in _upwards(name)[1:]}):
            obstacles.append(f"tensors of '{module}' itself are trained whole, but peft would wrap all modules in it")
        saved = _exact_list(replaced, lambda ends: {m for m in modules if m.endswith(tuple(ends))})
        targets = _exact_list(adapted, lambda ends: {m for m in modules if not ends.isdisjoint(_ends(m))})
        for meant, ends in ((replaced, saved), (adapted, targets)):
            if ends is None:
                obstacles.append(f"peft finds modules by the ends of names, and none match only {sorted(meant)[:3]}")
        self.modules_to_save, self.targets = saved or [], targets or []
        self.obstacle = next(iter(obstacles), None)

    def _place(self, held: Mapping[str, Set[str]], adapted: Set[str], whole: Set[str]) -> tuple[set[str], list[str]]:
        """Name each whole tensor; return the modules that are saved, and the obstacles."""
        replaced: set[str] = set()
        obstacles = []
        for tensor in sorted(whole):
            module, _, leaf = tensor.rpartition(".")
            is_lone_bias = leaf == "bias" and f"{module}.weight" not in whole
            if module in adapted and leaf == "bias":
                self.saved[tensor] = f"{PREFIX}{module}{TRAINED_BIAS}"
                self.bias = "lora_only" if self.bias == "none" else self.bias
            elif module in adapted:
                obstacles.append(f"'{tensor}' is trained whole, but its module also has low-rank factors")
            elif is_lone_bias:
                self.saved[tensor] = PREFIX + tensor
                self.bias = "all"
            else:
                replaced.add(module)
                self.saved |= {name: PREFIX + name for name in sorted(held[module])}
        return replaced, obstacles


def _upwards(module: str) -> list[str]:
    """Return a module's name and those of all modules that contain it."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def _ends(module: str) -> list[str]:
    """Return a module's name and every part of it after a dot."""
    parts = module.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


def _exact_list(meant: Set[str], matched: Callable[[Set[str]], Set[str]]) -> list[str] | None:
    """Return the shortest names that match only what is meant: last parts or whole names; `None` if neither does."""
    for ends in ({module.rpartition(".")[2] for module in meant}, set(meant)):
        if not ends or matched(ends) == meant:
            return sorted(ends)
    return None


class AdapterForm(NamedTuple):
    """The contents of an adapter's two files, without values.

    Attributes:
        modules: Modules with factors, by name.
        names: Names of everything that it changes.
        rank: Rank of all factors.
        dtype: Dtype of all tensors, as safetensors names it: "F32", "BF16" or "F16".
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
        """Return `adapter_config.json`: alpha is the rank, so that B·A is the change itself for every reader."""
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
        """Return the names of A and B in the file."""
        if self.modules[module].is_embedding:
            return f"{PREFIX}{module}.lora_embedding_A", f"{PREFIX}{module}.lora_embedding_B"
        return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"

    def infos(self, base: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """Return the tensors of the file, each with its shape.

        Args:
            base: The base's tensors; whole tensors have their shapes.
        """
        shapes = {saved: base[name].shape for name, saved in self.names.saved.items()}
        for module, (inputs, outputs, _) in self.modules.items():
            a, b = self.factor_names(module)
            shapes |= {a: (self.rank, inputs), b: (outputs, self.rank)}
        return {name: TensorInfo(shapes[name], self.dtype, Path(TENSORS)) for name in sorted(shapes)}


class AdapterWriter:
    """An adapter's two files in a folder that nobody reads yet; a context manager.

    Args:
        directory: An empty folder.
        form: The contents of the files.
        base: The base's tensors.

    Raises:
        OSError: the disk is full or cannot be written to.
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
        """Write elements of a tensor.

        Args:
            name: The tensor's name in the file.
            values: The result of `encoded`; in order from the element `start` on.
            start: Position of the first element.
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
    """Round numbers to the nearest value of a dtype, ties to even, in the order of their elements.

    Args:
        values: Float32 or float64.
        dtype: "F32", "BF16" or "F16".
        what: A name for the values, for the message.

    Raises:
        MergeError: one is NaN or outside the dtype's range.
    """
    result: np.ndarray
    with np.errstate(over="ignore", invalid="ignore"):
        values = np.ascontiguousarray(values, dtype="<f4")
        # one sum instead of a check of each element; if finite numbers overflow in it, each is checked
        is_finite = bool(np.isfinite(values.sum()) or np.isfinite(values).all())
        if dtype == "BF16":  # the upper half of a float32, rounded by the part that is cut off
            bits = values.view("<u4")
            result = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype("<u2")
            is_finite = is_finite and bool(((result & 0x7F80) != 0x7F80).all())
        else:
            result = values.astype(NUMPY_NAMES[dtype], copy=False)
            is_finite = is_finite and (dtype == "F32" or bool(np.isfinite(result).all()))
    if not is_finite:
        raise MergeError(
            f"{what} holds NaN or values beyond the range of {dtype}",
            remedy="the training diverged, or the change is too large for this dtype: give --dtype float32.",
        )
    return result
