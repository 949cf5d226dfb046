"""Damaged and hostile files of every kind that commands read: one clear error or a result, and nothing left behind."""

import json
import random
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from backmerge.cli import MENDABLE, USAGE_ERROR, app
from backmerge.errors import BackmergeError
from backmerge.pipeline.given import read_records
from backmerge.records import Value, Verdict
from backmerge.reporting.report import read_run
from backmerge.runs import RunDirectory

SECONDS, BYTES = 20, 2_000_000_000  # that one try may take
TOKENS = (
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b'"\\ud800"',
    b"[]",
    b"{}",
    b"[" * 3000,
    b"9" * 5000,
    b'"' + b"x" * 3000 + b'"',
)
VALUES: tuple[Any, ...] = (None, True, -1, 0, 10**30, 1.5, "", "x" * 3000, "../..", "\0", [], {}, [[]], {"a": None})
EXPERIMENT = """
base: demo
tuned: [demo]
merge: [{method: linear, lam: [0.2, 0.4]}]
evaluate: {utility: [demo-plans], safety: [demo-harmful]}
"""
MERGEKIT = """
merge_method: linear
models:
  - {model: base, parameters: {weight: 0.5}}
  - {model: tuned, parameters: {weight: 0.5}}
dtype: float32
"""


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Return a file's content, cut, altered, or with one value of its JSON exchanged."""
    kind = rng.randrange(6)
    place = rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([rng.randrange(256)]) + content[place + 1 :]
    if kind == 2:
        return content[:place] + rng.choice(TOKENS) + content[place + rng.randrange(8) :]
    if kind == 3:
        return content[:place] + content[place + rng.randrange(1, 40) :]
    try:
        values = json.loads(content)
    except ValueError:
        lines = content.splitlines(keepends=True)
        rng.shuffle(lines)
        return b"".join(lines[: rng.randrange(len(lines) + 1)])
    return json.dumps(_exchanged(values, rng)).encode()


def _exchanged(values: Any, rng: random.Random) -> Any:
    if isinstance(values, dict) and values and rng.random() < 0.9:
        key = rng.choice(sorted(values))
        if rng.random() < 0.1:
            return {name: value for name, value in values.items() if name != key}
        return {**values, key: _exchanged(values[key], rng)}
    if isinstance(values, list) and values and rng.random() < 0.8:
        place = rng.randrange(len(values))
        return [*values[:place], _exchanged(values[place], rng), *values[place + 1 :]]
    return rng.choice(VALUES)


class Inputs:
    """Sound inputs, from which each try takes a copy with one damaged file, and the commands that read them."""

    def __init__(self, root: Path, base: Path, tuned: Path, adapter: Path) -> None:
        self.sound = root / "sound"
        for name, source in (("base", base), ("tuned", tuned), ("adapter", adapter)):
            shutil.copytree(source, self.sound / name)
        run = RunDirectory(self.sound / "run")
        with run.held():
            place = {"model": "base", "benchmark": "b", "split": "whole", "kind": "safety"}
            verdict = {"example": "a", "harmful": True, "refusal": False, "reason": "", "sample": 0}
            answer = {"example": "a", "prompt": "p", "text": "t", "num_tokens": 1, "finished": True, "sample": 0}
            run.records.mkdir()
            (run.records / "verdicts.jsonl").write_text(json.dumps({**place, **verdict}) + "\n")
            asked = {**place, **answer, "question": "q", "cluster": "c"}
            (run.records / "completions.jsonl").write_text(json.dumps(asked) + "\n")
            run.unit("verdicts", "k", Verdict, lambda: [Verdict("a", harmful=True, refusal=False)], ["a"])
            run.unit("values", "k", Value, lambda: [Value("a", "accuracy", 0.5)], ["a"])
            run.write_json("results.json", {"schema_version": 2, "scores": [], "summary": [], "tuned": []})
        (self.sound / "e.yaml").write_text(EXPERIMENT)
        (self.sound / "m.yaml").write_text(MERGEKIT)
        (self.sound / "rows.jsonl").write_text(
            '{"id": "plan-1", "completion": "one"}\n{"prompt": "a", "answer": "b"}\n'
        )
        (self.sound / "rows.csv").write_text('prompt,answer\n"a, b",c\nd,e\n')

    def tries(self, here: Path) -> list[tuple[str, Callable[[], object]]]:
        """Return the files that are damaged, as patterns, and what reads them."""

        def command(*arguments: str) -> Callable[[], object]:
            def call() -> None:
                done = CliRunner().invoke(app, arguments)
                if done.exception is not None:
                    raise done.exception

            return call

        def unit(kind: Any, stage: str) -> Callable[[], object]:
            return lambda: RunDirectory(here / "run").unit(stage, "k", kind, list, ["a"])

        merge = ("merge", "base", "--lam", "0.5", "--out", "out", "--allow-unrelated")
        return [
            ("base/model.safetensors", command(*merge, "tuned")),
            ("base/config.json", command(*merge, "tuned")),
            ("adapter/adapter_config.json", command(*merge, "adapter", "--as", "adapter")),
            ("adapter/adapter_model.safetensors", command(*merge, "adapter", "--as", "adapter")),
            ("e.yaml", command("run", "e.yaml", "--dry-run", "--set", "execution.executor=nothing")),
            ("m.yaml", command("merge", "--config", "m.yaml", "--out", "out")),
            ("rows.jsonl", command("score", "rows.jsonl", "--benchmark", "rows.csv", "--out", "out")),
            ("rows.csv", command("score", "rows.jsonl", "--benchmark", "rows.csv", "--out", "out")),
            ("run/results.json", lambda: read_run(here / "run")),
            ("run/digests.json", lambda: read_run(here / "run")),
            ("run/records/verdicts.jsonl", lambda: read_records(here / "run")),
            ("run/records/completions.jsonl", lambda: read_records(here / "run")),
            ("run/units/verdicts-k.jsonl", unit(Verdict, "verdicts")),
            ("run/units/values-k.jsonl", unit(Value, "values")),
        ]


@pytest.fixture
def inputs(
    tmp_path: Path, tiny_base: Path, tiny_tuned: Path, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> Inputs:
    """Models, an adapter, a run and files of a user's, all sound; the working directory is where copies go."""
    monkeypatch.setenv("BACKMERGE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return Inputs(tmp_path, tiny_base, tiny_tuned, make_adapter(tiny_base, seed=5))


def attempt(inputs: Inputs, here: Path, seed: int) -> str | None:
    """Damage one file and read it; return what went wrong, if anything did."""
    rng = random.Random(seed)  # noqa: S311 - damage, not a secret
    for entry in here.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    tries = inputs.tries(here)
    name, call = tries[seed % len(tries)]
    part = Path(name).parts[0]
    models, tables = {"base", "tuned", "adapter"}, {"rows.jsonl", "rows.csv"}
    for source in models | {part} if part in models | {"m.yaml"} else tables | {part}:
        whole = inputs.sound / source
        shutil.copytree(whole, here / source) if whole.is_dir() else shutil.copy(whole, here / source)
    content = damaged((here / name).read_bytes(), rng)
    if rng.random() < 0.8:
        (here / "run" / "digests.json").unlink(missing_ok=True)
    (here / name).write_bytes(content)
    began = time.monotonic()
    fault = None
    try:
        call()
    except (BackmergeError, USAGE_ERROR):
        fault = "user error"
    except SystemExit as ended:
        fault = "user error" if ended.code == 2 else f"exit {ended.code}"
    except OSError as error:
        fault = "user error" if error.errno in MENDABLE else repr(error)
    except Exception as error:  # noqa: BLE001 - boundary: whatever else comes out is what the test looks for
        fault = f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.monotonic() - began
    left = [path.name for path in here.iterdir() if path.name == "out" or path.name.endswith(".partial")]
    if fault not in (None, "user error"):
        return f"try {seed}, {name}: {fault}"
    if fault is not None and left:
        return f"try {seed}, {name}: left {left} behind"
    return f"try {seed}, {name}: {seconds:.0f} s" if seconds > SECONDS else None


def check_tries(inputs: Inputs, number: int) -> None:
    """Make so many tries, the same ones every time."""
    found = [fault for seed in range(number) if (fault := attempt(inputs, Path.cwd(), seed)) is not None]
    assert not found, "\n".join([f"{len(found)} of {number}", *found[:20]])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < BYTES


def test_damaged_files_are_clear_errors(inputs: Inputs) -> None:
    """A short run: some tries for each kind of file."""
    check_tries(inputs, 140)


def test_damage_that_reached_peft_is_a_clear_error(inputs: Inputs) -> None:
    """Tries of the long run in which peft met a value that no field of an adapter's configuration may have."""
    seeds = (982, 1822, 3908, 6246, 6834, 7450, 8542, 8752)
    assert [fault for seed in seeds if (fault := attempt(inputs, Path.cwd(), seed)) is not None] == []


@pytest.mark.slow
def test_ten_thousand_damaged_files_are_clear_errors(inputs: Inputs) -> None:
    """The long run, for all kinds of files."""
    check_tries(inputs, 10_000)
