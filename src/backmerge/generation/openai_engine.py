"""Get answers from a server with OpenAI's protocol: vLLM, `transformers serve`, llama.cpp, OpenAI."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from backmerge import __version__
from backmerge.errors import ConfigError, GenerationError
from backmerge.generation.cache import AnswerLog
from backmerge.generation.http_client import RefusedError, ServerClient, as_answered
from backmerge.generation.protocol import EngineSettings, Generator, LogLikelihood, Request, Sampling, thinking_identity
from backmerge.generation.server_facts import Server, server_facts
from backmerge.generation.server_options import served_name, server_options
from backmerge.generation.server_prompts import Prompt, PromptWriter
from backmerge.generation.server_protocol import Answer, read_answer, read_likelihood, sampling_fields, with_extra
from backmerge.generation.thoughts import Reply, separated
from backmerge.merging.recipe import Variant
from backmerge.progress import bar_of
from backmerge.records import Completion, Example
from backmerge.runs import key_of

NEEDS = "a server, as --engine-option url=http://localhost:8000/v1"

PATHS = {"chat": "/chat/completions", "completions": "/completions"}
TOO_LONG = re.compile(
    r"context[ _-](length|size|window)|maximum context|max_model_len|longer than the model|exceeds? the model"
    r"|(prompt|input|request) (is )?too (long|large)",
    re.IGNORECASE,
)
Asking = tuple[Variant | None, Sequence[Example], Sampling]


class Question(NamedTuple):
    """One request.

    Attributes:
        about: What it is about, for messages.
        example: The prompt's id, if it is a prompt.
        path: Path of the API.
        payload: The request's fields.
        read: Turns a reply's body into plain data.
        key: Key under which the answer is stored.
    """

    about: str
    example: str | None
    path: str
    payload: Mapping[str, Any]
    read: Callable[[Any], Any]
    key: str


class Place(NamedTuple):
    """The place of an answer: its request, example and sample."""

    request: int
    example: int
    sample: int


class OpenAIEngine(Generator):
    """Ask a server that already has the weights: the base, and the merged models as LoRA modules or separate models.

    Each answer is a separate request, even if one prompt has several: some servers ignore `n`, and tokens are counted
    by request. Answers are stored in the file `log`, if there is one, by server, request and the variant's weights, and
    are not requested again.

    Args:
        settings: Its `options` are those of `ServerOptions`; device, dtype and batch size are up to the server.

    Attributes:
        log: The option of that name; may be set to another file, or to `None` to request everything again.
        is_served: True: no weights are passed to this engine.

    Raises:
        ConfigError: an option is unknown or wrong, or the environment variable for the key is not set.
    """

    is_served = gives_likelihoods = True

    def __init__(self, settings: EngineSettings) -> None:
        if settings.device != "auto" or settings.dtype != "auto":
            raise ConfigError(
                "the engine 'openai' cannot choose device and dtype: they are up to the server",
                remedy="leave both at 'auto', and start the server with the ones that you want.",
            )
        self.options = server_options(settings.options)
        self.answer_log = self.options.log
        self._key = _key(self.options.api_key_env)
        self._prompts = PromptWriter(self.options, thinking=settings.thinking)
        self._settings = settings
        self._client: ServerClient | None = None
        self._kept: AnswerLog | None = None
        self._server: Server | None = None
        self._limit_field = "max_tokens"
        self._served: dict[str, str] = {}
        # without a log: answers of a call that failed, for the next call, which may omit a prompt
        self._unfinished: dict[str, Any] = {}

    @property
    def identity(self) -> dict[str, str]:
        """Return what completions depend on apart from weights, prompt and sampling, if the server reports it.

        The address is included, since two servers may have different weights, dtypes or quantisations under one name.
        How a server batches requests, which affects the rounding of sums, is unknown.

        Raises:
            GenerationError: the server does not answer.
        """
        server, options = self._facts(), self.options
        return {
            "engine": "openai",
            "backmerge": __version__,
            "url": options.url,
            "server": server.kind,
            "version": server.version,
            "api": options.api,
            "model": options.model or "",
            "models": json.dumps(dict(options.models), sort_keys=True),
            "extra": json.dumps(dict(options.extra), sort_keys=True),
            **thinking_identity(self._settings),
        }

    def generate(
        self,
        variant: Variant | None,
        examples: Sequence[Example],
        sampling: Sampling,
        advance: Callable[[int], None],
    ) -> list[Completion]:
        """Return each example's completions, in order; without a variant, those of the model in the option `model`.

        Raises:
            GenerationError: the server cannot be reached, refuses a prompt, or replies with something other than an
                answer.
        """
        ((_, completions),) = self._answered([(variant, examples, sampling)], advance)
        return completions

    def generate_many(
        self, requests: Sequence[Request], advance: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Completion]]]:
        """Send all prompts of all requests together; yield each request's place and completions as soon as it is done.

        Raises:
            GenerationError: see `generate`.
        """
        yield from self._answered(requests, advance)

    def log_likelihoods(
        self, variant: Variant | None, pairs: Sequence[tuple[str, str]], advance: Callable[[int], None]
    ) -> list[LogLikelihood]:
        """Return how likely each continuation is after its context; neither gets a chat template.

        It uses the completions API with `echo` and `logprobs`, whichever API is used for answers. vLLM's server
        supports them (on a CPU, 0.32 crashes if it was started with `--enable-lora`); OpenAI no longer does, and
        llama.cpp and `transformers serve` do not.

        Raises:
            GenerationError: the server does not return log-probabilities of prompts, or has no room for one.
        """
        model, limit = self._model(variant)
        questions = []
        for place, (context, continuation) in enumerate(pairs):
            # one more token is requested, since not every server accepts 0, and it must fit as well
            ids, count = self._prompts.continuation(variant, context, continuation, limit and limit - 1)
            fields = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "echo": True, "logprobs": 1}
            read = partial(_read_likelihood, before=len(ids) - count, count=count)
            payload = {"model": model, **fields}
            key = self._key_of(variant, "completions", payload, 0)
            about = f"continuation {place}"
            questions.append(Question(about, None, PATHS["completions"], payload, read, key))
        found: dict[int, LogLikelihood] = {}
        for place, values in self._replies(questions):
            found[place] = LogLikelihood(*values)
            advance(1)
        return [found[place] for place in range(len(pairs))]

    def release(self) -> None:
        """Close the connections and the log; the next call opens them again."""
        if self._client is not None:
            self._client.close()
        if self._kept is not None:
            self._kept.close()
        self._client = self._kept = None

    def _answered(
        self, requests: Sequence[Asking], advance: Callable[[int], None]
    ) -> Iterator[tuple[int, list[Completion]]]:
        places: list[Place] = []
        prompts: list[Prompt] = []
        questions: list[Question] = []
        for number, (variant, examples, sampling) in enumerate(requests):
            if not examples:
                yield number, []
                continue
            model, limit = self._model(variant)
            for index, example in enumerate(examples):
                prompt = self._prompts.prompt(variant, example, self._facts().kind, limit)
                for sample in range(sampling.num_samples):
                    places.append(Place(number, index, sample))
                    prompts.append(prompt)
                    questions.append(self._asked(variant, example, model, prompt, sampling, sample))
        by_request = Counter(place.request for place in places)
        by_example = Counter((place.request, place.example) for place in places)
        done: dict[Place, Completion] = {}
        shown = bar_of(advance)
        shown.count()
        wave_of = [self._wave(requests[place.request][0]) for place in places]
        for i, values in self._replies(questions, wave_of):
            place = places[i]
            _, examples, sampling = requests[place.request]
            answer = Answer(*values)
            done[place] = _completion(examples[place.example], prompts[i], place.sample, answer, sampling)
            shown.count(written=done[place].num_tokens)
            by_example[place.request, place.example] -= 1
            if by_example[place.request, place.example] == 0:
                shown(1)
            by_request[place.request] -= 1
            if by_request[place.request] == 0:
                mine = sorted(other for other in done if other.request == place.request)
                yield place.request, [done.pop(other) for other in mine]

    def _asked(
        self, variant: Variant | None, example: Example, model: str, prompt: Prompt, sampling: Sampling, sample: int
    ) -> Question:
        options, kind = self.options, self._facts().kind
        if prompt.room is not None:  # vLLM refuses a limit above the context; other servers stop there
            sampling = sampling.model_copy(update={"max_new_tokens": min(sampling.max_new_tokens, prompt.room)})
        drawn = sampling_fields(
            sampling,
            kind,
            example.id,
            sample,
            is_chat=options.api == "chat",
            end=prompt.end,
            extra=options.extra,
            thinking=self._settings.thinking,
        )
        payload = {"model": model, **with_extra({**prompt.fields, **drawn}, options.extra)}
        key = self._key_of(variant, options.api, payload, sample)
        return Question(f"prompt '{example.id}'", example.id, PATHS[options.api], payload, _read_answer, key)

    def _key_of(self, variant: Variant | None, api: str, payload: Mapping[str, Any], sample: int) -> str:
        """Return the key under which an answer is stored: a name on a server may mean other weights tomorrow."""
        weights = None if variant is None else variant.identity
        return key_of(self.options.url, api, payload, weights, sample)

    def _model(self, variant: Variant | None) -> tuple[str, int | None]:
        """Return the variant's name on the server, and its context in tokens if the server reports it.

        Raises:
            GenerationError: another variant already has that name: one of the two is not what the server has.
        """
        model = served_name(self.options, variant)
        if variant is not None:
            identity = key_of(variant.identity)
            if self._served.setdefault(model, identity) != identity:
                raise GenerationError(
                    f"two models with different weights are both called '{model}' on the server at {self.options.url}",
                    remedy="use {lam}, {method} or {name} in 'model', or use the option 'models'.",
                )
        return model, self._facts().limits.get(model)

    def _wave(self, variant: Variant | None) -> int:
        """Return a number; requests with the same number may be in progress together.

        vLLM on CPUs, at least up to 0.32, adds a LoRA's delta to other requests in the same batch that should have none
        (its pull requests 48421 and 49656): so the base is finished before any merge is asked.
        """
        return int(self._facts().kind == "vllm" and variant is not None and variant.tuned is not None)

    def _replies(
        self, questions: Sequence[Question], wave_of: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield each question's place and the result of reading its reply; stored ones first, then wave by wave."""
        log = self._opened_log()
        new: dict[int, list[int]] = {}
        for i, question in enumerate(questions):
            kept = self._unfinished.get(question.key) if log is None else log.get(question.key)
            if kept is None:
                new.setdefault(wave_of[i] if wave_of else 0, []).append(i)
            else:
                yield i, kept

        def ask(i: int, stop: threading.Event) -> Any:
            values = self._ask(questions[i], stop)
            if log is None:
                self._unfinished[questions[i].key] = values
            else:
                log.add(questions[i].key, values)
            return values

        for wave in sorted(new):
            for place, values in as_answered(new[wave], ask, self.options.concurrency):
                yield new[wave][place], values
        self._unfinished.clear()

    def _ask(self, question: Question, stop: threading.Event) -> Any:
        client = self._opened_client()
        payload = self._respelt(question.payload)
        try:
            try:
                return client.ask(question.path, payload, question.read, stop)
            except RefusedError as error:
                if "max_completion_tokens" not in error.said or "max_tokens" not in payload:
                    raise
                self._limit_field = "max_completion_tokens"  # the name for OpenAI's newer models
                return client.ask(question.path, self._respelt(question.payload), question.read, stop)
        except RefusedError as error:
            raise self._explained(question, error) from error
        except GenerationError as error:
            raise GenerationError(f"{question.about}: {error.message}", remedy=error.remedy) from error

    def _respelt(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        return {self._limit_field if key == "max_tokens" else key: value for key, value in payload.items()}

    def _explained(self, question: Question, error: RefusedError) -> GenerationError:
        """Explain a refusal by the options that may have caused it."""
        model, url = question.payload["model"], self.options.url
        if error.status in (400, 413, 422) and TOO_LONG.search(error.said):
            return GenerationError(
                f"{question.about} with its answer does not fit into the context of '{model}' on the server at {url}: "
                f"{error.said}",
                remedy="lower max_new_tokens, remove the prompt, or serve the model with a longer context.",
                example=question.example,
            )
        if error.status == 404:
            listed = ", ".join(self._facts().models[:10])
            return GenerationError(
                f"the server at {url} has no model '{model}', or no path {question.path} (HTTP 404: {error.said})",
                remedy=f"it lists: {listed}; name one with the option 'model' or 'models'."
                if listed
                else "check the options 'model' and 'url', which must end with /v1.",
            )
        remedy = error.remedy
        if remedy is None and isinstance(question.payload.get("prompt"), list):
            remedy = "if it does not accept token ids, set the option 'prompt_as: text'; `extra` changes other fields."
        return GenerationError(
            f"{question.about}: {error.message}",
            remedy=remedy or "the options 'server' and 'extra' decide which fields are sent.",
        )

    def _facts(self) -> Server:
        if self._server is None:
            self._server = server_facts(self._opened_client(), self.options)
        return self._server

    def _opened_client(self) -> ServerClient:
        if self._client is None:
            options = self.options
            self._client = ServerClient(
                options.url,
                self._key,
                timeout_seconds=options.timeout_seconds,
                retries=options.retries,
                concurrency=options.concurrency,
            )
        return self._client

    def _opened_log(self) -> AnswerLog | None:
        if self._kept is not None and self._kept.path != self.answer_log:
            self._kept.close()
            self._kept = None
        if self._kept is None and self.answer_log is not None:
            self._kept = AnswerLog(self.answer_log)
        return self._kept


def _key(variable: str | None) -> str | None:
    """Return the key in an environment variable.

    Raises:
        ConfigError: there is none, or it has characters that no key has; the message does not repeat it.
    """
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"the environment variable {variable}, which should contain the server's key, is not set",
            remedy=f"export {variable}=..., or remove the option 'api_key_env' if the server needs no key.",
        )
    if not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"the environment variable {variable} is not a key: it has characters that are not allowed in a header",
            remedy="copy the key again, on one line.",
        )
    return key


def _read_answer(body: Any) -> list[Any]:
    return list(read_answer(body))


def _read_likelihood(body: Any, before: int, count: int) -> list[Any]:
    return list(read_likelihood(body, before, count))


def _completion(example: Example, prompt: Prompt, sample: int, answer: Answer, sampling: Sampling) -> Completion:
    text, count, finished, thought = answer
    ends = [place for place in (text.find(stop) for stop in sampling.stop) if place >= 0]
    if count is None:
        count = prompt.num_tokens(text)
    if ends:  # `transformers serve` keeps the stop text at the end
        text, finished = text[: min(ends)], True
    seen = "" if prompt.is_conversation else prompt.text.removesuffix(example.prefill)
    reply = separated(example.prefill + text, seen) if not thought else Reply(thought, example.prefill + text)
    return Completion(example.id, prompt.text, reply.answer, count, finished, sample, reply.thought)
