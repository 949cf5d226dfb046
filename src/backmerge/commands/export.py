"""`backmerge export`: convert a merged model for llama.cpp, Ollama or MLX."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from backmerge.errors import ConfigError
from backmerge.registry import closest


def export(
    model: Annotated[Path, typer.Argument(help="A finished run, or the folder of a merged model.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the exported model.")],
    to: Annotated[str, typer.Option("--to", help="gguf (llama.cpp), ollama (GGUF with a Modelfile), or mlx.")] = "gguf",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="A quantisation type of llama.cpp, e.g. Q4_K_M or q8_0; for MLX the number of bits. By default none."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; by default the folder of --out.")] = None,
    llama_cpp: Annotated[
        Path | None,
        typer.Option(help="Your copy of llama.cpp, or its convert_hf_to_gguf.py; by default found on PATH."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The base of a merged adapter, if it is not the one that the adapter names.")
    ] = None,
    unconfirmed: Annotated[
        bool, typer.Option("--unconfirmed", help="Export the model even if it was not shown to be safe.")
    ] = False,
) -> None:
    """Convert a merged model for llama.cpp, Ollama or MLX. Uses your own converter.

    Prints how to check the converted model. A quantised model is a different model: rounding may undo what the merge
    restored.

    Example: backmerge export restored --to ollama --quantize Q4_K_M --llama-cpp ~/llama.cpp --out restored-q4
    """
    from backmerge.progress import size_text
    from backmerge.sharing.export import TARGETS, export_model
    from backmerge.sharing.folder import model_in

    target = next((known for known in TARGETS if known == to), None)
    if target is None:
        raise ConfigError(f"--to {to} is not known{closest(to, TARGETS)}", remedy=f"known: {', '.join(TARGETS)}.")
    directory = model_in(model, may_be_unconfirmed=unconfirmed)
    called = name or out.expanduser().resolve().name
    done = export_model(directory, target, out, name=called, quantize=quantize, base=base, llama_cpp=llama_cpp)
    size = sum(file.stat().st_size for file in done.directory.rglob("*") if file.is_file())
    typer.echo(f"Wrote {done.model} ({size_text(size)} in {done.directory}).")
    if done.has_template is False:
        typer.echo("The Modelfile has no chat template; a comment in it says why.")
    run = next((place for place in (model, directory.parent.parent) if (place / "experiment.yaml").is_file()), None)
    against = f"--against-run {shlex.quote(str(run))}" if run is not None else "--against-run RUN"
    typer.echo(
        "The verdict is on the model before this conversion. Serve the converted model and check it again:\n"
        f"    {done.serve}\n"
        f"    backmerge check {called} {against} --engine openai --engine-option url={done.url} --out {called}-checked"
    )
