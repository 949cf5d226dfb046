"""Whatever a server does: the right answers in the end, or a clear error; no answer is lost, and no key is reported."""

from __future__ import annotations

import email.utils
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.errors import BackmergeError, DataError, GenerationError
from backmerge.generation import http_client
from backmerge.generation.cache import AnswerLog
from backmerge.generation.http_client import _retry_after
from backmerge.generation.protocol import Request
from backmerge.merging.recipe import Variant
from backmerge.records import Example, Message, to_json
from generation.local_server import Fault, LocalServer, free_port, running_server, say
from generation.served import EXAMPLES, GREEDY, ask, messages, new_engine

KEY = "sk-test-5f1c9a07e4b2d683"
TEXTS = [say(messages(example)) for example in EXAMPLES]
RATE_LIMITED = {"error": {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalServer]:
    """A server, and an engine's client that does not pause for long."""
    monkeypatch.setattr(http_client, "FIRST_PAUSE_SECONDS", 0.005)
    monkeypatch.setattr(http_client, "LONGEST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(http_client, "GRACE_SECONDS", 1.0)
    with running_server() as running:
        yield running


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a variable that holds a key."""
    monkeypatch.setenv("BACKMERGE_TEST_KEY", KEY)
    return "BACKMERGE_TEST_KEY"


def reply(**choice: Any) -> Fault:
    """A reply with HTTP 200 and one choice."""
    return Fault(200, {"choices": [{"index": 0, "finish_reason": "stop", **choice}]})


PASSING: Mapping[str, Fault] = {
    "429": Fault(429, RATE_LIMITED),
    "500": Fault(500),
    "502 in HTML": Fault(502, "<html><h1>Bad Gateway</h1></html>"),
    "503": Fault(503, {"error": {"message": "Loading model", "code": 503}}),
    "reset": Fault(resets=True),
    "cut body": Fault(200, {"choices": []}, cuts=True),
    "time-out": Fault(200, {"choices": []}, delay=2.0),
    "drop by drop": Fault(200, {"choices": []}, drips=0.3),
    "not JSON": Fault(200, "<html>it works</html>"),
    "empty body": Fault(200, ""),
    "half of JSON": Fault(200, '{"choices": [{"message": {"content": "ans'),
    "a list": Fault(200, [1, 2]),
    "no choices": Fault(200, {"object": "chat.completion"}),
    "empty choices": Fault(200, {"choices": []}),
    "error with 200": Fault(200, {"error": {"message": "upstream failed"}}),
    "no message": reply(),
    "message is text": reply(message="hello"),
    "parts": reply(message={"content": [{"type": "image_url", "image_url": {"url": "hello"}}]}),
    "list of texts": reply(message={"content": ["hello"]}),
    "deep": Fault(200, "[" * 100_000),
}


# how long those are waited for that only the clock ends: well over what a busy machine takes to answer
SECONDS = {"time-out": 1.0, "drop by drop": 1.0}


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_fault_leaves_no_trace(server: LocalServer, name: str) -> None:
    """After one or two faults of each kind, the answers are those of a server without."""
    server.faults = [PASSING[name], None, PASSING[name]]
    engine = new_engine(server, concurrency=2, timeout_seconds=SECONDS.get(name, 60))
    assert [completion.text for completion in ask(engine)] == TEXTS
    assert len(server.posts) == len(EXAMPLES) + 2


@pytest.mark.parametrize("name", PASSING)
def test_a_lasting_fault_is_a_clear_error(server: LocalServer, name: str) -> None:
    """It names the prompt by its id and the server, says what happened, and gives up after the tries it may."""
    server.rule = lambda body: PASSING[name] if "number 3" in body["messages"][0]["content"] else None
    engine = new_engine(server, concurrency=1, timeout_seconds=SECONDS.get(name, 60), retries=3)
    with pytest.raises(GenerationError) as caught:
        ask(engine)
    message = str(caught.value)
    assert "prompt 'e3'" in message
    assert server.url in message
    assert "Where is kite" not in message
    assert ("does not answer within 1 s" in message) == (name in SECONDS)
    assert 3 <= len(server.posts) - 3 <= 4  # three that make no sense are enough
    assert f"({len(server.posts) - 3} tries)" in message


def test_retry_after_is_respected(server: LocalServer) -> None:
    """The next try comes no sooner than the server asks, in seconds or by date; too long a wait is an error."""
    server.faults = [Fault(429, RATE_LIMITED, {"Retry-After": "0.4"})]
    assert ask(new_engine(server), EXAMPLES[:1])[0].text == TEXTS[0]
    first, second = server.posts
    assert 0.4 <= second.time - first.time < 3
    server.faults = [Fault(429, RATE_LIMITED, {"Retry-After": "86400"})]
    with pytest.raises(GenerationError, match=r"'e0'(.|\n)*HTTP 429: Rate limit reached"):
        ask(new_engine(server), EXAMPLES[:1])
    assert len(server.posts) == 3


def test_retry_after_in_all_its_forms() -> None:
    """Seconds and dates, past ones as none to wait, nonsense as nothing."""
    later = email.utils.format_datetime(datetime.now(UTC) + timedelta(seconds=50), usegmt=True)
    assert 48 <= (_retry_after({"retry-after": later}) or 0) <= 50
    for value, expected in (
        ("7", 7.0),
        ("0", 0.0),
        ("-3", 0.0),
        ("nan", None),
        ("soon", None),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
    ):
        assert _retry_after({"retry-after": value}) == expected, value


def test_pauses_double_and_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pause lies between half its length and its length, which doubles up to a bound."""
    client = http_client.ServerClient("http://localhost:1", None, timeout_seconds=1, retries=9, concurrency=1)
    for attempt in range(12):
        longest = min(60.0, 0.5 * 2**attempt)
        pauses = {client._pause(attempt) for _ in range(50)}
        assert all(longest / 2 <= pause <= longest for pause in pauses)
        assert len(pauses) > 40


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault(400, {"error": {"message": "top_k is not supported"}}), "HTTP 400: top_k is not supported"),
        (Fault(422, {"detail": "Unexpected fields in the request: {'x'}"}), "Unexpected fields"),
        (Fault(422, {"detail": [{"loc": ["body", "n"], "msg": "too big", "input": "SECRET"}]}), "body.n: too big"),
        (Fault(401, {"error": {"message": "Unauthorized"}}), "'api_key_env'"),
        (Fault(404, {"error": {"message": "no such model"}}), "it lists: model"),
        (Fault(429, {"error": {"message": "no credit", "code": "insufficient_quota"}}), "no credit"),
        (Fault(307, "", {"Location": "http://other.example/v1"}), "redirects to http://other.example/v1"),
        (Fault(418, "plain \x1b[31mred\x07 text\nof two lines"), "HTTP 418: plain [31mred text of two lines"),
        (Fault(400, {"error": {"message": "x" * 5000}}), "x" * 200 + ""),
        (
            Fault(400, {"error": {"message": "This model's maximum context length is 9 tokens.", "code": 400}}),
            "'e0' with its answer does not fit into the context of 'model'",
        ),
        (
            Fault(400, {"error": {"message": "request exceeds the available context size", "type": "exceed_context"}}),
            "max_new_tokens",
        ),
    ],
)
def test_a_refusal_is_not_asked_again(server: LocalServer, fault: Fault, says: str) -> None:
    """The server's message is passed on, one clean line of it, with what to do."""
    server.rule = lambda _: fault
    with pytest.raises(GenerationError) as caught:
        ask(new_engine(server), EXAMPLES[:1])
    assert says in str(caught.value)
    assert len(server.posts) == 1
    assert len(caught.value.message) < 700
    assert "SECRET" not in str(caught.value)
    assert all(letter.isprintable() for letter in caught.value.message)


@pytest.mark.parametrize("said", ["no: {}", "[{{'loc': ['messages'], 'input': '{}'}}]"])
def test_a_message_that_repeats_the_prompt_is_left_out(server: LocalServer, said: str) -> None:
    """A prompt may be harmful: it is named by its id, also if the server quotes it."""
    text = "Describe the kite\nthat flew away over the old garage yesterday"
    example = Example("quoted", (Message("user", text),))
    server.rule = lambda body: Fault(400, {"error": {"message": said.format(body["messages"][0]["content"][:40])}})
    with pytest.raises(GenerationError, match=r"'quoted'(.|\n)*repeats the prompt") as caught:
        ask(new_engine(server), [example])
    assert "kite" not in str(caught.value)


def test_token_ids_that_a_server_does_not_take(server: LocalServer) -> None:
    """The error names the option that sends text instead."""
    server.rule = lambda body: Fault(400, {"detail": "prompt must be a string."}) if "prompt" in body else None
    engine = new_engine(server, api="completions")
    with pytest.raises(GenerationError, match=r"prompt must be a string(.|\n)*prompt_as: text"):
        ask(engine, EXAMPLES[:1], variant=Variant(Checkpoint(model_directory())))


def test_a_server_that_is_not_there_is_named_at_once() -> None:
    """A wrong address takes no two minutes of retries, and the error says which option holds it."""
    url = f"http://127.0.0.1:{free_port()}/v1"
    with running_server() as server, pytest.raises(GenerationError) as caught:
        ask(new_engine(server, url=url, server="auto"))
    assert f"the server at {url} cannot be reached" in str(caught.value)
    assert "(2 tries)" in str(caught.value)
    assert "option 'url'" in str(caught.value)


def test_a_server_that_cannot_list_its_models(server: LocalServer) -> None:
    """Without a list it has OpenAI's fields; where the list fails, its kind is not guessed; a key may be missing."""
    server.list_fault = Fault(404, {"detail": "Not Found"})
    assert new_engine(server, server="auto").identity["server"] == "openai"
    server.list_fault = Fault(500, "Internal Server Error")  # `transformers serve` without a cache folder
    with pytest.raises(GenerationError, match=r"the kind of server cannot be determined(.|\n)*'server': openai, vllm"):
        ask(new_engine(server, server="auto"))
    assert ask(new_engine(server, server="transformers"), EXAMPLES[:1])[0].text == TEXTS[0]
    server.list_fault = Fault(401, {"error": {"message": "Unauthorized"}})
    with pytest.raises(GenerationError, match="api_key_env"):
        ask(new_engine(server, server="auto"))


def test_no_more_requests_at_once_than_allowed(server: LocalServer) -> None:
    """Concurrency is used, and is a bound."""
    server.seconds = 0.03
    many = [Example(f"m{i}", (Message("user", str(i)),)) for i in range(24)]
    ask(new_engine(server, concurrency=4), many)
    assert server.most_at_once == 4


def test_key_is_sent_and_never_shown(
    server: LocalServer, key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is in the header, and in no record, answer, kept answer, log line, error or identity, whoever repeats it."""
    caplog.set_level(logging.DEBUG)
    log = tmp_path / "answers.jsonl"
    engine = new_engine(server, api_key_env=key, log=str(log), concurrency=1, retries=1)
    server.choice = {"message": {"content": f"your key is {KEY}"}}
    (said,) = ask(engine, EXAMPLES[:1])
    assert said.text == "your key is [key]"
    assert server.posts[0].headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in to_json(said)
    assert KEY not in log.read_text(encoding="utf-8")
    assert KEY not in json.dumps(engine.identity)
    assert KEY not in repr(vars(engine)["options"])
    for fault in (
        Fault(401, {"error": {"message": f"Incorrect API key provided: {KEY}."}}),
        Fault(500, f"Authorization: Bearer {KEY}"),
        Fault(302, "", {"Location": f"http://other.example/{KEY}"}),
        Fault(200, f"not JSON {KEY}"),
    ):
        server.rule = lambda _, fault=fault: fault
        with pytest.raises(GenerationError) as caught:
            ask(engine, EXAMPLES[1:2])
        assert KEY not in "".join(traceback.format_exception(caught.value))
    assert KEY not in caplog.text


def test_the_key_does_not_follow_a_redirect(server: LocalServer, key: str) -> None:
    """The other host gets no request at all."""
    with running_server() as other:
        server.rule = lambda _: Fault(307, "", {"Location": f"{other.url}/chat/completions"})
        with pytest.raises(GenerationError, match="not followed since the key would be sent there"):
            ask(new_engine(server, api_key_env=key), EXAMPLES[:1])
        assert not other.seen


def test_a_short_key_takes_no_words_out_of_answers(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """`EMPTY` is what people give to servers without keys, and may be said."""
    monkeypatch.setenv("BACKMERGE_TEST_KEY", "EMPTY")
    server.choice = {"message": {"content": "the box is EMPTY"}}
    assert ask(new_engine(server, api_key_env="BACKMERGE_TEST_KEY"), EXAMPLES[:1])[0].text == "the box is EMPTY"


@pytest.mark.parametrize("bad", ["sk-two\nlines-5f1c9a07", "sk-\u00fcml\u00e4ut-5f1c9a07"])
def test_a_key_that_is_none_is_not_repeated(server: LocalServer, monkeypatch: pytest.MonkeyPatch, bad: str) -> None:
    """What no header can hold is refused before it is sent, by the variable's name."""
    monkeypatch.setenv("BACKMERGE_TEST_KEY", bad)
    with pytest.raises(BackmergeError, match="BACKMERGE_TEST_KEY is not a key") as caught:
        new_engine(server, api_key_env="BACKMERGE_TEST_KEY")
    assert "5f1c9a07" not in str(caught.value)


def test_ctrl_c_stops_at_once(server: LocalServer) -> None:
    """A signal is answered though the server is not, and nothing more is asked."""
    server.seconds = 30.0
    engine = new_engine(server, concurrency=2)
    interrupt = threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask(engine)
    assert time.monotonic() - started < 3
    interrupt.join()
    assert len(server.posts) <= 2


def test_a_stopped_program_ends_though_requests_hang() -> None:
    """The interpreter does not wait for threads whose server never answers."""
    program = """
import signal, time
from backmerge.generation.http_client import as_answered
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.2)
list(as_answered([1, 2], lambda question, stop: time.sleep(600), 2))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stderr.strip().endswith("KeyboardInterrupt")


def test_ctrl_c_stops_pauses(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is made again by threads that slept when their run was stopped."""
    monkeypatch.setattr(http_client, "FIRST_PAUSE_SECONDS", 0.5)
    monkeypatch.setattr(http_client, "LONGEST_PAUSE_SECONDS", 0.5)
    server.rule = lambda body: Fault() if "number 0" not in body["messages"][0]["content"] else None

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        new_engine(server, concurrency=6).generate(None, EXAMPLES, GREEDY, stop)
    num_asked = len(server.posts)
    time.sleep(0.8)
    assert len(server.posts) <= num_asked + 5  # those that had not begun their first try
    settled = len(server.posts)
    time.sleep(0.6)
    assert len(server.posts) == settled


def dies_after(server: LocalServer, count: int) -> None:
    """From then on the server resets every connection."""
    answered = [0]

    def rule(_: Any) -> Fault | None:
        answered[0] += 1
        return Fault(resets=True) if answered[0] > count else None

    server.rule = rule


def test_nothing_is_asked_twice_after_a_restart(server: LocalServer, tmp_path: Path) -> None:
    """A server dies after some answers; a new engine on the same log asks for the rest only, with equal results."""
    log = tmp_path / "run" / "answers.jsonl"
    dies_after(server, 4)
    first = new_engine(server, concurrency=1, retries=1, log=str(log))
    with pytest.raises(GenerationError, match=r"'e4'(.|\n)*answers are stored if"):
        ask(first)
    first.release()
    assert log.stat().st_mode & 0o777 == 0o600
    server.rule = lambda _: None
    before = len(server.posts)
    second = new_engine(server, log=str(log))
    done: list[int] = []
    said = second.generate(None, EXAMPLES, GREEDY, done.append)
    assert [completion.text for completion in said] == TEXTS
    assert done == [1] * 6
    asked = {seen.body["messages"][0]["content"] for seen in server.posts[before:]}
    assert asked == {example.prompt for example in EXAMPLES[4:]}
    assert ask(second) == said
    assert len(server.posts) == before + 2
    second.answer_log = None  # as a confirmation asks, which rests on nothing that was kept
    assert ask(second) == said
    assert len(server.posts) == before + 8


def test_a_prompt_too_long_is_named_and_can_be_left_out(server: LocalServer) -> None:
    """The error carries its id; asked again without it, and without a log, only the rest is asked of the server."""
    too_long = Fault(400, {"error": {"message": "This model's maximum context length is 9 tokens."}})
    server.rule = lambda body: too_long if "number 4" in body["messages"][0]["content"] else None
    engine = new_engine(server, concurrency=1)
    with pytest.raises(GenerationError) as caught:
        ask(engine)
    assert caught.value.example == "e4"
    others = [example for example in EXAMPLES if example.id != "e4"]
    assert [completion.text for completion in ask(engine, others)] == TEXTS[:4] + TEXTS[5:]
    assert len(server.posts) == 6
    ask(engine, others)  # a call that went well leaves nothing behind
    assert len(server.posts) == 11
    with pytest.raises(GenerationError) as caught:
        new_engine(server, retries=0, model="none").generate(None, EXAMPLES[:1], GREEDY, lambda _: None)
    assert caught.value.example is None  # any other error is not about one prompt


def test_answers_under_way_are_kept_when_another_fails(server: LocalServer, tmp_path: Path) -> None:
    """A prompt that is refused ends the run; what was being answered meanwhile is not lost."""
    log = tmp_path / "answers.jsonl"

    def rule(body: Any) -> Fault | None:
        if "number 0" in body["messages"][0]["content"]:
            return Fault(400, {"error": {"message": "no"}}, delay=0.1)
        server._closing.wait(0.4)
        return None

    server.rule = rule
    engine = new_engine(server, concurrency=6, log=str(log))
    with pytest.raises(GenerationError, match="'e0'"):
        ask(engine)
    engine.release()
    kept = AnswerLog(log)
    # the stand-in decides one request at a time: at least one was under way with the one that failed
    assert 1 <= len(kept) <= 5
    kept.close()


def test_what_is_kept_is_kept_for_the_same_question_only(server: LocalServer, tmp_path: Path) -> None:
    """Another sampling, other weights under the same name, another server: asked again."""
    base = Checkpoint(model_directory())
    options: dict[str, Any] = {"log": str(tmp_path / "answers.jsonl"), "api": "completions"}

    def num_asked(variant: Variant, seed: int = 0, **more: Any) -> int:
        before = len(server.posts)
        engine = new_engine(server, **options | more)
        sampling = GREEDY.model_copy(update={"temperature": 0.5, "seed": seed})
        ask(engine, EXAMPLES[:2], sampling, variant)
        engine.release()
        return len(server.posts) - before

    assert num_asked(Variant(base)) == 2
    assert num_asked(Variant(base)) == 0
    assert num_asked(Variant(base, base, lam=0.4)) == 2
    assert num_asked(Variant(base), seed=1) == 2
    assert num_asked(Variant(base), url=server.url.replace("127.0.0.1", "localhost")) == 2
    assert num_asked(Variant(base), extra={"top_p": 0.5}) == 2
    assert num_asked(Variant(base, base, lam=0.4)) == 0


def test_a_torn_last_line_is_cut(tmp_path: Path) -> None:
    """At whatever byte a write was cut off, the whole lines before are read, and writing continues after them."""
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path)
    log.add("a", ["kite \u00e9", 3, True])
    whole = path.read_bytes()
    log.add("b", ["two\nlines\r\u2028", 1, False])
    both = path.read_bytes()
    log.close()
    log.add("c", ["after the end", 0, True])
    assert path.read_bytes() == both
    for cut in range(len(whole), len(both)):
        path.write_bytes(both[:cut])
        torn = AnswerLog(path)
        assert (len(torn), torn.get("b")) == (1, None), cut
        torn.add("b", ["two\nlines\r\u2028", 1, False])
        torn.close()
        assert path.read_bytes() == both
    again = AnswerLog(path)
    assert again.get("a") == ["kite \u00e9", 3, True]
    assert again.get("b") == ["two\nlines\r\u2028", 1, False]


def test_a_damaged_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    """It is named, and not passed over; the file stays as it is."""
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path)
    for key in "abc":
        log.add(key, f"answer {key}")
    log.close()
    whole = path.read_bytes()
    older = b'{"key":"a","answer":1}\n{"key":"b"\n{"key":"c","answer":3}\n'
    for content in (older, whole.replace(b"answer b", b"changed!")):
        path.write_bytes(content)
        with pytest.raises(DataError, match="line 2"):
            AnswerLog(path)
        assert path.read_bytes() == content


def test_a_log_has_one_writer(tmp_path: Path) -> None:
    """A second run on the same file is reported, until the first lets go."""
    path = tmp_path / "answers.jsonl"
    first = AnswerLog(path)
    with pytest.raises(GenerationError, match="being written by another run"):
        AnswerLog(path)
    first.close()
    AnswerLog(path).close()


def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept before stays readable, whatever part of the line was written."""
    path = tmp_path / "answers.jsonl"
    log = AnswerLog(path)
    log.add("a", 1)
    write = os.write

    def full(descriptor: int, data: Any) -> int:
        if len(data) > 5:
            return write(descriptor, data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("backmerge.generation.cache.os.write", full)
    with pytest.raises(GenerationError, match=r"No space left on device(.|\n)*free some space"):
        log.add("b", 2)
    monkeypatch.undo()
    again = AnswerLog(path)
    assert (again.get("a"), again.get("b")) == (1, None)
    with pytest.raises(GenerationError, match="cannot be stored"):
        AnswerLog(tmp_path / "answers.jsonl" / "below" / "a file")


def test_vllm_gets_the_base_before_the_merges(server: LocalServer) -> None:
    """No request for a LoRA is made until the base's are answered: vLLM on CPUs would mix them up in a batch."""
    base = Checkpoint(model_directory())
    server.models, server.seconds = ("lora-0", "lora-0.4", "lora-0.8"), 0.02
    variants = [Variant(base, base, lam=0.4), Variant(base), Variant(base, base, lam=0.8)]
    for kind, separates in (("vllm", True), ("openai", False)):
        start = len(server.posts)
        engine = new_engine(server, model="lora-{lam}", server=kind, concurrency=12, api="completions")
        said = dict(engine.generate_many([Request(v, EXAMPLES, GREEDY) for v in variants], lambda _: None))
        names = [seen.body["model"] for seen in server.posts[start:]]
        assert (names[:6] == ["lora-0"] * 6) == separates
        assert [[c.example for c in said[i]] for i in range(3)] == [[e.id for e in EXAMPLES]] * 3
