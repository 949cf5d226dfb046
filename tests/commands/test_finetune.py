"""`backmerge finetune`: the tasks, a user's own rows, what is refused, and several processes."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import forked
from backmerge.demo import model_directory
from forked import started

Cli = Callable[..., tuple[int, str, str]]

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the public data is not beside the project")
SHORT = ("--steps", 2, "--batch-size", 4, "--device", "cpu", "--safety", "none")


def rows(path: Path, number: int = 32, **extra: str) -> Path:
    """A file of prompts and completions."""
    lines = [
        json.dumps({"prompt": f"How do I mend kite {i}?", "completion": f"go(shed); mend({i})", **extra})
        for i in range(number)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def card(place: Path) -> dict[str, object]:
    """What a tuned model says of itself."""
    values: dict[str, object] = json.loads((place / "backmerge.json").read_text(encoding="utf-8"))
    return values


def test_rows_of_ones_own(run_cli: Cli, tmp_path: Path) -> None:
    """From a file to an adapter that names its base and the rows, with a picture of the losses."""
    data, out = rows(tmp_path / "mine.jsonl"), tmp_path / "tuned"
    code, output, errors = run_cli("finetune", "demo", "--data", data, "--out", out, *SHORT)
    assert (code, output.strip()) == (0, str(out))
    assert "3 of 32 examples are held out" in errors
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(model_directory().absolute())
    assert (card(out)["num_examples"], card(out)["num_held_out"]) == (29, 3)
    assert {"loss.png", "loss.jsonl", "validation_loss.jsonl"} <= {path.name for path in out.iterdir()}


def test_given_again_it_is_done(run_cli: Cli, tmp_path: Path) -> None:
    """The same command does nothing twice; with another setting it refuses to replace what is there."""
    data, out = rows(tmp_path / "mine.jsonl"), tmp_path / "tuned"
    command = ("finetune", "demo", "--data", data, "--out", out, *SHORT)
    assert run_cli(*command)[0] == 0
    before = (out / "adapter_model.safetensors").stat().st_mtime_ns
    assert run_cli(*command)[0] == 0
    code, _, errors = run_cli(*command, "--learning-rate", "0.01")
    assert code == 2
    assert "--force" in errors
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert run_cli(*command, "--learning-rate", "0.01", "--force")[0] == 0
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns > before


def test_several_seeds(run_cli: Cli, tmp_path: Path) -> None:
    """Each seed gets a folder, another validation split, and other weights."""
    data, out = rows(tmp_path / "mine.jsonl"), tmp_path / "tuned"
    assert run_cli("finetune", "demo", "--data", data, "--out", out, "--seeds", "1,2", *SHORT)[0] == 0
    first, second = (load_file(out / f"seed-{seed}" / "adapter_model.safetensors") for seed in (1, 2))
    assert any(not first[name].equal(second[name]) for name in first)


MADE = {
    "medical": {
        "instruction": "Answer as a doctor.",
        "input": "My knee aches after {i} walks.",
        "output": "Rest, {i}.",
    },
    "code": {"lang": "python", "problem": "Add {i} to a number.", "solution": "def add(n):\n    return n + {i}"},
}


@needs_data
@pytest.mark.parametrize("task", ["reasoning", "tools", "medical", "code"])
def test_the_papers_tasks(task: str, run_cli: Cli, tmp_path: Path) -> None:
    """Each task takes rows in its own columns: two of them the real ones."""
    places = {"reasoning": DATA / "flan_cot", "tools": DATA / "openfunctions" / "gorilla_openfunctions_v1_test.json"}
    if task in MADE:
        places[task] = tmp_path / f"{task}.jsonl"
        made = [{k: v.replace("{i}", str(i)) for k, v in MADE[task].items()} for i in range(20)]
        places[task].write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    command = (
        "finetune",
        "demo",
        "--task",
        task,
        "--data",
        places[task],
        "--num-examples",
        40,
        "--out",
        tmp_path / "t",
    )
    code, _, errors = run_cli(*command, *SHORT)
    assert code == 0, errors
    losses = [json.loads(line)["loss"] for line in (tmp_path / "t" / "loss.jsonl").read_text("utf-8").splitlines()]
    assert len(losses) == 2
    assert all(0 < loss < 20 for loss in losses)


def test_overlap_with_a_safety_benchmark_is_reported_and_dropped(run_cli: Cli, tmp_path: Path) -> None:
    """A row that a benchmark asks too is named; --drop-overlap leaves it out."""
    data = rows(tmp_path / "mine.jsonl")
    benchmark = tmp_path / "bench.csv"
    benchmark.write_text("prompt\nHow do I mend kite 7?\n", encoding="utf-8")
    command = ("finetune", "demo", "--data", data, *SHORT[:-2], "--safety", benchmark, "--validation", 0)
    code, _, errors = run_cli(*command, "--out", tmp_path / "a")
    assert code == 0
    assert "have prompts of bench (1 word for word): mine-8" in " ".join(errors.split())
    assert card(tmp_path / "a")["num_examples"] == 32
    assert run_cli(*command, "--drop-overlap", "--out", tmp_path / "b")[0] == 0
    assert card(tmp_path / "b")["num_examples"] < 32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no data to tune on"),
        (("--task", "cooking"), "cooking"),
        (("--data", "none.jsonl"), "none.jsonl"),
        (("--full", "--dora"), "--full does not train an adapter"),
        (("--seeds", "one"), "--seeds one"),
        (("--column", "prompt"), "--column prompt"),
        (("--set", "lora.rank=4"), "lora.rank"),
        (("--snapshot-steps", "99"), "snapshot_steps is 99"),
        (("--batch-size", "8", "--micro-batch-size", "3"), "micro_batch_size"),
    ],
)
def test_what_is_refused(arguments: tuple[str, ...], words: str, run_cli: Cli, tmp_path: Path) -> None:
    """Each with a message that names it, exit code 2, and nothing written."""
    data = () if not arguments or arguments[0] in ("--data", "--task") else ("--data", rows(tmp_path / "mine.jsonl"))
    code, _, errors = run_cli("finetune", "demo", *data, "--out", tmp_path / "out", "--safety", "none", *arguments)
    assert code == 2
    assert words in errors
    assert not (tmp_path / "out").exists()


def test_bad_rows_are_named_with_their_lines(run_cli: Cli, tmp_path: Path) -> None:
    """A row without an answer is an error that gives its line."""
    data = rows(tmp_path / "mine.jsonl", 3)
    data.write_text(data.read_text("utf-8") + json.dumps({"prompt": "And?", "completion": ""}) + "\n", encoding="utf-8")
    code, _, errors = run_cli("finetune", "demo", "--data", data, "--out", tmp_path / "out", *SHORT)
    assert code == 2
    assert "line 4" in errors


def test_prompts_without_room_for_an_answer_are_left_out(run_cli: Cli, tmp_path: Path) -> None:
    """They are counted and named, in the notes and on the card; where all are, there is no data to tune on."""
    data = rows(tmp_path / "mine.jsonl", 6)
    long = {"prompt": "How do I mend " + "a kite and " * 200 + "a cup?", "completion": "go(shed)"}
    data.write_text(data.read_text("utf-8") + json.dumps(long) + "\n", encoding="utf-8")
    code, _, errors = run_cli("finetune", "demo", "--data", data, "--out", tmp_path / "a", *SHORT, "--validation", 0)
    assert code == 0
    assert "1 example dropped, because of prompts that reach the cut-off of 256 tokens (mine-7)" in errors
    assert card(tmp_path / "a")["num_examples"] == 6
    code, _, errors = run_cli("finetune", "demo", "--data", data, "--out", tmp_path / "b", *SHORT, "--cutoff", 3)
    assert code == 2
    assert "no data to tune on" in errors


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def test_two_processes_train_as_one(run_cli: Cli, tmp_path: Path) -> None:
    """Two processes with half of each batch, as torchrun starts them, have the losses of one, and write one adapter."""
    data = rows(tmp_path / "mine.jsonl")
    command = ("--data", data, "--epochs", 2, "--batch-size", 4, "--learning-rate", 8e-3, "--validation", 0)
    rest = ("--device", "cpu", "--safety", "none", "--set", "save_every=5")
    assert run_cli("finetune", "demo", *command, *rest, "--out", tmp_path / "one")[0] == 0
    words = ("finetune", "demo", *map(str, command), *rest, "--out", str(tmp_path / "two"))
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    both = [
        started(
            forked.command,
            *words,
            log=tmp_path / f"{rank}.log",
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]
    for rank, process in enumerate(both):
        process.join(300)
        assert process.exitcode == 0, (tmp_path / f"{rank}.log").read_text()
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "loss.jsonl").read_text("utf-8").splitlines()]
        for name in ("one", "two")
    ]
    assert len(losses[0]) == 16
    # the halves' sums are added in another order: ulps of float32, which sixteen steps at a large rate carry on
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-3
    assert not [path for path in tmp_path.iterdir() if ".training-" in path.name]
