"""A stand-in for the hub, and a client that asks it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from .hub_stand_in import TOKEN, HubStandIn
from .models import finished_run


@pytest.fixture
def run(tmp_path: Path, tiny_base: Path, tiny_tuned: Path) -> Path:
    """A finished run with one confirmed model."""
    return finished_run(tmp_path / "run", tiny_base, tiny_tuned)


@pytest.fixture
def model(run: Path) -> Path:
    """The confirmed model's folder."""
    return run / "merged" / "seed-1"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    """The stand-in at work, with the hub's own client turned to it: plain HTTP uploads, a token, an empty home."""
    with HubStandIn().running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # a broken connection is tried again by the client, with waits in between that are not needed here
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        close_session()
        yield hub
        close_session()
