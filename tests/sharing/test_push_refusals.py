"""What keeps a model from going to the hub, told in one message with what to do, and never with the token."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from backmerge.errors import BackmergeError, CheckpointError
from backmerge.sharing.hub_faults import told_plainly

from .asked import REPO, run_push
from .hub_stand_in import TOKEN, HubStandIn, Repository


def test_without_a_token_nothing_is_asked(hub: HubStandIn, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is not logged in is told how, before a request."""
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="nobody is logged in") as error:
        run_push(model, REPO)
    assert "hf auth login" in str(error.value.remedy)
    assert hub.seen == []


def test_a_wrong_token_is_not_shown(hub: HubStandIn, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that the hub does not know is said to be unknown, and not what it is."""
    monkeypatch.setenv("HF_TOKEN", "hf_wrongOne")
    with pytest.raises(CheckpointError, match="does not accept your token") as error:
        run_push(model, REPO)
    assert "hf_wrongOne" not in str(error.value)


@pytest.mark.parametrize("kind", [RuntimeError, OSError, ValueError])
def test_no_message_shows_the_token(hub: HubStandIn, kind: type[Exception]) -> None:
    """Not even where a library puts it into the cause of its error."""

    def fail() -> None:
        try:
            raise OSError(f"Authorization: Bearer {TOKEN}")
        except OSError as error:
            raise kind(f"refused for {TOKEN}") from error

    with pytest.raises(CheckpointError, match="refused for …") as error, told_plainly(REPO):
        fail()
    assert TOKEN not in str(error.value)


def test_missing_write_access_is_reported(hub: HubStandIn, model: Path) -> None:
    """Neither where the repository would be made, nor where it is."""
    with pytest.raises(CheckpointError, match="no right to write to someone/else"):
        run_push(model, "someone/else")
    hub.repositories["someone/else"] = Repository(is_private=True)
    with pytest.raises(CheckpointError, match="no right to write to someone/else"):
        run_push(model, "someone/else")
    assert not hub.puts


def test_taken_name_is_reported(hub: HubStandIn, model: Path) -> None:
    """A repository that exists and cannot be seen."""
    hub.hidden.add(REPO)
    with pytest.raises(CheckpointError, match="the name me/restored is taken"):
        run_push(model, REPO)


@pytest.mark.parametrize("name", ["restored", "me/a/b", "me/", "me/..", "me/a b"])
def test_invalid_names_are_reported(hub: HubStandIn, model: Path, name: str) -> None:
    """Owner and name, in the hub's letters."""
    with pytest.raises(CheckpointError, match=r"is not a repository's name|cannot be a repository's name"):
        run_push(model, name)
    assert not hub.puts


def test_offline_is_reported(hub: HubStandIn, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HF_HUB_OFFLINE=1 is respected, and named."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE forbids"):
        run_push(model, REPO)
    assert hub.seen == []


def test_unreachable_hub_is_reported(hub: HubStandIn, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens: one message that says to try again."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="was interrupted") as error:
        run_push(model, REPO)
    assert "same command" in str(error.value.remedy)


def test_nothing_is_asked_for_a_model_that_is_not_whole(hub: HubStandIn, model: Path) -> None:
    """The folder is looked through before a byte goes."""
    next(model.glob("*.safetensors")).unlink()
    with pytest.raises(BackmergeError):
        run_push(model, REPO)
    assert hub.seen == []
