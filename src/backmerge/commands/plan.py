"""`backmerge plan`: show what a merge would write, whether an adapter is exact, and the loss from rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from backmerge.commands.options import (
    DTYPES,
    Base,
    MergedDtype,
    Method,
    OtherModels,
    Plugins,
    check_choice,
    numbers,
    options_named,
    pairs,
)
from backmerge.registry import Permissions

if TYPE_CHECKING:
    from backmerge.merging.recipe import Variant


def plan(
    base: Base,
    tuned: Annotated[list[str], typer.Argument(help="Its tuned versions: checkpoints or LoRA adapters.")],
    lam: Annotated[
        str | None, typer.Option(metavar="λ,...", help="λs, separated by commas; by default the method's own.")
    ] = None,
    method: Method = "linear",
    model: OtherModels = None,
    dtype: MergedDtype = None,
    allow_plugins: Plugins = False,
) -> None:
    """Show what a merge would write. Prints the cheapest exact form, sizes, and the loss from rounding.

    Reads 1 % of the elements, so it takes seconds for models of any size.

    Example: backmerge plan BASE TUNED --lam 0.2,0.4,0.6
    """
    from dataclasses import replace

    from backmerge.checkpoints.files import MERGED_DTYPES
    from backmerge.merging.method import find_method
    from backmerge.merging.served import checkpoint_bytes
    from backmerge.merging.served import plan as planned
    from backmerge.pipeline.merges import lams_of, recipes_of

    if dtype is not None:
        check_choice("--dtype", dtype, DTYPES)
    found = find_method(method, Permissions(allow_plugins))
    with options_named("--lam"):
        lams = lams_of(found, None if lam is None else numbers("--lam", lam))
    for name, recipe in recipes_of(base, tuned, found, dict(pairs("--model", model or ())), "error").items():
        variant = replace(recipe, dtype=MERGED_DTYPES[dtype] if dtype is not None else None)
        way = planned(variant)
        if name:
            typer.echo(f"{name}:")
        typer.echo(f"cheapest exact form: {way.realisation} ({way.reason})")
        if way.realisation == "adapter":
            typer.echo(f"  as adapter:    {_size(way.num_bytes)} for each λ, in float32: --as adapter")
        typer.echo(f"  as checkpoint: {_size(checkpoint_bytes(variant))} for each λ, {len(lams)} in one pass")
        _tell_rounding(variant, lams, is_adapter=way.realisation == "adapter")


def _tell_rounding(variant: Variant, lams: list[float], *, is_adapter: bool) -> None:
    """Print how much of each tuned model's change a linear merge would lose in a rounded checkpoint."""
    from backmerge.merging.changes import combined, relation
    from backmerge.merging.rounding import NOTABLE_LOSS
    from backmerge.merging.survey import survey
    from backmerge.pipeline.merges import SAMPLE

    inside = [lam for lam in lams if 0 <= lam <= 1]
    for tuned in variant.tuned_models:
        changes = survey(variant.base, tuned, lams=inside, dtype=variant.dtype, sample=SAMPLE)
        found = relation(changes)
        typer.echo(f"{tuned.directory.name}: {found.verdict}; {'; '.join(found.reasons)}")
        costs = {lam: cost for lam, cost in combined(changes.values()).rounding_costs.items() if cost is not None}
        if not costs:
            continue
        shown = ", ".join(f"{100 * cost:.2g} % at λ = {lam:g}" for lam, cost in costs.items())
        typer.echo(f"  share of the change that rounding a checkpoint loses: {shown}")
        if max(costs.values()) > NOTABLE_LOSS:
            better = "--as adapter or --dtype float32" if is_adapter else "--dtype float32"
            typer.echo(f"  → {better} keeps it; --rounding stochastic is unbiased")


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
