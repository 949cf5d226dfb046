"""Present what tuning changed: verdict, differences, figures by module type, advice."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from backmerge import __version__
from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.compare import is_grown
from backmerge.checkpoints.differences import Difference, differences
from backmerge.checkpoints.reader import Weights
from backmerge.merging.changes import Change, combined, covered_share, relation
from backmerge.reporting.drawing import as_bytes
from backmerge.reporting.heatmap import Heatmap, Table, by_module_type, figure, heatmap_of, page, percent, print_heatmap
from backmerge.reporting.report import visible
from backmerge.reporting.user_folder import added_to
from backmerge.results import data_frame, html_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

SCHEMA_VERSION = 1  # of diff.json
COSTLY = 0.1  # rounding costs above this share of the change are mentioned
MANY = 3  # most tensors that are named

NOTE = (
    "norm: ‖tuned - base‖ / ‖base‖. rank: effective rank of the change, (Σσ²)² / Σσ⁴ of its singular values, mean "
    "over the tensors; ~ if estimated. same: share of unchanged elements. SLERP: its distance from Linear at λ = "
    "0.5, relative to ‖tuned - base‖. lost: error of rounding Linear to {dtype}, relative to ‖λ·(tuned - base)‖."
)


@dataclass(frozen=True)
class Diff:
    """The differences between a base and its tuned version.

    Attributes:
        base: The base's name, as given.
        tuned: The tuned version's name, as given.
        verdict: `same`: bit for bit; `child`: as close as after fine-tuning; `doubtful`: farther apart.
        headline: The verdict in words.
        reasons: Sentences, the first for the verdict.
        differences: Differences outside the tensors: tokens, chat template, configuration.
        advice: Advice for a merge.
        tensors: The change of each tensor.
        lams: λs of the rounding costs.
        dtype: The dtype of these costs.
        sample: Share of the elements that were read.
    """

    base: str
    tuned: str
    verdict: Literal["same", "child", "doubtful"]
    headline: str
    reasons: tuple[str, ...]
    differences: tuple[Difference, ...]
    advice: tuple[str, ...]
    tensors: Mapping[str, Change]
    lams: tuple[float, ...]
    dtype: str
    sample: float
    backmerge: str = __version__

    @property
    def overall(self) -> Change:
        """Return the change of all tensors, taken as one vector."""
        return combined(self.tensors.values())

    @property
    def heatmap(self) -> Heatmap:
        """Return the change by layer and module type."""
        return heatmap_of(self.tensors)

    @property
    def table(self) -> Table:
        """Return the change by module type, for people."""
        return _table(self.tensors, self.lams, self.dtype)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return the figures as flat rows, one for each tensor."""
        return [
            {"tensor": name, **{key: value for key, value in _plain(change).items() if key != "rounding_costs"}}
            | {f"lost_at_{lam:g}": cost for lam, cost in change.rounding_costs.items()}
            for name, change in self.tensors.items()
        ]

    def to_pandas(self) -> Any:
        """Return `to_rows()` as a `pandas.DataFrame`.

        Raises:
            ConfigError: pandas is not installed.
        """
        return data_frame(self.to_rows())

    def plot(self) -> Figure:
        """Return the change by layer and module type as a `matplotlib` figure, which notebooks show."""
        return figure(self.heatmap)

    def _repr_html_(self) -> str:
        """Return a table for notebooks; names are escaped, since other people chose them."""
        table = self.table
        return html_table(self.headline, [dict(zip(table.headings, row, strict=True)) for row in table.rows])

    def to_json(self) -> str:
        """Return the text of `diff.json`. JSON has neither infinity nor NaN: both are null."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "backmerge": self.backmerge,
            "base": self.base,
            "tuned": self.tuned,
            "dtype": self.dtype,
            "sample": self.sample,
            "verdict": self.verdict,
            "headline": self.headline,
            "reasons": list(self.reasons),
            "advice": list(self.advice),
            "differences": [row._asdict() for row in self.differences],
            "overall": _plain(self.overall),
            "module_types": {
                kind: {"tensors": len(names)} | _plain(combined(self.tensors[name] for name in names))
                for kind, names in by_module_type(self.tensors).items()
            },
            "tensors": {name: _plain(change) for name, change in self.tensors.items()},
        }
        return json.dumps(_finite(document), indent=2, ensure_ascii=True, allow_nan=False)

    def write(self, out: Path) -> None:
        """Write `diff.json`, `diff.png` and `diff.html` into a folder."""
        heatmap = self.heatmap
        with added_to(out) as made:
            (made / "diff.json").write_text(self.to_json() + "\n", encoding="utf-8")
            (made / "diff.png").write_bytes(as_bytes(figure(heatmap), "png"))
            (made / "diff.html").write_text(page(self, heatmap, self.table), encoding="utf-8")

    def print(self, console: Console) -> None:
        """Print everything except the figures of single tensors."""

        def say(line: str) -> None:
            # names of tensors and tokens come from other people
            console.print(visible(line), soft_wrap=True)

        say(self.headline)
        for reason in self.reasons:
            say(f"  {reason}")
        if self.differences:
            say("\nOther differences")
            for row in self.differences:
                say(f"  {row.topic}: {row.line}")
        if self.tensors and self.verdict != "same":
            console.print()
            print_heatmap(self.heatmap, console)
            console.print()
            _print_table(self.table, console)
        if self.advice:
            say("\nAdvice")
            for line in self.advice:
                say(f"  {line}")


def diff_of(
    names: tuple[str, str],
    ours: Weights,
    theirs: Weights,
    changes: Mapping[str, Change],
    *,
    lams: Sequence[float],
    dtype: str | None,
    sample: float,
) -> Diff:
    """Return the result of a survey of two models.

    Args:
        names: Names of base and tuned version.
        ours: The base.
        theirs: The tuned version.
        changes: The changes found by the survey, by tensor.
        lams: λs of its rounding costs.
        dtype: The dtype that it rounded to; `None` for the base's.
        sample: Share of the elements that it read.

    Raises:
        CheckpointError: a JSON file of a model is damaged.
    """
    base, tuned = names
    found = relation(changes, covered=covered_share(ours, theirs, changes))
    own = sorted({ours.infos[name].dtype for name, change in changes.items() if change.lost_squares})
    rounded_to = dtype or ", ".join(own) or "the base's dtype"
    headline = {
        "same": f"{tuned} equals {base}: there is nothing to merge.",
        "child": f"{tuned} was made from {base}.",
        "doubtful": f"{tuned} does not look like it was made from {base}.",
    }[found.verdict]
    advice = _advice(found.verdict, changes, combined(changes.values()), rounded_to, ours, theirs)
    return Diff(
        base=base,
        tuned=tuned,
        verdict=found.verdict,
        headline=headline,
        reasons=found.reasons,
        differences=tuple(differences(ours, theirs)),
        advice=tuple(advice),
        tensors=changes,
        lams=tuple(lams),
        dtype=rounded_to,
        sample=sample,
    )


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


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _advice(
    verdict: str, changes: Mapping[str, Change], whole: Change, dtype: str, ours: Weights, theirs: Weights
) -> Iterator[str]:
    """Yield advice for a merge of the two."""
    if verdict == "doubtful":
        yield "A merge of unrelated models is useless: give the base that the model was tuned from."
        return
    if verdict == "same" or not whole.delta_square:
        return
    common = [(ours.infos[name], theirs.infos[name]) for name in ours.infos.keys() & theirs.infos.keys()]
    if any(is_grown(first.shape, second.shape) for first, second in common):
        yield "Tokens were added in tuning: merge with --extra-rows tuned, which keeps their rows."
    if any(first.dtype != second.dtype for first, second in common):
        yield "The dtypes differ: choose the dtype of the merged model, for example --dtype bfloat16."
    yield from _on_rounding(whole.rounding_costs, dtype, is_adapter=isinstance(theirs, AdapterOnBase))
    apart = sorted((name for name in changes if changes[name].slerp_square > 0), key=lambda n: -changes[n].slerp_gap)
    if not apart:
        yield "SLERP equals Linear here, tensor by tensor: use Linear, which is faster."
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
    keep = "write an adapter (--as adapter), which rounds nothing; or " if is_adapter else ""
    yield (
        f"Rounding to {dtype} costs {_share(known[least])} of the change at λ = {least:g}{also}: {keep}use --dtype "
        f"float32, or --rounding stochastic, which is unbiased."
    )


def _table(changes: Mapping[str, Change], lams: Sequence[float], dtype: str) -> Table:
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
    """Return a share in percent without needless digits."""
    if not math.isfinite(value):
        return "∞"
    share = 100 * value
    return f"{share:.0f} %" if share >= 10 or share == 0 else f"{share:.2g} %"


def _print_table(table: Table, console: Console) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table as RichTable

    drawn = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for place, heading in enumerate(table.headings):
        drawn.add_column(heading, justify="right" if place else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(visible, row))
    console.print(drawn)
    console.print(table.note)
