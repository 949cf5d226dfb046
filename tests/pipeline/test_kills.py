"""Sweeps, restores and tunings that are killed at random moments, again and again, end with the same bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backmerge.demo import model_directory
from pipeline.test_resume import contents

# Runs a command to its end, then kills it at random moments and goes on with it, at most five times in a row, until it
# was killed as often as asked. Half of the moments are steps with files (one is opened for writing, made, renamed,
# linked or removed), half are moments of its processor time; both end the process at once, as kill -9 does. Each
# command is a fork of this process, so that its libraries are imported once.
PROGRAM = """
import itertools, os, random, resource, signal, sys
from pathlib import Path
import matplotlib.pyplot, peft
from backmerge.cli import app
from backmerge.finetuning import trainer
from backmerge.generation import transformers_engine
from backmerge.outputs import damage_of
from backmerge.pipeline import stages
from backmerge.reporting import report

place, times, *arguments = Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT

def run(out, *, last_step=0, seconds=0.0):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    done = 0
    def step(event, values):
        nonlocal done
        if event in CHANGES or (event == "open" and isinstance(values[2], int) and values[2] & WRITES):
            done += 1
            if done == last_step:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(step)
    signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process: nobody handles it
    code = 1
    try:
        app([*arguments, "--out", str(out)], standalone_mode=False)
        code = 0
    finally:
        if not (last_step or seconds):
            (place / "steps").write_text(f"{done} {sum(resource.getrusage(resource.RUSAGE_SELF)[:2])}")
        sys.stderr.flush()
        os._exit(code)

def check(out):
    models = [out, *out.glob("tuned/[!.]*"), *out.glob("merged/[!.]*"), *out.glob("unconfirmed/[!.]*")]
    for model in models:
        if (model / "backmerge.json").exists():
            assert damage_of(model) is None, damage_of(model)
            assert not list(model.rglob("*.partial"))

assert run(place / "whole") == 0
steps, seconds = (place / "steps").read_text().split()
rng, kills = random.Random(0), 0
for number in itertools.count():
    out = place / f"killed-{number}"
    for _ in range(5):
        if rng.random() < 0.5:
            status = run(out, last_step=rng.randrange(1, int(steps)))
        else:
            status = run(out, seconds=rng.uniform(0.01, float(seconds)))
        if not os.WIFSIGNALED(status):
            break
        kills += 1
        check(out)
    else:
        status = run(out)
    assert status == 0, status
    if kills >= times:
        break
print(kills, number + 1)
"""
QUICK = (
    *("--set", "evaluate.limit=4", "--set", "evaluate.cache=false", "--set", "choice.margin=0.95"),
    *("--set", "choice.over_refusal_margin=0.95"),
    *("--set", "choice.accept=[wide_margin,too_few_prompts,answers_cut,no_gain,nothing_to_restore]"),
)
SWEEP = """
base: demo
tuned: [ADAPTER]
merge: [{method: linear, lam: [0.2, 0.4, 0.6]}, {method: slerp, lam: [0.3]}]
evaluate: {utility: [demo-plans], safety: [demo-harmful], judge: {name: demo-rule}}
"""


def killed(place: Path, times: int, *arguments: str) -> None:
    """Kill a command so many times; each time that it then ends, its files are those of an undisturbed one."""
    command = [sys.executable, "-c", PROGRAM, str(place), str(times), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kills, ends = map(int, done.stdout.split()[-2:])
    assert kills >= times
    whole = contents(place / "whole")
    for number in range(ends):
        found = contents(place / f"killed-{number}")
        assert found.keys() == whole.keys()
        assert [name for name in found if found[name] != whole[name]] == []


def kill_sweeps(tmp_path: Path, adapter: Path, times: int) -> None:
    """Kill an experiment with four merges."""
    (tmp_path / "sweep.yaml").write_text(SWEEP.replace("ADAPTER", str(adapter)))
    killed(tmp_path, times, "run", str(tmp_path / "sweep.yaml"), *QUICK)


@pytest.fixture
def adapter(make_adapter: Any) -> Path:
    """Random factors on the embedded model."""
    return Path(make_adapter(model_directory(), seed=5))


@pytest.mark.slow
def test_fifty_killed_sweeps_end_the_same(tmp_path: Path, adapter: Path) -> None:
    """An experiment over several λs and two methods."""
    kill_sweeps(tmp_path, adapter, 50)


@pytest.mark.slow
def test_twenty_killed_restores_end_the_same(tmp_path: Path, adapter: Path) -> None:
    """From the models to the merged one that is confirmed."""
    options = ("--utility", "demo-plans", "--safety", "demo-harmful", "--judge", "demo-rule", "--lam", "0.5")
    killed(tmp_path, 20, "restore", "demo", str(adapter), *options, "--device", "cpu", *QUICK)


@pytest.mark.slow
def test_twenty_killed_tunings_end_the_same(tmp_path: Path) -> None:
    """A training that is saved every second step."""
    options = ("--safety", "none", "--steps", "8", "--device", "cpu", "--set", "save_every=2")
    killed(tmp_path, 20, "finetune", "demo", "--task", "demo-plans", *options)
