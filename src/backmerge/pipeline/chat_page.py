"""The web page of `chat --web`: base, tuned and merged side by side, λ as a slider, the evidence next to them."""

from __future__ import annotations

import base64
import html
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backmerge.errors import BackmergeError, ConfigError
from backmerge.pipeline.chatting import DEFAULT_LAM, Chat, Reply, Stream

if TYPE_CHECKING:
    from gradio import Blocks

LOCAL = "127.0.0.1"
TITLE = "backmerge: how much of the tuning to keep"
# fonts of the reader's machine: the page makes no requests to other hosts
FONTS = ("system-ui", "sans-serif")
CSS = """
.gradio-container {max-width: 1200px !important; margin: 0 auto}
#evidence .figures {display: flex; flex-wrap: wrap; gap: 8px}
#evidence img {flex: 1 1 260px; min-width: 0; background: white; border-radius: 8px}
#evidence p {font-size: 1.05em; margin: 0.4em 0}
"""
NOT_MEASURED = "These two models were not measured: `backmerge restore` measures them and chooses λ."
KEPT_NOTE = "Nothing you type is stored. One model is in memory and is switched between the three."


def page_of(session: Chat, stream: Stream, run: Path | None) -> Blocks:
    """Build the page of a chat.

    Args:
        session: The three models; one prompt is answered at a time.
        stream: The engine's streaming function.
        run: The finished run that the models belong to, if any: its verdict and curve are shown.

    Raises:
        ConfigError: the extra `web` is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("the web page needs Gradio", remedy="pip install 'backmerge[web]'.")
    import gradio as gr

    triple = session.triple
    lam = triple.merged.lam if isinstance(triple.merged.lam, int | float) else DEFAULT_LAM

    def answer(prompt: str, system: str, lam: float, temperature: float) -> Iterator[list[Any]]:
        if not prompt.strip():
            yield [gr.skip()] * 3 + ["Type a prompt first."]
            return
        session.system = system.strip()
        session.sampling = session.sampling.model_copy(update={"temperature": temperature})
        try:
            if triple.has_lam:
                session.turn(lam)
            for said in session.stream(prompt.strip(), stream):
                yield [*(gr.update(value=_shown(one), label=one.name) for one in said), "Answering …"]
        except BackmergeError as error:
            yield [gr.skip()] * 3 + [str(error)]
            return
        yield [gr.skip()] * 3 + [""]

    def turned(prompt: str, system: str, lam: float, temperature: float) -> Iterator[list[Any]]:
        """Answer again at another λ; without a prompt only the column's name changes."""
        if prompt.strip():
            yield from answer(prompt, system, lam, temperature)
            return
        session.turn(lam)
        yield [gr.skip(), gr.skip(), gr.update(label=session.triple.merged_name), ""]

    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(f"<h1>{TITLE}</h1>")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                prompt = gr.Textbox(label="Prompt", lines=2, max_lines=8, elem_id="prompt", autofocus=True)
                slider = gr.Slider(
                    0,
                    1,
                    value=float(lam),
                    step=0.05,
                    label="λ, the share of the tuned model: 0 is the base, 1 the tuned model",
                    interactive=triple.has_lam,
                    elem_id="lam",
                )
                with gr.Row():
                    ask = gr.Button("Ask all three", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", elem_id="stop")
                with gr.Accordion("System prompt and temperature", open=False):
                    system = gr.Textbox(label="System prompt", value=session.system, lines=2)
                    temperature = gr.Slider(
                        0,
                        2,
                        value=session.sampling.temperature,
                        step=0.1,
                        label="Temperature (0: greedy)",
                    )
                status = gr.Textbox(
                    show_label=False, container=False, interactive=False, elem_id="status", placeholder="Ready."
                )
                # below the question, so that a phone shows them before the evidence
                with gr.Row():
                    # text boxes show a model's output as text, whatever it contains
                    boxes = [
                        gr.Textbox(label=name, lines=8, max_lines=30, interactive=False, min_width=200, elem_id=role)
                        for role, name in (("base", "base"), ("tuned", "tuned"), ("merged", triple.merged_name))
                    ]
            with gr.Column(scale=3, min_width=320):
                gr.HTML(_evidence(run), elem_id="evidence")
        gr.HTML(f"<p>{html.escape(triple.told[:1].upper() + triple.told[1:])}. {KEPT_NOTE}</p>")
        given, shown = [prompt, system, slider, temperature], [*boxes, status]
        private: Any = {"api_visibility": "private", "concurrency_limit": 1, "concurrency_id": "model"}
        running = [
            ask.click(answer, given, shown, **private),
            prompt.submit(answer, given, shown, **private),
            # by pointer, keyboard or number; while an answer is generated, only the last λ is queued
            slider.change(turned, given, shown, trigger_mode="always_last", **private),
        ]
        stop.click(lambda: "Stopped.", None, status, cancels=running, api_visibility="private")
    return page


def serve(page: Blocks, *, host: str = LOCAL, port: int | None = None, block: bool = True) -> str:
    """Serve the page to this machine, or to whom the host allows; return its address.

    Args:
        page: The result of `page_of`.
        host: The address to listen on; any but this machine's own gives others access, without a password.
        port: By default a free one, from 7860 upwards.
        block: Whether to serve until Ctrl-C.

    Raises:
        ConfigError: the port is in use.
    """
    import gradio as gr

    try:
        _, address, _ = page.queue().launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            show_error=False,
            ssr_mode=False,
            footer_links=[],
            theme=gr.themes.Default(font=FONTS, font_mono=("ui-monospace", "monospace")),
            css=CSS,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise ConfigError(f"the page cannot be served: {error}", remedy="give another --port.") from error
    if block:
        page.block_thread()
    return str(address)


def _shown(said: Reply) -> str:
    thought = f"(thought)\n{said.thought}\n(answer)\n" if said.thought else ""
    return f"{thought}{said.text}{'' if said.is_finished else ' …'}"


def _evidence(run: Path | None) -> str:
    """Return the run's verdict in words and its curves, as HTML with all foreign text escaped."""
    if run is None:
        return f"<p>{html.escape(NOT_MEASURED)}</p>"
    from backmerge.reporting.drawing import as_bytes
    from backmerge.reporting.findings import verdict_sentence
    from backmerge.reporting.plots import curve
    from backmerge.reporting.report import read_run

    results = read_run(run).results
    figures = ""
    for benchmark in results.benchmarks:
        if benchmark.kind in ("utility", "safety", "keep"):
            # an image, not part of the page: what names are in the figure can do nothing
            figure = base64.b64encode(as_bytes(curve(results, benchmark), "svg")).decode()
            words = html.escape(f"{benchmark.name} against λ; the chosen λ is marked", quote=True)
            figures += f'<img alt="{words}" src="data:image/svg+xml;base64,{figure}">'
    return f'<p>{html.escape(verdict_sentence(results))}</p><div class="figures">{figures}</div>'
