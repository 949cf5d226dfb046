"""OpenAI's protocol: turn an example into a request's fields, and a reply into an answer."""

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

# servers that continue the beginning of an answer at the end of a conversation
CONTINUING = ("vllm", "llama.cpp")


class Answer(NamedTuple):
    """A server's answer.

    Attributes:
        num_tokens: Number of tokens; `None` if the server does not count them.
        finished: Whether the model ended before the limit.
        thought: Reasoning that the server separated from the answer.
    """

    text: str
    num_tokens: int | None
    finished: bool
    thought: str = ""


def chat_messages(example: Example, kind: ServerKind) -> list[dict[str, str]]:
    """Return the conversation in the form of the chat API, with the given beginning of the answer last.

    Raises:
        GenerationError: such a server's chat API does not support the example.
    """
    if example.is_raw:
        raise GenerationError(
            f"prompt '{example.id}' is already the complete text for the model, and the chat API would wrap it again",
            remedy="set the engine's option 'api: completions'.",
        )
    if example.prefill and kind not in CONTINUING:
        raise GenerationError(
            f"prompt '{example.id}' contains the answer's beginning, and the chat API of a server of kind '{kind}' "
            "does not continue it",
            remedy="set the engine's option 'api: completions', or 'server: vllm' if that is the server.",
        )
    turns = [{"role": message.role, "content": message.content} for message in example.messages]
    return [*turns, {"role": "assistant", "content": example.prefill}] if example.prefill else turns


def messages_text(messages: list[dict[str, str]]) -> str:
    """Return the recorded prompt if the server renders it: the messages as compact JSON."""
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
    """Return the fields that decide how an answer is drawn.

    Values that a server would otherwise take from its own settings or the model's generation config are sent even if
    they are neutral, if such a server accepts them: vLLM applies a model's own repetition penalty to greedy answers
    too, and llama.cpp uses `min_p` 0.05. A seed is sent if the sampling is random; each answer has its own, since
    otherwise all prompts would get the same random draws.

    Raises:
        GenerationError: a server of this kind does not support the sampling.

    Args:
        sampling: The sampling.
        kind: The kind of server.
        example_id: Part of the answer's seed.
        sample: Number of the answer, if there are several; part of the seed.
        is_chat: Whether the server renders the prompt.
        end: The token that ends a turn by the chat template, for servers that accept it.
        extra: The user's own fields, which take precedence.
        thinking: Whether a reasoning model thinks, if the server renders the prompt. Servers of open models get the
            variables of all templates, and each template reads its own; OpenAI's API gets an effort.
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
            # -1 rather than 0: older versions only accept that for "all"
            fields |= {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": sampling.repetition_penalty}
            if end is not None:
                fields["stop_token_ids"] = [end]
        case "llama.cpp":
            fields |= {"top_k": sampling.top_k, "min_p": 0.0, "repeat_penalty": sampling.repetition_penalty}
        case "transformers":
            if sampling.temperature > 0 and "generation_config" not in extra:
                raise GenerationError(
                    "`transformers serve` samples only if the model's generation config says `do_sample`, and never "
                    "reports it; whatever the temperature, the answers might be greedy",
                    remedy="set sampling.temperature to 0, or give a whole generation config as JSON text with "
                    "`extra: {generation_config: ...}`.",
                )
            # it treats this as a repetition penalty minus 1
            fields["frequency_penalty"] = sampling.repetition_penalty - 1.0
        case "openai":
            if sampling.top_k:
                fields["top_k"] = sampling.top_k
            if sampling.repetition_penalty != 1.0:
                fields["repetition_penalty"] = sampling.repetition_penalty
    return {**fields, **_template_fields(kind, thinking)} if is_chat else fields


def _template_fields(kind: ServerKind, thinking: bool | None) -> dict[str, Any]:
    """Return fields that the server's rendering depends on; `chat.SWITCHES` has the switches of templates."""
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
    """Return the fields with a user's own, which take precedence; `None` removes one."""
    return {key: value for key, value in {**fields, **extra}.items() if value is not None}


def read_answer(body: Any) -> Answer:
    """Return the answer in a reply of either API.

    An empty answer is an answer, and so is a content of null with a reason for the end: a model that thinks first may
    not get to answer, or may end after its thought. If the server's filter stopped the answer (`content_filter`), the
    text so far counts as the answer, unfinished. A `refusal` without content is the text. Reasoning
    (`reasoning_content`, or `reasoning`, or parts of the content that are thoughts) is kept separately.

    Raises:
        UnreadableReplyError: the reply contains no answer.
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
    """Return a message's text as it is, and its thought."""
    content = message.get("content")
    thoughts = [message.get(name) for name in ("reasoning_content", "reasoning")]
    thought = next((given for given in thoughts if isinstance(given, str) and given), "")
    if not isinstance(content, list):
        return content, thought
    texts = []
    for part in content:  # such as Mistral's
        if not isinstance(part, dict):
            raise UnreadableReplyError("its 'content' is a list of something other than parts")
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
    """Return a continuation's log-likelihood, from a reply with the log-probabilities of the prompt's tokens.

    Args:
        body: The reply to `echo` with `logprobs: 1`.
        num_context: Tokens before the continuation.
        num_tokens: Tokens of the continuation.

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
    r"""Return the text without halves of surrogate pairs, which JSON allows (`\ud800`) and files do not."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
