"""`backmerge chat`: show the answers of the base, the tuned and the merged model side by side."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backmerge.commands.options import Device, Dtype, Plugins
from backmerge.errors import BackmergeError, ConfigError
from backmerge.registry import Permissions, closest

if TYPE_CHECKING:
    from rich.console import Console

    from backmerge.pipeline.chatting import Chat, Stream

HELP = """\
/lam 0.3           changes λ, the share of the tuned model, and answers the last prompt again
/system TEXT       sets the system prompt from here on; without a text, removes it
/temperature 0.7   samples answers; 0 always takes the most likely token
/seed 1            sets the sampling seed
/help              shows this
/quit              ends the chat, as Ctrl-D does
Each prompt is a new conversation: the models do not see earlier prompts. Nothing is stored.
Put a space before a prompt that begins with /."""
COMMANDS = ("/lam", "/system", "/temperature", "/seed", "/help", "/quit")


def chat(
    base: Annotated[str, typer.Argument(metavar="RUN|BASE", help="A finished run, or the base: a folder or a hub id.")],
    tuned: Annotated[
        str | None,
        typer.Argument(metavar="TUNED", help="Its tuned version; for a run, the name of one of its tuned models."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this prompt, then exit.")] = None,
    lam: Annotated[
        float | None, typer.Option(help="λ of the merged model; by default the run's choice, or 0.4.")
    ] = None,
    method: Annotated[str, typer.Option(help="Merge method for BASE and TUNED; a run has its own.")] = "linear",
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0 always takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Sampling seed.")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit on the length of answers, in tokens.")] = 256,
    web: Annotated[
        bool, typer.Option("--web", help="Serve a web page with a slider for λ instead; needs the extra web.")
    ] = False,
    host: Annotated[
        str,
        typer.Option(
            help="Address of the web page. Any address other than the default lets other machines connect, without a "
            "password."
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(help="Port of the web page; by default the first free one from 7860 up.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    allow_plugins: Plugins = False,
) -> None:
    """Chat with the base, tuned and merged model side by side. /lam 0.3 changes λ.

    Only one model is in memory; its weights are changed to make each of the three. Without a terminal, prompts are read
    from standard input, one per line.

    Example: backmerge chat runs/demo

    In a browser: backmerge chat runs/demo --web

    Two models: backmerge chat BASE TUNED --lam 0.4 --prompt "How do I wash a cup?"
    """
    from rich.console import Console

    from backmerge.commands.options import check_choice
    from backmerge.generation.protocol import EngineSettings, Sampling
    from backmerge.generation.quiet import quieten
    from backmerge.generation.transformers_engine import TransformersEngine
    from backmerge.pipeline.chatting import Chat, triple_of, triple_of_run
    from backmerge.pipeline.rescoring import is_run

    check_choice("--dtype", dtype, ("auto", "float32", "bfloat16", "float16"))
    quieten()
    if is_run(Path(base)):
        triple = triple_of_run(Path(base), tuned, Permissions(allow_plugins))
    elif tuned is None:
        raise ConfigError(
            f"{base} is not a run, and TUNED is missing", remedy="use backmerge chat RUN, or backmerge chat BASE TUNED."
        )
    else:
        triple = triple_of(base, tuned, method, Permissions(allow_plugins))
    if lam is not None:
        triple = triple.at(lam)
    given: Any = dtype
    engine: Any = TransformersEngine(EngineSettings(device=device, dtype=given, batch_size=1))
    sampling = Sampling(temperature=temperature, seed=seed, max_new_tokens=max_new_tokens)
    session = Chat(engine, triple, sampling)
    session.system = system
    if web:
        _serve(session, engine.stream, Path(base) if is_run(Path(base)) else None, host, port)
        return
    console = Console(highlight=False, markup=False)
    greeting = f"Merged model: {triple.merged_name} ({triple.told})."
    if prompt is not None:
        typer.echo(greeting, err=True)
        _show(console, lambda: session.ask(prompt))
        return
    is_terminal = sys.stdin.isatty()
    typer.echo(f"{greeting} /help lists what you can do." if is_terminal else greeting, err=not is_terminal)
    for line in _lines(is_terminal=is_terminal):
        try:
            if not _taken(line, session, console):
                return
        except BackmergeError as error:
            if not is_terminal:
                raise
            typer.echo(str(error), err=True)
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            typer.echo("Stopped.", err=True)


def _serve(session: Chat, stream: Stream, run: Path | None, host: str, port: int | None) -> None:
    from backmerge.pipeline.chat_page import LOCAL, page_of, serve

    page = page_of(session, stream, run)
    address = serve(page, host=host, port=port, block=False)
    typer.echo(f"Open {address} in a browser; Ctrl-C stops the server.")
    if host != LOCAL:
        typer.echo("Anyone who can reach this address can ask the models; there is no password.", err=True)
    page.block_thread()


def _lines(*, is_terminal: bool) -> Iterator[str]:
    if not is_terminal:
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    import readline  # noqa: F401 - line editing; writes no history

    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        yield line


def _taken(line: str, session: Chat, console: Console) -> bool:
    """Execute a line; return whether to continue."""
    if not line.strip():
        return True
    if not line.startswith("/"):
        if not console.is_terminal:
            console.out(f"> {line}", highlight=False)
        _show(console, lambda: session.ask(line.strip()))
        return True
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word == "/quit":
        return False
    if word == "/help":
        typer.echo(HELP)
    elif word == "/lam":
        session.turn(_number(word, rest))
        _again(console, session)
    elif word == "/system":
        session.system = rest
        _again(console, session)
    elif word in ("/temperature", "/seed"):
        session.sampling = session.sampling.model_copy(update={word[1:]: _of_draws(word, rest)})
        if word == "/seed" and session.sampling.temperature == 0:
            typer.echo("The seed has no effect at temperature 0; try /temperature 0.7.")
        else:
            _again(console, session)
    else:
        raise ConfigError(
            f"there is no command '{word}'{closest(word, COMMANDS)}",
            remedy="/help lists them; put a space before a prompt that begins with /.",
        )
    return True


def _again(console: Console, session: Chat) -> None:
    if session.has_asked:
        _show(console, session.again)


def _show(console: Console, answer: Callable[[], Any]) -> None:
    from backmerge.reporting.console import Column, print_answers

    if console.is_terminal:
        with console.status("Asking base, tuned and merged"):
            said = answer()
    else:
        said = answer()
    print_answers(console, [Column(one.name, one.text, one.is_finished, one.thought) for one in said])


def _of_draws(word: str, text: str) -> float | int:
    """Parse a temperature or a seed."""
    value = _number(word, text)
    is_seed = word == "/seed"
    if not 0 <= value < (2**32 if is_seed else math.inf) or (is_seed and not value.is_integer()):
        raise ConfigError(f"{word} {text}: not a valid {word[1:]}", remedy="for example /temperature 0.7 or /seed 1.")
    return int(value) if is_seed else value


def _number(word: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{word} {text}: expected a number", remedy=f"for example {word} 0.3.") from None
