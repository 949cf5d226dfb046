"""OpenAI's protocol: from an example to a request's fields, and from a reply to an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from backmerge.errors import GenerationError
from backmerge.generation.chat import DATE_STRING
from backmerge.generation.http_client import UnreadableReplyError
from backmerge.generation.protocol import LogLikelihood, Sampling
from backmerge.generation.server_options import ServerKind
from backmerge.records import Example
from backmerge.runs import key_of

# servers that go on with an answer's beginning when a conversation ends with it
CONTINUING = ("vllm", "llama.cpp")


class Answer(NamedTuple):
    """What a server said.

    Attributes:
        num_tokens: `None` where it does not count.
        finished: Whether the model ended before the limit.
        thought: What the server told apart from the answer, as reasoning.
    """

    text: str
    num_tokens: int | None
    finished: bool
    thought: str = ""


def chat_messages(example: Example, kind: ServerKind) -> list[dict[str, str]]:
    """The conversation as the chat API takes it, the answer's given beginning last.

    Raises:
        GenerationError: the example cannot be asked by the chat API of such a server.
    """
    if example.is_raw:
        raise GenerationError(
            f"prompt '{example.id}' is the whole text that the model is to see, and the chat API would wrap it again",
            remedy="set the engine's option 'api: completions'.",
        )
    if example.prefill and kind not in CONTINUING:
        raise GenerationError(
            f"prompt '{example.id}' begins the answer itself, and the chat API of a server of kind '{kind}' does not "
            "go on from there",
            remedy="set the engine's option 'api: completions', or 'server: vllm' if that is what serves.",
        )
    turns = [{"role": message.role, "content": message.content} for message in example.messages]
    return [*turns, {"role": "assistant", "content": example.prefill}] if example.prefill else turns


def messages_text(messages: list[dict[str, str]]) -> str:
    """What is recorded as the prompt where the server renders it: the messages as compact JSON."""
    return json.dumps(messages, ensure_ascii=False, separators=(",", ":"))


def sampling_fields(
    sampling: Sampling,
    kind: ServerKind,
    example_id: str,
    sample: int,
    *,
    is_chat: bool,
    end: int | None = None,
    extra: Mapping[str, Any] = MappingProxyType({}),
    thinking: bool | None = None,
) -> dict[str, Any]:
    """Fields that say how an answer is drawn.

    What a server would otherwise take from its own settings or the model's generation config is sent even where it
    is neutral, if such a server takes it: vLLM applies a model's own repetition penalty to greedy answers too, and
    llama.cpp draws by `min_p` 0.05. A seed is sent where there is something to draw; each answer has its own, or all
    prompts would be answered by the same throws of the dice.

    Raises:
        GenerationError: a server of this kind cannot draw so.

    Args:
        sampling: What is wanted.
        kind: Of the server.
        example_id: Part of the answer's seed.
        sample: Which of several answers; part of the seed.
        is_chat: Whether the server renders the prompt.
        end: The token that ends a turn by the chat template, for servers that take it.
        extra: The user's own fields, which go on top.
        thinking: Whether a reasoning model is to think, if the server renders the prompt. Servers of open models are
            sent the variables that templates have for it, of which each takes its own; OpenAI's API an effort.
    """
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
    }
    if sampling.temperature > 0:
        fields["seed"] = int(key_of(sampling.seed, example_id, sample), 16) % 2**31
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    match kind:
        case "vllm":
            # -1 rather than 0: older versions know only that for "all"
            fields |= {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": sampling.repetition_penalty}
            if end is not None:
                fields["stop_token_ids"] = [end]
        case "llama.cpp":
            fields |= {"top_k": sampling.top_k, "min_p": 0.0, "repeat_penalty": sampling.repetition_penalty}
        case "transformers":
            if sampling.temperature > 0 and "generation_config" not in extra:
                raise GenerationError(
                    "`transformers serve` draws answers only if the model's own generation config says `do_sample`, "
                    "and never reports it; whatever the temperature, they might be the greedy ones",
                    remedy="set sampling.temperature to 0, or give a whole generation config as JSON text by "
                    "`extra: {generation_config: ...}`.",
                )
            # it takes this for a repetition penalty, less 1
            fields["frequency_penalty"] = sampling.repetition_penalty - 1.0
        case "openai":
            if sampling.top_k:
                fields["top_k"] = sampling.top_k
            if sampling.repetition_penalty != 1.0:
                fields["repetition_penalty"] = sampling.repetition_penalty
    return {**fields, **_template_fields(kind, thinking)} if is_chat else fields


def _template_fields(kind: ServerKind, thinking: bool | None) -> dict[str, Any]:
    """Fields that the server's rendering depends on; see `chat.SWITCHES` for the switches of templates."""
    if kind == "openai":
        return {} if thinking is None else {"reasoning_effort": "medium" if thinking else "none"}
    variables: dict[str, Any] = {"date_string": DATE_STRING}
    if thinking is None:
        return {"chat_template_kwargs": variables}
    effort = {"reasoning_effort": "medium" if thinking else "low"}
    variables |= {"enable_thinking": thinking, "thinking": thinking, **effort}
    # vLLM renders gpt-oss's conversations without a template
    return {"chat_template_kwargs": variables, **(effort if kind == "vllm" else {})}


def with_extra(fields: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with a user's own on top; `None` takes one out."""
    return {key: value for key, value in {**fields, **extra}.items() if value is not None}


def read_answer(body: Any) -> Answer:
    """The answer in a reply of either API.

    An empty answer is one, and so is a content of null with a reason for the end: a model that thinks first may not
    get to answer, or may end after its thought. If the server's filter cut in (`content_filter`), what there is of the
    text counts as the answer, unfinished. A `refusal` without content is the text. Reasoning (`reasoning_content`, or
    `reasoning`, or parts of the content that are thoughts) is kept apart.

    Raises:
        UnreadableReplyError: it is not in there.
    """
    choice = _choice(body)
    reason = choice.get("finish_reason")
    finished = reason not in ("length", "content_filter")
    if "message" in choice:
        message = choice["message"]
        if not isinstance(message, dict):
            raise UnreadableReplyError("its 'message' is not an object")
        text, thought = _content(message)
        if text is None and isinstance(message.get("refusal"), str):
            text = message["refusal"]
        elif text is None and (isinstance(reason, str) or thought):
            text = ""
    else:
        text, thought = choice.get("text"), ""
    if not isinstance(text, str):
        raise UnreadableReplyError(f"its text is {'missing' if text is None else f'a {type(text).__name__}'}")
    return Answer(_encodable(text), _num_tokens(body), finished, _encodable(thought))


def _content(message: Mapping[str, Any]) -> tuple[Any, str]:
    """A message's text as it is there, and its thought."""
    content = message.get("content")
    thoughts = [message.get(name) for name in ("reasoning_content", "reasoning")]
    thought = next((given for given in thoughts if isinstance(given, str) and given), "")
    if not isinstance(content, list):
        return content, thought
    texts = []
    for part in content:  # such as Mistral's
        if not isinstance(part, dict):
            raise UnreadableReplyError("its 'content' is a list of something else than parts")
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") in ("thinking", "reasoning"):
            thought += _thought_of(part)
        else:
            raise UnreadableReplyError("its 'content' has parts that are neither text nor thought")
    return "".join(texts), thought


def _thought_of(part: Mapping[str, Any]) -> str:
    inner = part.get("thinking", part.get("text"))
    if isinstance(inner, list):
        return "".join(str(one.get("text", "")) for one in inner if isinstance(one, dict))
    return inner if isinstance(inner, str) else ""


def read_likelihood(body: Any, num_context: int, num_tokens: int) -> LogLikelihood:
    """A continuation's log-likelihood, from a reply that repeats the prompt with its tokens' log-probabilities.

    Args:
        body: The reply to `echo` with `logprobs: 1`.
        num_context: Tokens before the continuation.
        num_tokens: Of the continuation.

    Raises:
        UnreadableReplyError: it has no log-probabilities of the prompt's tokens.
    """
    logprobs = _choice(body).get("logprobs")
    if not isinstance(logprobs, dict):
        raise UnreadableReplyError("it has no log-probabilities")
    chosen, best = logprobs.get("token_logprobs"), logprobs.get("top_logprobs")
    if not isinstance(chosen, list) or not isinstance(best, list) or len(chosen) != len(best):
        raise UnreadableReplyError("its log-probabilities are not two lists of one length")
    place = slice(num_context, num_context + num_tokens)
    mine, tops = chosen[place], best[place]
    if len(mine) != num_tokens or not all(isinstance(value, int | float) for value in mine):
        raise UnreadableReplyError("it lacks log-probabilities of the prompt's tokens")
    if not all(isinstance(top, dict) and top for top in tops):
        raise UnreadableReplyError("it does not say which tokens are the most likely")
    is_greedy = all(value >= max(top.values()) for value, top in zip(mine, tops, strict=True))
    return LogLikelihood(float(sum(mine)), num_tokens, is_greedy)


def _choice(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise UnreadableReplyError("it is not a JSON object")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise UnreadableReplyError("it reports an error" if body.get("error") else "it has no 'choices'")
    choice: dict[str, Any] = choices[0]
    return choice


def _num_tokens(body: dict[str, Any]) -> int | None:
    usage = body.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count >= 0 else None


def _encodable(text: str) -> str:
    r"""The text without halves of surrogate pairs, which JSON can hold (`\ud800`) and no file."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
