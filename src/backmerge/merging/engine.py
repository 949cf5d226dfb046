"""Carry out a recipe tensor by tensor: one iterator, whose sinks are a directory and a model in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from backmerge import __version__
from backmerge.checkpoints.compare import check_same_shape
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.checkpoints.writer import copy_companions, write_weights
from backmerge.errors import CheckpointError, MergeError
from backmerge.merging.method import Method, check_parameters, find_method
from backmerge.merging.randomness import TensorRandom
from backmerge.merging.recipe import Variant
from backmerge.runs import whole_directory

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def merged_tensors(variant: Variant, *, allow_plugins: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the merged model, by the base's names and order, in the base's dtypes.

    Arithmetic is in float32 and is rounded once. Random numbers are a function of the recipe's seed, the tensor's
    name and the position in it, so that neither shard order nor threads change the result.

    Raises:
        MergeError: the two do not fit, a parameter is wrong, or a tensor is not finite or of a dtype that has no mean.
    """
    base, tuned = variant.base, variant.tuned
    if tuned is None:
        for name in base.infos:
            yield name, base.tensor(name)
        return
    check_same_shape(base, tuned)
    if "lam" in variant.parameters:
        raise MergeError("'lam' is among the method's other parameters", remedy="give λ by itself.")
    if not 0 <= variant.lam <= 1:
        raise MergeError(f"λ is {variant.lam}: it is the share of the tuned side", remedy="give λ from 0 to 1.")
    method = find_method(variant.method, allow_plugins=allow_plugins)
    parameters = {**variant.parameters, "lam": variant.lam}
    check_parameters(method, variant.method, parameters)
    for name in base.infos:
        yield name, _merged(method, base, tuned, name, parameters, variant.seed)


def _merged(
    method: Method, base: Checkpoint, tuned: Weights, name: str, parameters: dict[str, float], seed: int
) -> Tensor:
    ours, theirs = base.tensor(name), tuned.tensor(name)
    dtype = DTYPES.get(base.infos[name].dtype)
    if dtype is None:
        if torch.equal(ours, theirs):
            return ours
        raise MergeError(
            f"tensor '{name}' has dtype {base.infos[name].dtype}, and differs between {base.directory} and "
            f"{tuned.directory}: whole numbers have no mean",
            remedy="give unquantised checkpoints.",
        )
    for side, tensor, weights in (("base", ours, base), ("tuned model", theirs, tuned)):
        if not torch.isfinite(tensor).all():
            raise MergeError(
                f"tensor '{name}' of the {side} {weights.directory} holds NaN or infinity",
                remedy="the training diverged or the file is damaged; this model cannot be used.",
            )
    rng = TensorRandom(seed, name)
    # a float64 checkpoint keeps its own precision: in float32 its endpoints would not be exact
    precision = torch.promote_types(dtype, torch.float32)
    merged = method(ours.to(precision), theirs.to(precision), rng, **parameters)
    if merged.shape != ours.shape:
        raise MergeError(
            f"the merge method gave tensor '{name}' the shape {tuple(merged.shape)} instead of {tuple(ours.shape)}",
            remedy="a method's result has the shape of its base.",
        )
    rounded = merged.to(dtype)
    if not torch.isfinite(rounded).all():
        raise MergeError(
            f"the merge of tensor '{name}' holds NaN or values beyond {base.infos[name].dtype}",
            remedy="the two models are too far apart for this dtype: convert the base to float32 or bfloat16.",
        )
    return rounded


def write_merged(variant: Variant, directory: Path, *, allow_plugins: bool = False) -> None:
    """Write the merged model as a Hugging Face directory, whole or not at all.

    Raises:
        MergeError: see `merged_tensors`.
        CheckpointError: the disk has not enough room, or cannot be written to.
    """
    base = variant.base
    tensors = merged_tensors(variant, allow_plugins=allow_plugins)
    try:
        with whole_directory(directory) as temporary:
            write_weights(temporary, base.infos, tensors, base.metadata)
            copy_companions(base.directory, temporary)
            card = {"backmerge": __version__, "recipe": variant.identity}
            (temporary / "backmerge.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"cannot write {directory}: {error}", remedy="nothing was left there; free the disk, or give another --out."
        ) from error
