"""The engine asks a server as its options say, and what comes back is what the server said, in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.errors import ConfigError, GenerationError
from backmerge.generation.chat import load_tokenizer
from backmerge.generation.openai_engine import OpenAIEngine
from backmerge.generation.protocol import EngineSettings, Request, Sampling
from backmerge.generation.server_options import served_name, server_options
from backmerge.generation.server_prompts import PromptWriter
from backmerge.merging.recipe import Variant
from backmerge.records import Example, Message
from generation.local_server import Fault, LocalServer, running_server, say
from generation.served import EXAMPLES, GREEDY, ask, messages, new_engine
from generation.tiny import byte_tokenizer

RAW = Example("raw", (Message("user", "Once upon"),), is_raw=True)
SYSTEM = Example("system", (Message("system", "Be brief."), Message("user", "Where is the kite?")))


@pytest.fixture
def server() -> Iterator[LocalServer]:
    """A server without faults."""
    with running_server() as running:
        yield running


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    """The embedded model, for its tokenizer; the stand-in has no weights."""
    return Checkpoint(model_directory())


def test_answers_come_in_the_order_of_the_examples(server: LocalServer) -> None:
    """Whatever comes back first: completions stand in order, and `advance` is told of each example once."""
    order = {messages(example)[0]["content"]: i for i, example in enumerate(EXAMPLES)}
    arrived: list[int] = []

    def slow_first(asked: Any) -> str:
        place = order[asked[0]["content"]]
        server._closing.wait(0.04 * (len(EXAMPLES) - place))
        arrived.append(place)
        return say(asked)

    server.answer = slow_first
    done: list[int] = []
    said = new_engine(server, concurrency=6).generate(None, EXAMPLES, GREEDY, done.append)
    assert arrived != sorted(arrived)
    assert [completion.example for completion in said] == [example.id for example in EXAMPLES]
    assert [completion.text for completion in said] == [say(messages(example)) for example in EXAMPLES]
    assert done == [1] * len(EXAMPLES)
    assert ask(new_engine(server), []) == []


def test_chat_request_contains_messages_and_settings(server: LocalServer) -> None:
    """Messages as they are, greedy settings, no seed, nothing beyond OpenAI's fields; the prompt is their JSON."""
    (said,) = ask(new_engine(server), [SYSTEM])
    (seen,) = server.posts
    assert seen.path == "/v1/chat/completions"
    assert seen.body == {
        "model": "model",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the kite?"}],
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 24,
    }
    assert json.loads(said.prompt) == seen.body["messages"]
    assert (said.num_tokens, said.finished, said.sample) == (4, True, 0)
    assert "authorization" not in seen.headers


def test_a_completions_request_holds_the_tokens_of_the_rendered_prompt(server: LocalServer, base: Checkpoint) -> None:
    """Token ids with one beginning of sequence; the recorded prompt is the text that the template gave."""
    engine = new_engine(server, api="completions")
    said = ask(engine, [EXAMPLES[0], SYSTEM], variant=Variant(base))
    tokenizer = load_tokenizer(base.directory)
    for completion, seen in zip(said, sorted(server.posts, key=lambda s: len(s.body["prompt"])), strict=True):
        assert seen.path == "/v1/completions"
        assert seen.body["prompt"].count(tokenizer.bos_token_id) == 1
        assert tokenizer.decode(seen.body["prompt"]) == completion.prompt
        assert completion.text == say(seen.body["prompt"])
    assert said[0].prompt == "<s><|user|>Where is kite number 0?<|assistant|>"


def test_text_is_sent_so_that_it_becomes_the_same_tokens(server: LocalServer, base: Checkpoint) -> None:
    """Where the server's tokenizer puts BOS in front itself, the text goes without; the record shows it whole."""
    tokenizer = load_tokenizer(base.directory)
    adds_bos = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    engine = new_engine(server, api="completions", prompt_as="text")
    (said,) = ask(engine, EXAMPLES[:1], variant=Variant(base))
    sent = server.posts[0].body["prompt"]
    assert sent.startswith("<s>") != adds_bos
    assert tokenizer(sent)["input_ids"] == tokenizer(said.prompt, add_special_tokens=False)["input_ids"]


def test_text_loses_the_bos_that_the_server_adds() -> None:
    """A tokenizer that puts BOS in front, as Llama's does, gets the text without the template's own."""
    tokenizer = byte_tokenizer(("<s>", "</s>"), "{{ bos_token }}{{ messages[0]['content'] }}", bos="<s>", eos="</s>")
    writer = PromptWriter(server_options({"api": "completions", "prompt_as": "text"}))
    for text, sent in (("<s>hello", "hello"), ("hello", "hello")):
        ids = tokenizer("hello")["input_ids"]
        assert ids.count(tokenizer.bos_token_id) == 1
        assert writer._as_text(tokenizer, EXAMPLES[0], text, ids) == sent


def test_text_that_would_become_other_tokens_is_refused(
    server: LocalServer, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer that adds something else than BOS cannot be fed by text; nothing is asked."""
    engine = new_engine(server, api="completions", prompt_as="text")
    tokenizer, end = engine._prompts._loaded(Variant(base)) or (None, None)

    class Adding:
        bos_token = tokenizer.bos_token
        chat_template = tokenizer.chat_template

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [*ids, 2] if add_special_tokens else ids}

        def apply_chat_template(self, *args: Any, **kwargs: Any) -> str:
            return str(tokenizer.apply_chat_template(*args, **kwargs))

    monkeypatch.setattr(engine._prompts, "_loaded", lambda _: (Adding(), end))
    with pytest.raises(GenerationError, match=r"'e0' cannot be sent as text(.|\n)*prompt_as: tokens"):
        ask(engine, EXAMPLES, variant=Variant(base))
    assert not server.posts


def test_raw_prompts_go_by_completions_as_they_are(server: LocalServer) -> None:
    """Without a tokenizer at hand a raw prompt is sent as text; the chat API, which would wrap it, is not asked."""
    (said,) = ask(new_engine(server, api="completions"), [RAW])
    assert server.posts[0].body["prompt"] == said.prompt == "Once upon"
    with pytest.raises(GenerationError, match=r"'raw' is already the complete text(.|\n)*api: completions"):
        ask(new_engine(server), [RAW])
    with pytest.raises(GenerationError, match=r"'e0' cannot be rendered(.|\n)*'tokenizer'"):
        ask(new_engine(server, api="completions"))


def test_a_tokenizer_may_be_named(server: LocalServer, base: Checkpoint) -> None:
    """Where there is no variant, the option's tokenizer renders, and raw prompts become tokens with it."""
    engine = new_engine(server, api="completions", tokenizer=str(base.directory))
    rendered, raw = ask(engine, [EXAMPLES[0], RAW])
    assert rendered.prompt.startswith("<s><|user|>")
    assert raw.prompt == "Once upon"
    assert all(isinstance(seen.body["prompt"], list) for seen in server.posts)


def test_a_prefilled_answer_goes_on(server: LocalServer, base: Checkpoint) -> None:
    """By completions it is part of the prompt, by vLLM's chat API its own fields; the text holds it once."""
    example = Example("p", (Message("user", "How?"),), prefill="Sure, ")
    (said,) = ask(new_engine(server, api="completions"), [example], variant=Variant(base))
    assert said.prompt.endswith("<|assistant|>Sure, ")
    assert said.text == "Sure, " + say(server.posts[0].body["prompt"])
    (chatted,) = ask(new_engine(server, server="vllm"), [example])
    body = server.posts[1].body
    assert body["messages"][-1] == {"role": "assistant", "content": "Sure, "}
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert chatted.text == "Sure, " + say(body["messages"])
    for kind in ("openai", "transformers"):
        with pytest.raises(GenerationError, match=r"'p' contains the answer's beginning(.|\n)*api: completions"):
            ask(new_engine(server, server=kind), [example])


NEUTRAL = Sampling(max_new_tokens=7, temperature=0.5, top_p=0.9, stop=("END",))
DRAWN = NEUTRAL.model_copy(update={"top_k": 5, "repetition_penalty": 1.5})


@pytest.mark.parametrize(
    ("kind", "sampling", "more"),
    [
        ("openai", NEUTRAL, {}),
        ("openai", DRAWN, {"top_k": 5, "repetition_penalty": 1.5}),
        ("vllm", NEUTRAL, {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}),
        ("vllm", DRAWN, {"top_k": 5, "min_p": 0.0, "repetition_penalty": 1.5}),
        ("llama.cpp", NEUTRAL, {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}),
        ("llama.cpp", DRAWN, {"top_k": 5, "min_p": 0.0, "repeat_penalty": 1.5}),
    ],
)
def test_sampling_is_spelt_as_the_server_takes_it(
    server: LocalServer, kind: str, sampling: Sampling, more: dict[str, Any]
) -> None:
    """Neutral settings are sent where the server would take the model's own instead, and nowhere else."""
    ask(new_engine(server, server=kind), EXAMPLES[:1], sampling)
    body = server.posts[0].body
    own = {"model", "messages", "seed", "chat_template_kwargs"}
    assert {key: value for key, value in body.items() if key not in own} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 7,
        "stop": ["END"],
        **more,
    }
    # the date in a prompt must not change overnight
    assert body.get("chat_template_kwargs") == (None if kind == "openai" else {"date_string": "26 Jul 2024"})


def test_transformers_serve_is_asked_greedily_only(server: LocalServer) -> None:
    """Its penalty goes by another name, and what it might silently not draw is refused."""
    engine = new_engine(server, server="transformers")
    ask(engine, EXAMPLES[:1], Sampling(max_new_tokens=7, repetition_penalty=1.5))
    assert server.posts[0].body["frequency_penalty"] == 0.5
    with pytest.raises(GenerationError, match="do_sample"):
        ask(engine, EXAMPLES[:1], NEUTRAL)
    whole = new_engine(server, server="transformers", extra={"generation_config": "{}"})
    assert ask(whole, EXAMPLES[:1], NEUTRAL)


def test_vllm_gets_the_end_of_turn_token(server: LocalServer, base: Checkpoint) -> None:
    """The token that the template ends answers by is among the stops, as in the other engines."""
    ask(new_engine(server, server="vllm", api="completions"), EXAMPLES[:1], variant=Variant(base))
    assert server.posts[0].body["stop_token_ids"] == [load_tokenizer(base.directory).eos_token_id]


def test_each_answer_has_its_own_seed(server: LocalServer) -> None:
    """Samples differ in their seed, prompts too; the same run sends the same seeds, another seed other ones."""

    def seeds(seed: int) -> list[int]:
        hot = Sampling(max_new_tokens=24, temperature=1.0, num_samples=3, seed=seed)
        before = len(server.posts)
        done: list[int] = []
        said = new_engine(server, concurrency=1).generate(None, EXAMPLES[:2], hot, done.append)
        assert [(c.example, c.sample) for c in said] == [(e, s) for e in ("e0", "e1") for s in range(3)]
        assert done == [1, 1]
        return [seen.body["seed"] for seen in server.posts[before:]]

    first = seeds(0)
    assert len(set(first)) == 6
    assert seeds(0) == first
    assert not set(seeds(1)) & set(first)
    assert all(0 <= seed < 2**31 for seed in first)


def test_stop_texts_end_an_answer_whatever_the_server_does(server: LocalServer) -> None:
    """Where a server leaves the stop text in, it is cut off, and the answer is finished."""
    server.choice = {"message": {"role": "assistant", "content": "one, two, three"}, "finish_reason": "length"}
    (said,) = ask(new_engine(server), EXAMPLES[:1], Sampling(stop=("three", ", t")))
    assert (said.text, said.finished) == ("one", True)


@pytest.mark.parametrize(
    ("choice", "text", "finished"),
    [
        ({"message": {"content": ""}, "finish_reason": "stop"}, "", True),
        ({"message": {"content": "a b"}, "finish_reason": "length"}, "a b", False),
        ({"message": {"content": "a b"}, "finish_reason": "content_filter"}, "a b", False),
        ({"message": {"content": None}, "finish_reason": "content_filter"}, "", False),
        ({"message": {"content": None, "reasoning_content": "hm"}, "finish_reason": "length"}, "", False),
        ({"message": {"content": None, "refusal": "I can't."}, "finish_reason": "stop"}, "I can't.", True),
        ({"message": {"content": "half \ud83d of it"}, "finish_reason": "stop"}, "half \ufffd of it", True),
        ({"message": {"content": " \n a\t"}, "finish_reason": "stop"}, " \n a\t", True),
    ],
)
def test_what_counts_as_an_answer(server: LocalServer, choice: dict[str, Any], text: str, finished: bool) -> None:
    """Empty, cut, filtered and refused ones are answers, told apart by `finished`; nothing is stripped."""
    server.choice = choice
    (said,) = ask(new_engine(server), EXAMPLES[:1])
    assert (said.text, said.finished) == (text, finished)
    assert len(server.posts) == 1


def test_tokens_are_counted_here_where_the_server_does_not(server: LocalServer, base: Checkpoint) -> None:
    """By the tokenizer if there is one; 0 says that nobody can."""
    server.reports_usage = False
    (said,) = ask(new_engine(server, api="completions"), EXAMPLES[:1], variant=Variant(base))
    assert said.num_tokens == len(load_tokenizer(base.directory)(said.text, add_special_tokens=False)["input_ids"])
    assert ask(new_engine(server), EXAMPLES[:1])[0].num_tokens == 0


def test_newer_models_limit_by_another_name(server: LocalServer) -> None:
    """A server that asks for max_completion_tokens gets it, and is not asked the other way again."""

    def picky(body: Any) -> Any:
        if "max_tokens" not in body:
            return None
        message = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens'."
        return Fault(400, {"error": {"message": message, "param": "max_tokens", "code": "unsupported_parameter"}})

    server.rule = picky
    assert len(ask(new_engine(server, concurrency=1))) == 6
    assert ["max_tokens" in seen.body for seen in server.posts] == [True] + [False] * 6
    assert server.posts[-1].body["max_completion_tokens"] == 24


def test_extra_fields_go_on_top(server: LocalServer) -> None:
    """A user's fields are sent, and `null` takes one of ours out."""
    ask(new_engine(server, extra={"reasoning_effort": "low", "temperature": None}), EXAMPLES[:1])
    body = server.posts[0].body
    assert body["reasoning_effort"] == "low"
    assert "temperature" not in body


def test_the_kind_of_server_is_asked(server: LocalServer, base: Checkpoint) -> None:
    """Whose models are listed tells it, with version and context; strangers get OpenAI's fields only."""
    for owner, kind, version in (("vllm", "vllm", "0.0.stand-in"), ("llamacpp", "llama.cpp", ""), ("me", "openai", "")):
        server.owner = owner
        identity = new_engine(server, server="auto").identity
        assert (identity["server"], identity["version"]) == (kind, version)
        assert all(isinstance(value, str) for value in identity.values())
    server.owner, server.max_model_len = "vllm", 20
    engine = new_engine(server, server="auto", api="completions")
    (said,) = ask(engine, EXAMPLES[:1], variant=Variant(base))
    body = server.posts[-1].body
    assert body["max_tokens"] == 20 - len(body["prompt"])
    assert said.example == "e0"
    long = Example("too-long", (Message("user", "SECRET " * 30),))
    with pytest.raises(
        GenerationError, match=r"'too-long' has \d+ tokens, but(.|\n)*context on the server is 20 tokens"
    ) as caught:
        ask(engine, [long], variant=Variant(base))
    assert "SECRET" not in str(caught.value)


def test_requests_of_many_variants_share_the_server(server: LocalServer, base: Checkpoint) -> None:
    """Each variant is asked by its name there, all together, and each is done when its own answers are."""
    tuned = Checkpoint(model_directory())
    server.models = ("plain", "lora-0.4", "lora-1")
    server.seconds = 0.05
    engine = new_engine(server, model="lora-{lam}", models={"base": "plain"}, concurrency=64)
    variants = [Variant(base), Variant(base, tuned, lam=0.4), Variant(base, tuned, lam=1.0)]
    done: list[int] = []
    requests = [Request(variant, EXAMPLES, GREEDY) for variant in variants] + [Request(variants[0], (), GREEDY)]
    said = dict(engine.generate_many(requests, done.append))
    assert sorted(said) == [0, 1, 2, 3]
    assert said[3] == []
    assert [c.example for c in said[1]] == [e.id for e in EXAMPLES]
    assert sum(done) == 18
    assert server.most_at_once > 6
    assert sorted({seen.body["model"] for seen in server.posts}) == ["lora-0.4", "lora-1", "plain"]


def test_two_variants_under_one_name_are_refused(server: LocalServer, base: Checkpoint) -> None:
    """One of two models with different weights is not what the server has: it is not measured as the other."""
    engine = new_engine(server)
    ask(engine, variant=Variant(base))
    with pytest.raises(GenerationError, match=r"different weights are both called 'model'(.|\n)*\{lam\}"):
        ask(engine, variant=Variant(base, base, lam=0.4))


@pytest.mark.parametrize(
    ("options", "at", "name"),
    [
        ({"model": "m"}, None, "m"),
        ({"model": "m-{lam}"}, 0.4, "m-0.4"),
        ({"model": "{method}-{lam}-{name}"}, 0.25, "linear-0.25-model"),
        ({"model": "{name}-{lam}"}, "base", "base-0"),
        ({"models": {"base": "b", 0.4: "x"}}, "base", "b"),
        ({"models": {"base": "b", 0.4: "x"}}, 0.4, "x"),
        ({"models": {"0.4": "x", "linear@0.4": "y"}}, 0.4, "y"),
        ({"models": {"tuned": "t"}, "model": "m-{lam}"}, 1.0, "t"),
        ({"models": {"tuned": "t"}, "model": "m-{lam}"}, 0.5, "m-0.5"),
        ({"models": {1: "t"}}, 1.0, "t"),
    ],
)
def test_names_on_the_server(base: Checkpoint, options: dict[str, Any], at: Any, name: str) -> None:
    """By pattern or one by one, for the base, for the tuned model, and for λs; YAML's numbers are names too."""
    variant = None if at is None else Variant(base) if at == "base" else Variant(base, base, lam=at)
    assert served_name(server_options(options), variant) == name


@pytest.mark.parametrize(
    ("options", "at", "message"),
    [
        ({}, None, "needs the name of a model"),
        ({"model": "m-{lam}"}, None, "needs the name of a model"),
        ({"models": {"0.4": "x"}}, 0.5, r"do not name linear at λ=0.5 on the server(.|\n)*'models', as '0.5'"),
        ({"models": {"0.4": "x"}}, "base", "do not name the base"),
        ({"model": "m-{lam}"}, {"mlp": 0.4}, "do not name"),
    ],
)
def test_a_model_without_a_name_is_an_error(base: Checkpoint, options: dict[str, Any], at: Any, message: str) -> None:
    """It says what to name."""
    variant = None if at is None else Variant(base) if at == "base" else Variant(base, base, lam=at)
    with pytest.raises(GenerationError, match=message):
        served_name(server_options(options), variant)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ulr": "http://x/v1"}, "unknown key 'ulr'; did you mean 'url'"),
        ({"url": "localhost:8000"}, "http://"),
        ({"url": "http://user:pa55word@host/v1"}, "api_key_env"),
        ({"url": "http://host/v1?key=pa55word"}, "api_key_env"),
        ({"model": "m-{lambda}"}, "{lambda}"),
        ({"model": "m-{lam"}, "braces"),
        ({"concurrency": 0}, "concurrency"),
        ({"api": "responses"}, "api"),
        ({"extra": {"messages": []}}, "'messages' is set by the engine itself"),
        ({"api_key_env": "BACKMERGE_TEST_NO_SUCH_KEY"}, "BACKMERGE_TEST_NO_SUCH_KEY"),
    ],
)
def test_wrong_options_are_clear_errors(options: dict[str, Any], message: str) -> None:
    """Each names what is wrong, without repeating a password."""
    with pytest.raises(ConfigError) as caught:
        OpenAIEngine(EngineSettings(name="openai", options=options))
    assert message in str(caught.value)
    assert "pa55word" not in f"{caught.value}{caught.value.__cause__}"


def test_device_and_dtype_are_the_servers(server: LocalServer) -> None:
    """What cannot be decided here is refused rather than passed over."""
    for more in ({"device": "cpu"}, {"dtype": "float32"}):
        with pytest.raises(ConfigError, match="cannot choose device and dtype"):
            OpenAIEngine(EngineSettings(name="openai", options={"url": server.url}, **more))


def test_likelihoods_by_echo(server: LocalServer, base: Checkpoint) -> None:
    """Sums over the continuation's tokens of what the server says of them; greedy if each is its place's best."""
    tokenizer = load_tokenizer(base.directory)
    pairs = [("the robot", " is in the hall"), ("the robot ", "is")]

    def logprobs(body: Any) -> None:
        ids = body["prompt"]
        best = [None] + [{"best": -0.5 * i, "chosen": -0.5 * i - (ids[i] % 2)} for i in range(1, len(ids))]
        chosen = [None] + [top["chosen"] for top in best[1:] if top]
        # the token that had to be generated comes last, and counts for nothing
        tokens = {"token_logprobs": [*chosen, -9.0], "top_logprobs": [*best, {"x": -9.0}]}
        server.choice = {"text": "…", "logprobs": tokens}

    server.rule = logprobs
    done: list[int] = []
    engine = new_engine(server, concurrency=1)
    found = engine.log_likelihoods(Variant(base), pairs, done.append)
    assert done == [1, 1]
    for (context, continuation), likelihood, seen in zip(pairs, found, server.posts, strict=True):
        ids = tokenizer(context + continuation)["input_ids"]
        num_before = len(tokenizer(context.rstrip())["input_ids"])
        assert seen.body["prompt"] == ids
        assert (seen.body["echo"], seen.body["logprobs"], seen.body["max_tokens"]) == (True, 1, 1)
        expected = sum(-0.5 * i - ids[i] % 2 for i in range(num_before, len(ids)))
        assert likelihood.total == pytest.approx(expected, abs=1e-12)
        assert likelihood.num_tokens == len(ids) - num_before
        assert likelihood.is_greedy == all(ids[i] % 2 == 0 for i in range(num_before, len(ids)))


def test_a_server_without_echo_has_no_likelihoods(
    server: LocalServer, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply that does not repeat the prompt is an error, not a likelihood of something else."""
    monkeypatch.setattr("backmerge.generation.http_client.FIRST_PAUSE_SECONDS", 0.001)
    with pytest.raises(GenerationError, match="no log-probabilities"):
        new_engine(server).log_likelihoods(Variant(base), [("a", " b")], lambda _: None)


def test_the_engine_is_in_the_table(tmp_path: Path) -> None:
    """`openai` in an experiment file is this engine, which takes no weights."""
    from backmerge.registry import ENGINES, resolve

    engine = resolve(ENGINES, "openai")
    assert engine is OpenAIEngine
    assert engine.is_served
