"""The options for a server with OpenAI's protocol, and the names of models on it."""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator

from backmerge.config import Document, Settings, validated
from backmerge.errors import GenerationError
from backmerge.merging.recipe import Variant, lam_name

ServerKind = Literal["openai", "vllm", "transformers", "llama.cpp"]
PLACEHOLDERS = ("lam", "method", "name")
# fields that the engine sets; users may set all other fields of a request
OURS = frozenset({"model", "messages", "prompt", "n", "stream"})


def _by_lam(models: Any) -> Any:
    """Convert numeric keys to text: YAML reads the key 0.4 as a number."""
    if not isinstance(models, Mapping):
        return models
    return {lam_name(float(key)) if isinstance(key, int | float) else key: name for key, name in models.items()}


class ServerOptions(Settings):
    """The options of the engine `openai`.

    Attributes:
        url: Address including `/v1`. Redirects are not followed, so that the key is sent nowhere else.
        model: The model's name on the server. For merges, `{lam}`, `{method}` and `{name}` (of the tuned model's
            folder; `base` for the base) are replaced, as in `lora-{lam}`: vLLM serves LoRA modules by name.
        models: Names without a pattern: `base`, `tuned` (λ=1), λ or `method@λ` to the name on the server; checked
            first.
        api: `chat`: the server renders the conversation with its own chat template. `completions`: backmerge renders
            it, with the tokenizer of the variant's base; the prompt is then known, and is the same as in other engines.
        server: Which fields in addition to OpenAI's it accepts; `auto` asks it. `transformers serve` cannot be
            detected.
        prompt_as: For `completions`: token ids, which leave no doubt about special tokens, or `text` for servers that
            do not accept ids (`transformers serve`); the text is sent in the form that becomes the same ids.
        tokenizer: Folder of the served model's tokenizer if there is no variant, such as for a judge.
        api_key_env: The environment variable with the key; the key itself is never written.
        concurrency: Requests in progress at once.
        timeout_seconds: Limit for one request, from first to last byte.
        retries: Retries after 429, 5xx, time-outs and broken connections, at growing intervals: 8 take about two
            minutes.
        extra: More fields of every request, such as `reasoning_effort`; `null` removes a field that would be sent.
        log: File in which each answer is stored as it comes, so that a restart only asks for the rest.
    """

    # an address with a password in it is refused without repeating it
    model_config = ConfigDict(hide_input_in_errors=True)

    url: str = "http://localhost:8000/v1"
    model: str | None = None
    models: Annotated[Mapping[str, str], BeforeValidator(_by_lam)] = Field(default_factory=dict)
    api: Literal["chat", "completions"] = "chat"
    server: Literal["auto"] | ServerKind = "auto"
    prompt_as: Literal["tokens", "text"] = "tokens"
    tokenizer: Path | None = None
    api_key_env: str | None = None
    concurrency: Annotated[int, Field(gt=0, le=1024)] = 16
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    retries: Annotated[int, Field(ge=0)] = 8
    extra: Mapping[str, Any] = Field(default_factory=dict)
    log: Path | None = None

    @field_validator("url")
    @classmethod
    def _is_plain(cls, url: str) -> str:
        from httpx2 import URL, InvalidURL

        try:
            parsed = URL(url)
        except InvalidURL:
            raise ValueError("it is not an address such as http://localhost:8000/v1") from None
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError("an address starts with http:// or https:// and a host")
        if parsed.userinfo or parsed.query or parsed.fragment:
            raise ValueError("it has a password or a query, which would be recorded; give a key with 'api_key_env'")
        return url.rstrip("/")

    @field_validator("model")
    @classmethod
    def _has_known_placeholders(cls, model: str | None) -> str | None:
        unknown = sorted(_placeholders(model) - set(PLACEHOLDERS))
        if unknown:
            raise ValueError(f"it has {{{unknown[0]}}}; known: {', '.join(f'{{{name}}}' for name in PLACEHOLDERS)}")
        return model

    @field_validator("extra")
    @classmethod
    def _leaves_the_question(cls, extra: Mapping[str, Any]) -> Mapping[str, Any]:
        taken = sorted(OURS & extra.keys())
        if taken:
            raise ValueError(f"'{taken[0]}' is set by the engine itself")
        return extra


def server_options(options: Mapping[str, Any]) -> ServerOptions:
    """Return the engine's options from those of `EngineSettings`.

    Raises:
        ConfigError: one is unknown or wrong.
    """
    return validated(ServerOptions, Document("the options of the engine 'openai'", dict(options), {}))


def _placeholders(model: str | None) -> set[str]:
    try:
        return {field for _, field, _, _ in string.Formatter().parse(model or "") if field is not None}
    except ValueError as error:
        raise ValueError(f"its braces do not match: {error}") from error


def served_name(options: ServerOptions, variant: Variant | None) -> str:
    """Return the name of the variant on the server, or without a variant that of the served model.

    Raises:
        GenerationError: the options do not give it.
    """
    if variant is None:
        if options.model is None or _placeholders(options.model):
            raise GenerationError(
                "the engine 'openai' needs the name of a model on the server",
                remedy="give it with the option 'model', without {lam}, {method} or {name}.",
            )
        return options.model
    is_base = variant.tuned is None
    lam = "0" if is_base else _lam_text(variant.lam)
    keys = ["base"] if is_base else [f"{variant.method.name}@{lam}", f"{lam}", *(["tuned"] if lam == "1" else [])]
    for key in keys:
        if key in options.models:
            return options.models[key]
    described = "the base" if is_base else f"{variant.method.name} at λ={variant.lam}"
    if options.model is None or ("lam" in _placeholders(options.model) and lam is None):
        raise GenerationError(
            f"the options do not name {described} on the server",
            remedy=f"name it in the option 'models', as '{keys[-1]}', or give 'model' such as lora-{{lam}}.",
        )
    return options.model.format(
        lam=lam,
        method="base" if is_base else variant.method.name,
        name="base" if is_base else variant.tuned_models[0].directory.name,
    )


def _lam_text(lam: Any) -> str | None:
    """Return λ as it is in names; `None` for a schedule, which has one for each tensor."""
    return lam_name(float(lam)) if isinstance(lam, int | float) else None
