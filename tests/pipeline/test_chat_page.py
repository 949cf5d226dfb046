"""The web page of `chat` in a real browser: slide λ, ask, read three answers; nothing that a model wrote runs."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backmerge.errors import ConfigError
from backmerge.generation.protocol import Sampling
from backmerge.pipeline.chat_page import page_of
from backmerge.pipeline.chatting import Chat, triple_of
from pipeline import served_chat_page
from pipeline.served_chat_page import HOSTILE
from reporting.chromium import PROGRAM, Chromium
from reporting.synthetic import made_results, made_run

ANSWERS = "['base', 'tuned', 'merged'].map(id => document.querySelector(`#${id} textarea`).value)"
NAMES = "['base', 'tuned', 'merged'].map(id => document.querySelector(`#${id} label`).innerText.trim())"
STATUS = "document.querySelector('#status textarea, #status input').value"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture
def session(tiny_base: Path, tiny_tuned: Path) -> Chat:
    """Two tiny models and their merge; the engine is never asked."""
    return Chat(None, triple_of(str(tiny_base), str(tiny_tuned)), Sampling(max_new_tokens=8))  # type: ignore[arg-type]


def test_without_gradio_the_command_to_install_it_is_given(session: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"backmerge\[web\]"):
        page_of(session, lambda *_: iter(()), None)


@pytest.fixture
def browser(tiny_base: Path, tiny_tuned: Path, tmp_path: Path) -> Iterator[Chromium]:
    """A browser on the page of a finished run."""
    pytest.importorskip("gradio")
    if PROGRAM is None:
        pytest.skip("neither chromium nor google-chrome is installed")
    run = made_run(tmp_path / "run", made_results())
    command = [sys.executable, "-W", "ignore", served_chat_page.__file__, tiny_base, tiny_tuned, run]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server,
        tempfile.TemporaryDirectory() as profile,
        Chromium(Path(profile)) as opened,
    ):
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        opened.look_as(1280, 1000)
        opened.visit(address)
        until(opened, "!!document.querySelector('#prompt textarea')")
        yield opened
        server.terminate()


def until(browser: Chromium, expression: str, wanted: Any = True) -> Any:
    """Wait for a value."""
    deadline = time.monotonic() + 120
    while (found := browser.value(expression)) != wanted:
        assert time.monotonic() < deadline, f"{expression} is {found}, not {wanted}"
        time.sleep(0.1)
    return found


def asked(browser: Chromium, prompt: str) -> None:
    """Type a prompt, and ask."""
    browser.click("#prompt textarea")
    browser.value("document.querySelector('#prompt textarea').select()")
    browser.send("Input.insertText", text=prompt)
    browser.click("#ask")


@pytest.mark.slow
def test_slide_ask_and_read_three_answers(browser: Chromium) -> None:
    """What models write is text; λ is turned for the merged model alone; a fault is said; nobody else is asked."""
    assert browser.value("document.querySelectorAll('#evidence img').length") >= 2
    assert "λ" in browser.value("document.querySelector('#evidence p').innerText")
    asked(browser, "hello")
    expected = [f"{HOSTILE} to hello at {lam}" for lam in (0, 1.0, 0.4)]
    until(browser, ANSWERS, expected)
    browser.value("document.querySelector('#lam input[type=range]').focus()")
    for _ in range(2):
        browser.press("ArrowRight", 39)
    until(browser, ANSWERS, [*expected[:2], f"{HOSTILE} to hello at 0.5"])
    assert browser.value(NAMES) == ["base", "tuned", "linear, λ = 0.5"]
    asked(browser, "too long")
    until(browser, STATUS, "the prompt is too long")
    assert browser.value("document.title").startswith("backmerge")
    assert browser.value("document.querySelectorAll('#merged b, #merged script, #merged img').length") == 0
    browser.look_as(390, 844, is_phone=True)
    assert browser.value(OVERFLOW) <= 0
    assert [url[:80] for url in browser.requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))] == []
