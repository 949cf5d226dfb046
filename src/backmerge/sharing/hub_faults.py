"""What can go wrong between here and the hub, in words that say what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from backmerge.errors import CheckpointError

LOGIN = "make a token with write access in the hub's settings, then `hf auth login`, or put it into HF_TOKEN."
AGAIN = "give the same command again: what was sent is not sent twice."


@contextmanager
def told_plainly(repo: str) -> Iterator[str]:
    """A block that talks to the hub; it is given the user's token, which no message of ours shows.

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
    """Whether it can be a repository's name.

    Raises:
        CheckpointError: it is not OWNER/NAME, in the hub's letters.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    remedy = "give OWNER/NAME, such as me/restored."
    if repo.count("/") != 1:
        raise CheckpointError(f"'{repo}' is no repository's name", remedy=remedy)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise CheckpointError(f"'{repo}' cannot be a repository's name: {error}", remedy=remedy) from error


def _ready(repo: str, token: str | None) -> str:
    """The token, if all is there that is needed before the first request."""
    from huggingface_hub import constants

    check_name(repo)
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            "HF_HUB_OFFLINE forbids to reach the hub, so nothing was sent",
            remedy="unset it; --dry-run needs no hub and shows what would go.",
        )
    if token is None:
        raise CheckpointError("nobody is logged in to the hub, so nothing was sent", remedy=LOGIN)
    return token


def _explained(repo: str, error: Exception, token: str) -> tuple[str, str]:
    """A message, and what to do."""
    owner = repo.partition("/")[0]
    reason = _line(error, token)
    status = next((found for cause in _causes(error) if (found := _status(cause))), None)
    known = {
        401: ("the hub does not know your token, or it has run out", LOGIN),
        403: (
            f"your token has no right to write to {repo}: {reason}",
            f"ask whoever owns {owner}, take a token with write access, or use your own repository.",
        ),
        404: (f"the hub has no {repo} that you can see: {reason}", "check the name, and whether your token sees it."),
        409: (f"the name {repo} is taken, by a repository that you cannot see", "give another name."),
        413: (f"a file is larger than the hub takes: {reason}", "write smaller shards: --max-shard-size of merge."),
        429: ("the hub asks to wait: there were too many requests", "give the same command again in some minutes."),
    }
    if status in known:
        return known[status]
    if isinstance(error, ValueError):
        return f"the hub does not take what was sent to {repo}: {reason}", "fix that, then run the command again."
    return f"the upload to {repo} was interrupted: {reason}", AGAIN


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _line(error: Exception, token: str) -> str:
    """An error and what is behind it, on one line, without the token."""
    words = [" ".join(str(cause).split()) or type(cause).__name__ for cause in _causes(error)]
    text = ": ".join(dict.fromkeys(word for word in words if word))
    return text.replace(token, "…")[:500]
