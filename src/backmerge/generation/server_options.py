"""What a user says about a server that speaks OpenAI's protocol, and what models are called there."""

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
# what is asked is ours to say; everything else of a request may be set by the user
OURS = frozenset({"model", "messages", "prompt", "n", "stream"})


def _by_lam(models: Any) -> Any:
    """YAML reads the key 0.4 as a number."""
    if not isinstance(models, Mapping):
        return models
    return {lam_name(float(key)) if isinstance(key, int | float) else key: name for key, name in models.items()}


class ServerOptions(Settings):
    """The options of the engine `openai`.

    Attributes:
        url: Up to and with `/v1`. A redirect is not followed, so that the key goes nowhere else.
        model: The model's name there. For merges, `{lam}`, `{method}` and `{name}` (of the tuned model's folder; `base`
            for the base) stand for theirs, as in `lora-{lam}`: vLLM serves LoRA modules by name.
        models: Names that follow no pattern: `base`, `tuned` (λ=1), λ or `method@λ` to the name there; looked at first.
        api: `chat`: the server renders the conversation by its own chat template. `completions`: we render it, by the
            tokenizer of the variant's base; what the model sees is then known, and the same as in other engines.
        server: Which fields beyond OpenAI's it takes; `auto` asks it. `transformers serve` cannot be told by asking.
        prompt_as: For `completions`: token ids, which leave no doubt about special tokens, or `text` for servers that
            take no ids (`transformers serve`); text is sent in the form that becomes the same ids.
        tokenizer: Folder of the served model's tokenizer, where there is no variant: a judge's, say.
        api_key_env: The environment variable that holds the key; the key itself is written nowhere.
        concurrency: Requests under way at once.
        timeout_seconds: For one request, from first to last byte.
        retries: After 429, 5xx, time-outs and broken connections, at growing intervals: 8 last about two minutes.
        extra: More fields of every request, such as `reasoning_effort`; `null` leaves a field out that we would send.
        log: Where each answer is kept as it comes, so that a restart asks only for the rest.
    """

    # an address with a password in it is refused without being repeated
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
            raise ValueError("an address begins with http:// or https:// and a host")
        if parsed.userinfo or parsed.query or parsed.fragment:
            raise ValueError("it holds a password or a query, which would be recorded; a key goes by 'api_key_env'")
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
            raise ValueError(f"'{taken[0]}' is what the engine itself decides")
        return extra


def server_options(options: Mapping[str, Any]) -> ServerOptions:
    """The engine's options from those of `EngineSettings`.

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
    """What the variant, or without one the model that is served, is called on the server.

    Raises:
        GenerationError: the options do not say.
    """
    if variant is None:
        if options.model is None or _placeholders(options.model):
            raise GenerationError(
                "the engine 'openai' is not told which of the server's models to ask",
                remedy="give its name as the option 'model', without {lam}, {method} or {name}.",
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
            f"what {described} is called on the server is not said",
            remedy=f"name it under the option 'models', as '{keys[-1]}', or give 'model' such as lora-{{lam}}.",
        )
    return options.model.format(
        lam=lam,
        method="base" if is_base else variant.method.name,
        name="base" if is_base else variant.tuned_models[0].directory.name,
    )


def _lam_text(lam: Any) -> str | None:
    """λ as it is in names; none for a schedule, which has one for each tensor."""
    return lam_name(float(lam)) if isinstance(lam, int | float) else None
