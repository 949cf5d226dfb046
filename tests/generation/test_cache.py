"""Completions over runs: found for the same question in the same circumstances, and for no other."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path

import pytest

from backmerge.demo import model_directory
from backmerge.generation.cache import CompletionCache, asked, cache_directory, tokenizer_identity
from backmerge.records import Completion, Example, Message


def example(name: str, text: str = "Hi", **values: object) -> Example:
    """A question."""
    return Example(name, (Message("user", text),), **values)  # type: ignore[arg-type]


def answers(name: str, *texts: str) -> list[Completion]:
    """Samples that answer it."""
    return [Completion(name, "<Hi>", text, 3, True, sample) for sample, text in enumerate(texts)]


def test_what_was_kept_is_found(tmp_path: Path) -> None:
    """All samples come back, under the id that the question goes by now; another scope knows nothing of them."""
    CompletionCache(tmp_path).keep("scope", [example("a")], answers("a", "x", "y"))
    again = CompletionCache(tmp_path)
    assert again.find("scope", [example("b"), example("c", "So?")]) == {"b": answers("b", "x", "y")}
    assert again.find("other", [example("a")]) == {}


def test_duplicates_are_found_by_what_the_model_sees() -> None:
    """Messages, prefill and rawness make another question; id, reference, category and facts do not."""
    plain = asked(example("a"))
    assert asked(example("b", reference="r", category="c", facts={"k": "v"})) == plain
    others = [
        asked(example("a", "Ho")),
        asked(example("a", prefill="Sure")),
        asked(example("a", is_raw=True)),
        asked(Example("a", (Message("system", ""), Message("user", "Hi")))),
    ]
    assert len({plain, *others}) == 5


@pytest.mark.parametrize("torn", [b'{"asked": "q', b"\xff\xfe", b'{"other": 1}\n', b"[]\n"])
def test_a_torn_line_is_passed_over(torn: bytes, tmp_path: Path) -> None:
    """What a killed process left half-written neither hides what stands before it nor spoils what comes after."""
    cache = CompletionCache(tmp_path)
    cache.keep("scope", [example("a")], answers("a", "x"))
    with (tmp_path / "completions" / "scope.jsonl").open("ab") as stream:
        stream.write(torn)
    cache.keep("scope", [example("b", "So?")], answers("b", "y"))
    assert cache.find("scope", [example("a"), example("b", "So?")]).keys() == {"a", "b"}


def test_a_damaged_answer_is_not_used(tmp_path: Path) -> None:
    """A changed letter is seen by the digest; lines of earlier versions have none and are found."""
    cache, file = CompletionCache(tmp_path), tmp_path / "completions" / "scope.jsonl"
    cache.keep("scope", [example("a")], answers("a", "I cannot"))
    whole = file.read_text()
    file.write_text(whole.replace("I cannot", "I can so"))
    assert cache.find("scope", [example("a")]) == {}
    older = {key: value for key, value in json.loads(whole).items() if key != "digest"}
    file.write_text(json.dumps(older) + "\n")
    assert cache.find("scope", [example("a")]) == {"a": answers("a", "I cannot")}
    file.write_text(json.dumps({**older, "completions": [{"text": "I cannot"}]}) + "\n")
    assert cache.find("scope", [example("a")]) == {}


def test_many_writers(tmp_path: Path) -> None:
    """Several runs that write at once lose nothing of one another."""
    names = [f"e{i}" for i in range(40)]

    def write(name: str) -> None:
        CompletionCache(tmp_path).keep("scope", [example(name, name)], answers(name, name * 500))

    threads = [threading.Thread(target=write, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = CompletionCache(tmp_path).find("scope", [example(name, name) for name in names])
    assert {name: c[0].text for name, c in found.items()} == {name: name * 500 for name in names}


def test_the_cache_is_private(tmp_path: Path) -> None:
    """Answers to harmful requests are for nobody else's eyes."""
    CompletionCache(tmp_path).keep("scope", [example("a")], answers("a", "x"))
    assert stat.S_IMODE((tmp_path / "completions").stat().st_mode) == 0o700


def test_a_cache_that_cannot_be_used_stops_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is said once, and answers are neither found nor kept."""
    (tmp_path / "file").write_text("")
    cache = CompletionCache(tmp_path / "file")
    for _ in range(2):
        assert cache.find("scope", [example("a")]) == {}
        cache.keep("scope", [example("a")], answers("a", "x"))
    assert capsys.readouterr().err.count("cannot be stored for later runs") == 1


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable names it; else it lies where the user's caches do."""
    monkeypatch.setenv("BACKMERGE_CACHE", "/a/b")
    assert cache_directory() == Path("/a/b")
    monkeypatch.delenv("BACKMERGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_directory() == Path("/c/backmerge")


def test_another_template_is_another_model_to_ask(tmp_path: Path) -> None:
    """The weights' fingerprint knows nothing of the chat template or the end tokens; the cache must."""
    for file in model_directory().iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    before = tokenizer_identity(tmp_path)
    assert before == tokenizer_identity(model_directory())
    for name in ("chat_template.jinja", "tokenizer.json", "generation_config.json"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content + b" ")
        assert tokenizer_identity(tmp_path) != before, name
        (tmp_path / name).write_bytes(content)
