"""Read the facts that a server reports: its kind, its version, its models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from backmerge.errors import GenerationError
from backmerge.generation.http_client import RefusedError, ServerClient, UnreadableReplyError
from backmerge.generation.server_options import ServerKind, ServerOptions

# owners of models in the list of models, by kind of server; any other owner gets OpenAI's own fields only
OWNERS: Mapping[str, ServerKind] = {"vllm": "vllm", "llamacpp": "llama.cpp"}
# paths next to the address that ends with /v1: where the version is reported, and under which name
VERSIONS: Mapping[ServerKind, tuple[str, str]] = {
    "vllm": ("/version", "version"),
    "llama.cpp": ("/props", "build_info"),
}
NUM_TRIES = 4


class Server(NamedTuple):
    """A server as it describes itself.

    Attributes:
        kind: Decides which fields it accepts.
        version: Empty if it does not report one.
        models: The names that it lists; some servers list none, or not all.
        limits: The context of each model in tokens, if it reports it.
    """

    kind: ServerKind
    version: str
    models: tuple[str, ...]
    limits: Mapping[str, int]


def server_facts(client: ServerClient, options: ServerOptions) -> Server:
    """Ask for the list of models and, if that kind of server reports it, for the version.

    Raises:
        GenerationError: nothing answers at the address, it refuses the key, or its kind cannot be determined.
    """
    listed = _listed(client, must_tell=options.server == "auto")
    models = {model["id"]: model for model in listed if isinstance(model.get("id"), str)}
    owners = [OWNERS[owner] for model in listed if (owner := str(model.get("owned_by"))) in OWNERS]
    kind = options.server if options.server != "auto" else owners[0] if owners else "openai"
    limits = {
        name: model["max_model_len"] for name, model in models.items() if isinstance(model.get("max_model_len"), int)
    }
    return Server(kind, _version(options, kind, client), tuple(models), limits)


def _listed(client: ServerClient, *, must_tell: bool) -> list[dict[str, Any]]:
    try:
        body = client.ask("/models", None, _object, retries=NUM_TRIES - 1 if must_tell else 0)
    except RefusedError as error:
        if error.status in (401, 403) or 300 <= error.status < 400:
            raise
        return []
    except GenerationError as error:
        if not client.has_answered:
            raise
        if must_tell:  # the kind is not guessed: otherwise the server's own defaults would apply to the sampling
            raise GenerationError(
                f"{error.message}, when asked for its models: the kind of server cannot be determined",
                remedy="set the option 'server': openai, vllm, transformers or llama.cpp.",
            ) from error
        return []
    data = body.get("data")
    return [model for model in data if isinstance(model, dict)] if isinstance(data, list) else []


def _version(options: ServerOptions, kind: ServerKind, client: ServerClient) -> str:
    if kind not in VERSIONS or not options.url.endswith("/v1"):
        return ""
    path, name = VERSIONS[kind]
    try:
        told = client.ask(path, None, _object, is_beside=True, retries=0).get(name)
    except GenerationError:  # a proxy in front may not pass it on
        return ""
    return told if isinstance(told, str) else ""


def _object(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise UnreadableReplyError("it is not a JSON object")
    return body
