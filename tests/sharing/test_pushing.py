"""Models sent to a stand-in for the hub by the hub's own client: what arrives, who may, and what if it breaks."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from backmerge.errors import CheckpointError, RunError
from backmerge.sharing.folder import package_of
from backmerge.sharing.pushing import Destination, push

from .asked import REPO, run_push
from .hub_stand_in import TOKEN, HubStandIn, Repository, Stored
from .models import finished_run

# how the hub's client hands a file to its HTTP library, which calls that old
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def sha256(path: Path) -> str:
    """Of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_model_arrives_whole_and_private(hub: HubStandIn, run: Path, model: Path) -> None:
    """Every file of the model and no other is there, byte for byte, in one commit of a private repository."""
    (model / "notes.jsonl").write_text("not for others")
    told = run_push(run, REPO)
    arrived = hub.files(REPO)
    del arrived[".gitattributes"]
    assert arrived == {path.name: path.read_bytes() for path in model.iterdir() if path.name != "notes.jsonl"}
    repository = hub.repositories[REPO]
    assert repository.is_private
    assert len(repository.commits) == 2
    assert f"{hub.url}/{REPO}/commit/" in told
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in told


def test_public_is_asked_for(hub: HubStandIn, model: Path) -> None:
    """With --public, and only so, the repository is open."""
    run_push(model, REPO, "--public")
    assert not hub.repositories[REPO].is_private


def test_public_repository_is_refused_as_private(hub: HubStandIn, model: Path) -> None:
    """What goes into an open repository is public at once: that takes --public, too."""
    hub.repositories[REPO] = Repository(is_private=False)
    with pytest.raises(CheckpointError, match="is public, so the upload would be public"):
        run_push(model, REPO)
    assert hub.files(REPO).keys() == {".gitattributes"}
    assert not hub.puts
    run_push(model, REPO, "--public")
    assert "config.json" in hub.files(REPO)


def test_a_private_repository_stays_so(hub: HubStandIn, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--public opens nothing that is there already, and says so."""
    hub.repositories[REPO] = Repository(is_private=True)
    push(package_of(model), Destination(REPO, is_public=True))
    assert hub.repositories[REPO].is_private
    assert "is private and stays private" in capsys.readouterr().err


def test_a_branch_is_made(hub: HubStandIn, model: Path) -> None:
    """--revision puts the model on a separate branch, and main stays as it was."""
    run_push(model, REPO, "--revision", "lam/0.5")
    assert "config.json" in hub.files(REPO, "lam/0.5")
    assert hub.files(REPO).keys() == {".gitattributes"}
    run_push(model, REPO, "--revision", "lam/0.5")  # which is there now


def test_unconfirmed_model_needs_permission(hub: HubStandIn, tmp_path: Path, tiny_base: Path, tiny_tuned: Path) -> None:
    """It is refused without --unconfirmed; with it, it goes with the card that warns."""
    run = finished_run(tmp_path / "run", tiny_base, tiny_tuned, verdict="not shown")
    with pytest.raises(RunError, match="was not shown to be as safe as its base"):
        run_push(run / "unconfirmed" / "seed-1", REPO)
    assert REPO not in hub.repositories
    run_push(run, REPO, "--unconfirmed")
    assert b"**Not confirmed as safe.**" in hub.files(REPO)["README.md"]


def test_a_dry_run_asks_nobody(hub: HubStandIn, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, sizes and the place are shown without a request, a token or a network."""
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (model / "notes.jsonl").write_text("not for others")
    told = run_push(model, REPO, "--dry-run")
    assert f"To {REPO}, branch main, private:" in told
    for path in model.iterdir():
        if path.name != "notes.jsonl":
            (line,) = [line for line in told.splitlines() if line.endswith(f"  {path.name}")]
            assert "kB" in line
    assert "Not uploaded: notes.jsonl." in told
    assert "Nothing was uploaded" in told
    assert hub.seen == []


def test_the_same_model_again_changes_nothing(hub: HubStandIn, model: Path) -> None:
    """A second time no byte is sent and no commit made."""
    run_push(model, REPO)
    sent = len(hub.puts)
    told = run_push(model, REPO)
    assert len(hub.puts) == sent
    assert len(hub.repositories[REPO].commits) == 2
    assert "already holds this model" in told


def test_a_broken_upload_goes_on(hub: HubStandIn, model: Path) -> None:
    """What was whole when the connection broke is not sent again, and nothing was seen until all was there."""
    hub.breaks_after = 2
    with pytest.raises(CheckpointError, match="was interrupted") as error:
        run_push(model, REPO)
    assert "same command again" in str(error.value.remedy)
    whole = set(hub.objects)
    assert 0 < len(whole) <= 2
    assert hub.files(REPO).keys() == {".gitattributes"}
    hub.breaks_after = None
    hub.puts.clear()
    run_push(model, REPO)
    large = {sha256(path) for path in model.iterdir() if path.stat().st_size >= 1000 or path.suffix == ".safetensors"}
    assert set(hub.puts) == large - whole
    assert len(hub.puts) == len(large) - len(whole)
    assert hub.files(REPO)["config.json"] == (model / "config.json").read_bytes()


def test_a_killed_upload_goes_on(hub: HubStandIn, model: Path, tmp_path: Path) -> None:
    """Killed in the middle of a shard, in a process set up by its environment alone, the same command continues."""
    hub.breaks_after, hub.hangs = 2, threading.Event()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    code = "import typer; from backmerge.commands.push import push; typer.run(push)"
    command = [sys.executable, "-c", code, str(model), REPO]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        _wait_for(lambda: len(hub.puts) > 2 or process.poll() is not None)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=20)
        hub.hangs.set()
    whole, hub.breaks_after = set(hub.objects), None
    assert whole
    assert hub.files(REPO).keys() == {".gitattributes"}
    hub.puts.clear()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not whole & set(hub.puts)
    assert {path.name for path in model.iterdir()} < hub.files(REPO).keys()
    assert TOKEN not in done.stdout + done.stderr


def _wait_for(is_so: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_another_model_is_not_replaced_unasked(
    hub: HubStandIn, tmp_path: Path, tiny_base: Path, tiny_tuned: Path
) -> None:
    """Weights there, under whatever name, stay until --replace; then those of no use are gone in the same commit."""
    run = finished_run(tmp_path / "run", tiny_base, tiny_tuned, tuned=("a", "b"))
    first, second = run / "merged" / "a", run / "merged" / "b"
    run_push(first, REPO)
    hub.repositories[REPO].branches["main"] |= {
        "pytorch_model.bin": Stored(b"of another", is_lfs=True),
        "model-00042-of-00042.safetensors": Stored(b"of another", is_lfs=True),
        "notes.md": Stored(b"of the owner's", is_lfs=False),
    }
    before = hub.files(REPO)
    with pytest.raises(CheckpointError, match="has another model") as error:
        run_push(second, REPO)
    assert "--replace" in str(error.value.remedy)
    assert hub.files(REPO) == before
    told = run_push(second, REPO, "--replace")
    after = hub.files(REPO)
    assert after["notes.md"] == b"of the owner's"
    assert (
        "Removed from the repository (files of another model): model-00042-of-00042.safetensors, pytorch_model.bin."
        in told
    )
    assert {name for name in after if name.endswith((".bin", ".safetensors"))} == {
        path.name for path in second.glob("*.safetensors")
    }
    assert all(after[path.name] == path.read_bytes() for path in second.iterdir())


def test_the_same_names_and_sizes_are_another_model_too(
    hub: HubStandIn, tmp_path: Path, tiny_base: Path, tiny_tuned: Path
) -> None:
    """Merges of the same models at another λ differ in nothing but their bytes."""
    run = finished_run(tmp_path / "run", tiny_base, tiny_tuned, tuned=("a", "b"))
    run_push(run / "merged" / "a", REPO)
    before = hub.files(REPO)
    with pytest.raises(CheckpointError, match="has another model"):
        run_push(run / "merged" / "b", REPO)
    assert hub.files(REPO) == before


def test_one_stray_shard_is_another_model_too(hub: HubStandIn, model: Path) -> None:
    """The same shards and one more would be loaded together."""
    run_push(model, REPO)
    hub.repositories[REPO].branches["main"]["adapter_model.safetensors"] = Stored(b"of another", is_lfs=True)
    with pytest.raises(CheckpointError, match=r"has another model: adapter_model\.safetensors"):
        run_push(model, REPO)


def test_files_missing_on_the_hub_are_noticed(hub: HubStandIn, model: Path) -> None:
    """A .gitignore there makes the hub drop files without a word: the model is then not whole, and that is said."""
    hub.ignored = ("tokenizer*",)
    with pytest.raises(CheckpointError, match=r"did not accept tokenizer.*incomplete"):
        run_push(model, REPO)


def test_folders_of_this_machine_do_not_arrive(hub: HubStandIn, model: Path) -> None:
    """What backmerge.json told of a folder is shortened in what is sent."""
    file = model / "backmerge.json"
    values = json.loads(file.read_text())
    values["recipe"]["parameters"] = {"mask": "/home/alice/mask.pt"}
    file.write_text(json.dumps(values))
    run_push(model, REPO)
    assert json.loads(hub.files(REPO)["backmerge.json"])["recipe"]["parameters"] == {"mask": "mask.pt"}
    assert not any(b"alice" in content for content in hub.files(REPO).values())


def test_a_sent_model_can_be_loaded(hub: HubStandIn, model: Path, tmp_path: Path) -> None:
    """What lies in the repository is a model: the same weights under the same fingerprint, by its card confirmed."""
    run_push(model, REPO)
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    for name, content in hub.files(REPO).items():
        (fetched / name).write_bytes(content)
    assert package_of(fetched).is_confirmed
    from transformers import AutoModelForCausalLM

    parameters = AutoModelForCausalLM.from_pretrained(fetched).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert all(bool((parameters[name] == tensor).all()) for name, tensor in expected.items())
    shutil.rmtree(fetched)
