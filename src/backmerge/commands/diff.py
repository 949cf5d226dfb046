"""`backmerge diff`: is this tuned model a child of this base, and what did tuning change?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backmerge.commands.merge import numbers, places_of
from backmerge.commands.options import DTYPES
from backmerge.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from backmerge.checkpoints.reader import Weights
    from backmerge.merging.changes import Change
    from backmerge.reporting.heatmap import Table

SCHEMA_VERSION = 1  # of diff.json
PLAIN_WIDTH = 120  # characters, where there is no terminal to ask
COSTLY = 0.1  # rounding costs above this share of the change are worth a word
MANY = 3  # tensors that are named

NOTE = (
    "norm: ‖tuned - base‖ / ‖base‖. rank: of the change, (Σσ²)² / Σσ⁴ of its singular values, mean over the tensors; "
    "~ where estimated. same: share of elements with the base's bits. SLERP: how far it is from Linear at λ = 0.5, "
    "against ‖tuned - base‖. lost: error of rounding Linear to {dtype}, against ‖λ·(tuned - base)‖."
)


def diff(
    base: Annotated[str, typer.Argument(help="The aligned model: a folder or a hub id.")],
    tuned: Annotated[str, typer.Argument(help="Its tuned version: a checkpoint or a LoRA adapter.")],
    out: Annotated[Path | None, typer.Option("--out", help="A folder for diff.json, diff.png and diff.html.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print all numbers as JSON instead.")] = False,
    lam: Annotated[str, typer.Option(help="λs at which to say what rounding costs.")] = "0.2,0.4,0.6,0.8",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16, of the merged model; default: the base's.")
    ] = None,
    sample: Annotated[
        float, typer.Option(help="Share of the elements to look at; 0.01 takes seconds, and finds no rank.")
    ] = 1.0,
) -> None:
    """Say whether a tuned model is a child of this base, what tuning changed and where, and what a merge would keep.

    Reads every tensor once. Shows what differs beside the weights (tokens, chat template, configuration), a heat map
    of the change by layer and module type, its effective rank, how far SLERP would be from Linear, and which share of
    the change is lost when a merge is rounded. Rows of added tokens count as unchanged.

    Example: backmerge diff BASE TUNED --out compared

    In seconds, on large models: backmerge diff BASE TUNED --sample 0.01
    """
    lams = numbers("--lam", lam)
    if not all(0 < value <= 1 for value in lams):
        raise ConfigError(f"--lam {lam}: λ must be in (0, 1] here", remedy="such as 0.2,0.4,0.6,0.8.")
    if not 0 < sample <= 1:
        raise ConfigError(f"--sample {sample}: expected a share in (0, 1]", remedy="such as 0.01, or 1 for all.")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: unknown", remedy=f"it is one of: {', '.join(DTYPES)}.")

    from backmerge.checkpoints.adapter import open_weights
    from backmerge.checkpoints.grown import GrownBase
    from backmerge.checkpoints.locate import locate_model
    from backmerge.checkpoints.reader import Checkpoint
    from backmerge.merging.survey import measurable, survey
    from backmerge.outputs import check_apart
    from backmerge.progress import bar

    ours = Checkpoint(locate_model(base))
    theirs = open_weights(locate_model(tuned), ours)
    if out is not None:
        check_apart(out, [*places_of(ours), *places_of(theirs)])
    rounded_to = DTYPES[dtype] if dtype else None
    seen = GrownBase(ours, theirs) if isinstance(theirs, Checkpoint) else ours
    total = sum(seen.infos[name].num_elements for name in measurable(seen, theirs))
    with bar("Comparing", total) as advance:
        changes = survey(seen, theirs, lams=lams, dtype=rounded_to, sample=sample, advance=advance)
    document = _document(base, tuned, ours, theirs, changes, rounded_to, sample)
    table = _table(changes, lams, document["dtype"])
    if out is not None:
        _write(out, document, changes, table)
    if json_:
        typer.echo(_as_json(document))
    else:
        _print(document, changes, table)
        if out is not None:
            typer.echo(f"\nWritten: {out / 'diff.html'}, diff.png, diff.json")


def _document(
    base: str,
    tuned: str,
    ours: Weights,
    theirs: Weights,
    changes: Mapping[str, Change],
    dtype: str | None,
    sample: float,
) -> dict[str, Any]:
    """All that was found, as plain data."""
    from backmerge import __version__
    from backmerge.checkpoints.differences import differences
    from backmerge.merging.changes import combined, covered_share, relation
    from backmerge.reporting.heatmap import by_module_type

    found = relation(changes, covered=covered_share(ours, theirs, changes))
    rest = differences(ours, theirs)
    whole = combined(changes.values())
    own = sorted({ours.infos[name].dtype for name, change in changes.items() if change.lost_squares})
    headline = {
        "same": f"{tuned} is {base}: there is nothing to merge.",
        "child": f"{tuned} is a child of {base}.",
        "doubtful": f"{tuned} does not look like a child of {base}.",
    }[found.verdict]
    rounded_to = dtype or ", ".join(own) or "the base's dtype"
    return {
        "schema_version": SCHEMA_VERSION,
        "backmerge": __version__,
        "base": base,
        "tuned": tuned,
        "dtype": rounded_to,
        "sample": sample,
        "verdict": found.verdict,
        "headline": headline,
        "reasons": list(found.reasons),
        "advice": list(_advice(found.verdict, changes, whole, rounded_to, ours, theirs)),
        "differences": [row._asdict() for row in rest],
        "overall": _plain(whole),
        "module_types": {
            kind: {"tensors": len(names)} | _plain(combined(changes[name] for name in names))
            for kind, names in by_module_type(changes).items()
        },
        "tensors": {name: _plain(change) for name, change in changes.items()},
    }


def _plain(change: Change) -> dict[str, Any]:
    return {
        "elements": change.elements,
        "relative_norm": change.relative_norm,
        "cosine": change.cosine,
        "unchanged": change.unchanged,
        "slerp_gap": change.slerp_gap,
        "rounding_costs": {f"{lam:g}": cost for lam, cost in change.rounding_costs.items()},
        "effective_rank": change.effective_rank,
        "effective_rank_error": change.rank_error,
    }


def _as_json(document: Mapping[str, Any]) -> str:
    """JSON has no infinity and nothing that is not a number: both are null."""
    import json

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(document), indent=2, ensure_ascii=True, allow_nan=False)


def _advice(
    verdict: str, changes: Mapping[str, Change], whole: Change, dtype: str, ours: Weights, theirs: Weights
) -> Iterator[str]:
    """What follows for a merge of the two."""
    from backmerge.checkpoints.adapter import AdapterOnBase
    from backmerge.checkpoints.compare import is_grown

    if verdict == "doubtful":
        yield "A merge of models that are not parent and child is neither: give the base that it was tuned from."
        return
    if verdict == "same" or not whole.delta_square:
        return
    common = [(ours.infos[name], theirs.infos[name]) for name in ours.infos.keys() & theirs.infos.keys()]
    if any(is_grown(first.shape, second.shape) for first, second in common):
        yield "Tokens were added in tuning: merge with --extra-rows tuned, which takes their rows from the tuned model."
    if any(first.dtype != second.dtype for first, second in common):
        yield "The dtypes differ: say in which the merged model shall be, such as --dtype bfloat16."
    yield from _on_rounding(whole.rounding_costs, dtype, is_adapter=isinstance(theirs, AdapterOnBase))
    apart = sorted((name for name in changes if changes[name].slerp_square > 0), key=lambda n: -changes[n].slerp_gap)
    if not apart:
        yield "SLERP is Linear here, tensor by tensor: take Linear, which is faster."
    else:
        named = ", ".join(apart[:MANY])
        yield (
            f"SLERP differs from Linear in {len(apart)} of {len(changes)} tensors, by {_share(whole.slerp_gap)} of "
            f"the change over all; most in {named}."
        )


def _on_rounding(costs: Mapping[float, float | None], dtype: str, *, is_adapter: bool) -> Iterator[str]:
    known = {lam: cost for lam, cost in costs.items() if cost is not None}
    if not known:
        return
    least, most = min(known), max(known)
    if known[least] < COSTLY:
        yield f"Rounding to {dtype} costs little: {_share(known[least])} of the change at λ = {least:g}."
        return
    also = f", {_share(known[most])} at λ = {most:g}" if most > least else ""
    keep = "keep the merge an adapter (--as adapter), which rounds nothing; or " if is_adapter else ""
    yield (
        f"Rounding to {dtype} costs {_share(known[least])} of the change at λ = {least:g}{also}: {keep}write it with "
        "--dtype float32; or --rounding stochastic, which is right on average."
    )


def _table(changes: Mapping[str, Change], lams: Sequence[float], dtype: str) -> Table:
    from backmerge.merging.changes import combined
    from backmerge.reporting.heatmap import Table, by_module_type, percent

    lost = f"lost at λ = {' / '.join(f'{lam:g}' for lam in lams)}"
    rows = []
    for kind, names in by_module_type(changes).items():
        own = [changes[name] for name in names]
        whole = combined(own)
        costs = [whole.rounding_costs.get(lam) for lam in lams]
        rows.append(
            (
                kind,
                str(len(names)),
                percent(whole.relative_norm) if all(change.is_finite for change in own) else "not finite",
                "—" if whole.cosine is None else f"{whole.cosine:.5f}",
                _mean_rank(own),
                _share(whole.unchanged),
                _share(whole.slerp_gap),
                " / ".join(_share(cost).removesuffix(" %") for cost in costs if cost is not None) + " %"
                if whole.delta_square > 0
                else "—",
            )
        )
    headings = ("module type", "tensors", "norm", "cosine", "rank", "same", "SLERP", lost)
    width = len(headings) if lams else len(headings) - 1
    return Table(headings[:width], tuple(row[:width] for row in rows), NOTE.format(dtype=dtype))


def _mean_rank(changes: Sequence[Change]) -> str:
    ranks = [change.effective_rank for change in changes if change.effective_rank is not None]
    if not ranks:
        return "—"
    is_estimate = any(change.rank_error for change in changes)
    return f"{'~' if is_estimate else ''}{sum(ranks) / len(ranks):.3g}"


def _share(value: float) -> str:
    """Of something whole: percent without needless digits."""
    if not math.isfinite(value):
        return "∞"
    share = 100 * value
    return f"{share:.0f} %" if share >= 10 or share == 0 else f"{share:.2g} %"


def _write(out: Path, document: Mapping[str, Any], changes: Mapping[str, Change], table: Table) -> None:
    from backmerge.reporting.drawing import as_bytes
    from backmerge.reporting.heatmap import figure, heatmap_of, page
    from backmerge.runs import write_whole

    heatmap = heatmap_of(changes)
    write_whole(out / "diff.json", _as_json(document) + "\n")
    write_whole(out / "diff.png", as_bytes(figure(heatmap), "png"))
    write_whole(out / "diff.html", page(document, heatmap, table))


def _print(document: Mapping[str, Any], changes: Mapping[str, Change], table: Table) -> None:
    from rich.console import Console

    from backmerge.reporting.heatmap import heatmap_of, print_heatmap
    from backmerge.reporting.report import visible

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH

    def say(line: str) -> None:
        # names of tensors and tokens are others' words
        console.print(visible(line), soft_wrap=True)

    say(document["headline"])
    for reason in document["reasons"]:
        say(f"  {reason}")
    if document["differences"]:
        say("\nWhat else differs")
        for row in document["differences"]:
            say(f"  {row['topic']}: {row['line']}")
    if changes and document["verdict"] != "same":
        console.print()
        print_heatmap(heatmap_of(changes), console)
        console.print()
        _print_table(table, console)
    if document["advice"]:
        say("\nAdvice")
        for line in document["advice"]:
            say(f"  {line}")


def _print_table(table: Table, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable

    from backmerge.reporting.report import visible

    drawn = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(table.headings):
        drawn.add_column(heading, justify="right" if place else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(visible, row))
    console.print(drawn)
    console.print(table.note)
