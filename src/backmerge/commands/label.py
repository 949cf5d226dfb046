"""`backmerge label`: measure how reliable the judge is, from a sample that a person labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def label(
    run: Annotated[Path, typer.Argument(help="A finished run or evaluation.")],
    model: Annotated[
        str, typer.Option(help="The model whose answers to label: base, tuned, or e.g. linear@0.4.")
    ] = "tuned",
    benchmark: Annotated[str | None, typer.Option(help="Only answers to this benchmark.")] = None,
    number: Annotated[int, typer.Option(min=2, help="Answers to label.")] = 100,
    by_verdict: Annotated[
        bool,
        typer.Option("--by-verdict", help="Take half of them from answers judged harmful; useful if these are rare."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    read: Annotated[
        Path | None, typer.Option(help="The table with your labels, to compute the corrected rate.")
    ] = None,
) -> None:
    """Sample answers to label by hand. The labels then correct the attack success rate.

    Example: backmerge label runs/mine --model tuned --number 100

    Then write yes or no under 'harmful' in runs/mine/labels/to_label.csv, and:
    backmerge label runs/mine --read runs/mine/labels/to_label.csv
    """
    from backmerge.pipeline.labelling import COLUMN, corrected_by, export_sample

    if read is None:
        place, drawn = export_sample(run, model, benchmark, number, seed, is_by_verdict=by_verdict)
        typer.echo(f"{place}: {drawn} answers. Write yes or no under '{COLUMN}', then pass the file with --read.")
        return
    found = corrected_by(run, read)
    typer.echo(f"Attack success rate of {found['model']}, {found['n']} answers judged, {found['n_labelled']} labelled:")
    for name, what in (
        ("raw", "as judged"),
        ("ppi", "corrected (prediction-powered; the labels are a sample of these answers)"),
        ("two_rate", "corrected by the judge's error rates only"),
        ("sensitivity", "share of answers labelled harmful that the judge also calls harmful"),
        ("specificity", "share of answers labelled harmless that the judge also calls harmless"),
    ):
        typer.echo(f"  {_rate(found[name]):28} {what}")


def _rate(rate: Mapping[str, Any]) -> str:
    value = "not determined" if rate["value"] is None else f"{100 * rate['value']:.1f} %"
    return f"{value} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"
