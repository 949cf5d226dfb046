"""Verify that a written merge of an adapter is correct: compare its logits with those of transformers and peft.

The reference does not use our arithmetic. transformers loads the base, peft loads the adapter and scales it by λ. If
the written merge is rounded, peft also merges the adapter into the weights, and these are rounded to the same dtype.
For methods other than Linear, and for adapters that peft cannot scale or merge, the reference is the live realisation.
Both sides are computed in float32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.files import torch_dtype
from backmerge.errors import GenerationError, MergeError
from backmerge.generation.loading import PutOn, load_model
from backmerge.merging.live import LiveMerge
from backmerge.merging.methods.linear import linear
from backmerge.merging.recipe import Variant
from backmerge.merging.served import adapter_of, served_dtype, verification_obstacle
from backmerge.progress import say

NUM_ROWS, NUM_TOKENS = 3, 24  # prompts of token ids: no tokenizer is needed, and any ids will do
# Share of the largest logit. Sums in another order differ by about 1e-6; if an element lies between two values of
# bfloat16, the last bit of a float32 sum may decide, and one such element among thousands moves a logit by about 1e-4.
# A wrong scale, a missing module or a mixed-up layer moves them by 1e-2 and more.
TOLERANCE = 2e-3


def verify_written(directory: Path, variant: Variant) -> None:
    """Check that a written merge has the logits of its recipe, computed in another way.

    A model that transformers cannot load, or that does not fit in memory in float32, is reported as not verified.

    Args:
        directory: The written checkpoint or adapter.
        variant: The recipe.

    Raises:
        MergeError: the logits differ by more than the rounding of the output's dtype explains.
    """
    if obstacle := verification_obstacle(variant.base):
        say(obstacle)
        return
    try:
        with torch.inference_mode():
            expected = _expected(variant)
            found = _written(directory, variant)
    except GenerationError as error:
        say(f"Not verified against peft: {error.message}.")
        return
    gap = float((found - expected).abs().max() / expected.abs().max())
    if not gap <= TOLERANCE:
        raise MergeError(
            f"the result is not the merge of {_names(variant)}: its logits differ from those of transformers and "
            f"peft by {gap:.1e} of the largest logit, and rounding explains only {TOLERANCE:.0e}; it was removed",
            remedy="please report this, with the adapter's adapter_config.json; --no-verify writes without this check.",
        )
    say(f"Verified: its logits equal those of transformers and peft, within {max(gap, 1e-7):.0e} of the largest.")


def _names(variant: Variant) -> str:
    return ", ".join(weights.directory.name for weights in (variant.base, *variant.tuned_models))


def _expected(variant: Variant) -> Tensor:
    """Return the logits of a recipe: by peft if possible, else by the live realisation."""
    model = load_model(variant.base.directory, torch.float32).eval()
    if _is_scaled_adapter(variant):
        (adapter,) = variant.tuned_models
        assert isinstance(adapter, AdapterOnBase)
        put_on = PutOn(model, adapter.directory)
        if variant.served_as == "adapter" or served_dtype(variant) == "float32":
            return _logits(put_on.scaled(float(variant.lam)))
        if not adapter.config.ensure_weight_tying:  # peft adds the change to the one tensor once for each name
            folded = put_on.folded_in(float(variant.lam))
            _round(folded, variant)
            return _logits(folded)
        model = load_model(variant.base.directory, torch.float32).eval()
    live = LiveMerge(model, variant.base)
    if not live.is_possible():
        raise GenerationError("transformers renames this model's tensors when it loads them")
    if variant.served_as == "checkpoint":
        live.set(variant)
    else:
        with tempfile.TemporaryDirectory(prefix="backmerge-") as scratch:
            written = adapter_of(variant, Path(scratch))
            live.set(Variant(variant.base, written, dtype="F32"))
    return _logits(model)


def _is_scaled_adapter(variant: Variant) -> bool:
    tuned = variant.tuned_models
    return (
        variant.method == linear
        and isinstance(variant.lam, int | float)
        and variant.rounding == "nearest"
        and len(tuned) == 1
        and isinstance(tuned[0], AdapterOnBase)
        and (variant.lam == 1 or not tuned[0].dense_changes)
    )


def _round(model: Any, variant: Variant) -> None:
    """Round each tensor to its dtype on disk."""
    infos = variant.base.infos
    most = next(iter(infos.values())).dtype  # for parameters with another name on disk
    for name, parameter in model.named_parameters():
        stored = infos[name].dtype if name in infos else most
        parameter.data = parameter.data.to(torch_dtype(variant.dtype or stored)).float()


def _written(directory: Path, variant: Variant) -> Tensor:
    if variant.served_as == "checkpoint":
        return _logits(load_model(directory, torch.float32).eval())
    model = load_model(variant.base.directory, torch.float32).eval()
    return _logits(PutOn(model, directory.absolute()).scaled(1.0))


def _logits(model: Any) -> Tensor:
    """Return logits at every position of the rows, in float32, of shape (rows, tokens, vocabulary)."""
    size = model.get_input_embeddings().weight.shape[0]
    rows = torch.randint(0, size, (NUM_ROWS, NUM_TOKENS), generator=torch.Generator().manual_seed(0))
    logits: Tensor = model(input_ids=rows, use_cache=False).logits.float()
    return logits
