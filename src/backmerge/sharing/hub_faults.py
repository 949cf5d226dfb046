"""Explain failures of the connection to the hub, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from backmerge.errors import CheckpointError

LOGIN = "create a token with write access in the hub's settings, then `hf auth login`, or put it into HF_TOKEN."
AGAIN = "run the same command again: uploaded files are not sent twice."


@contextmanager
def told_plainly(repo: str) -> Iterator[str]:
    """Turn errors of a block that uses the hub into our messages, which never show the user's token.

    Args:
        repo: `owner/name`.

    Raises:
        CheckpointError: there is no token, the hub cannot be reached, or it refuses.
    """
    import httpx2
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    token = _ready(repo, get_token())
    try:
        yield token
    except HFValidationError as error:
        raise CheckpointError(f"'{repo}' cannot be a repository's name: {_line(error, token)}") from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
        message, remedy = _explained(repo, error, token)
        raise CheckpointError(message, remedy=remedy) from error


def check_name(repo: str) -> None:
    """Check that it can be a repository's name.

    Raises:
        CheckpointError: it is not OWNER/NAME, in the hub's letters.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    remedy = "give OWNER/NAME, such as me/restored."
    if repo.count("/") != 1:
        raise CheckpointError(f"'{repo}' is not a repository's name", remedy=remedy)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise CheckpointError(f"'{repo}' cannot be a repository's name: {error}", remedy=remedy) from error


def _ready(repo: str, token: str | None) -> str:
    """Return the token, if everything that the first request needs is there."""
    from huggingface_hub import constants

    check_name(repo)
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            "HF_HUB_OFFLINE forbids access to the hub, so nothing was sent",
            remedy="unset it; --dry-run needs no hub and shows what would be sent.",
        )
    if token is None:
        raise CheckpointError("nobody is logged in to the hub, so nothing was sent", remedy=LOGIN)
    return token


def _explained(repo: str, error: Exception, token: str) -> tuple[str, str]:
    """Return a message and a remedy."""
    owner = repo.partition("/")[0]
    reason = _line(error, token)
    status = next((found for cause in _causes(error) if (found := _status(cause))), None)
    known = {
        401: ("the hub does not accept your token, or it has expired", LOGIN),
        403: (
            f"your token has no right to write to {repo}: {reason}",
            f"ask the owner of {owner}, use a token with write access, or use your own repository.",
        ),
        404: (f"the hub has no {repo} that you can see: {reason}", "check the name, and whether your token sees it."),
        409: (f"the name {repo} is taken, by a repository that you cannot see", "give another name."),
        413: (f"a file is larger than the hub allows: {reason}", "write smaller shards: --max-shard-size of merge."),
        429: ("the hub refuses for now: there were too many requests", "run the same command again in some minutes."),
    }
    if status in known:
        return known[status]
    if isinstance(error, ValueError):
        return f"the hub refused the upload to {repo}: {reason}", "fix that, then run the command again."
    return f"the upload to {repo} was interrupted: {reason}", AGAIN


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status of an error."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _line(error: Exception, token: str) -> str:
    """Return an error and its cause on one line, without the token."""
    words = [" ".join(str(cause).split()) or type(cause).__name__ for cause in _causes(error)]
    text = ": ".join(dict.fromkeys(word for word in words if word))
    return text.replace(token, "…")[:500]
