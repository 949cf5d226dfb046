"""Parts of a sweep, done by processes that share a run directory: nothing twice but by accident, and the same bytes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backmerge.benchmarks.protocol import Benchmark
from backmerge.config import load_yaml, validated, with_overrides
from backmerge.demo import EXPERIMENT
from backmerge.errors import ConfigError, RunError
from backmerge.pipeline.sharding import PlannedJob, Shard, ShardDone, part_of, planned_jobs, run_shard, shard_of
from backmerge.pipeline.stages import run_experiment
from backmerge.planning.points import points_of
from backmerge.planning.settings import Experiment, SweepSettings, as_stored
from backmerge.records import Example, Message
from backmerge.runs import RunDirectory, claimed
from forked import started

from .test_resume import contents as found

SMALL = (
    "finetune.seeds=[1, 2]",
    "finetune.steps=4",
    "merge.0.lam=[0.5]",
    "evaluate.limit=8",
    "evaluate.cache=false",
    "choice.margin=0.95",
    "choice.accept=[wide_margin,too_few_prompts,answers_cut,no_gain,nothing_to_restore]",
    "choice.over_refusal_margin=0.95",
)
NUM_BENCHMARKS, NUM_PROMPTS = 3, 8
NUM_JOBS = (1 + 2 * 2) * NUM_BENCHMARKS  # the base; two seeds, each as tuned and at a λ
BENCHMARKS = [
    Benchmark(name, "safety", (Example("a", (Message("user", "Hello?"),)),), 8) for name in ("first", "second")
]


def small(*more: str) -> Experiment:
    """The demonstration, much smaller."""
    return validated(Experiment, with_overrides(load_yaml(EXPERIMENT), [*SMALL, *more]))


def do_shard(directory: Path, shard: str) -> None:
    """Do one part, and write down how many jobs had to be left."""
    done = run_shard(small(), directory, shard_of(shard))
    left_of(directory, shard).write_text(str(done.num_left))


def left_of(directory: Path, shard: str) -> Path:
    """Where a shard's process writes that."""
    return directory.with_name(f"left-{shard[0]}")


def start(directory: Path, shard: str) -> ForkServerProcess:
    """A process that does one part."""
    return started(do_shard, directory, shard, log=left_of(directory, shard).with_suffix(".log"))


def finished(process: ForkServerProcess, directory: Path, shard: str) -> int:
    """How many jobs it had to leave."""
    process.join(150)
    assert process.exitcode == 0, left_of(directory, shard).with_suffix(".log").read_text()
    return int(left_of(directory, shard).read_text())


def contents(directory: Path) -> dict[str, bytes]:
    """What a run found, without what its shards say of themselves."""
    return {name: content for name, content in found(directory).items() if not name.startswith("shards/")}


def num_units(directory: Path) -> int:
    """Answered jobs."""
    return len(list((directory / "units").glob("completions-*.jsonl")))


def num_made(directory: Path) -> int:
    """The answers that its last session made."""
    return int((directory / "log.txt").read_text().splitlines()[-1].partition("; ")[2].split()[0])


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small experiment, in one process."""
    directory = tmp_path_factory.mktemp("reference") / "run"
    run_experiment(small(), directory)
    return directory


@given(total=st.integers(1, 99), data=st.data())
def test_printed_shard_parses_to_the_same_shard(total: int, data: st.DataObject) -> None:
    """What a shard prints as is read as the same shard."""
    shard = Shard(data.draw(st.integers(1, total)), total)
    assert shard_of(str(shard)) == shard


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "-1/2", "1/2/3", "a/b", "1/", "/2", "1.5/2", "²/3"])
def test_no_shard(text: str) -> None:
    """What names no part is refused with the form that is meant."""
    with pytest.raises(ConfigError, match="I/N"):
        shard_of(text)


@given(costs=st.lists(st.integers(0, 1000), max_size=30), total=st.integers(1, 12))
def test_parts_make_the_whole(costs: Sequence[int], total: int) -> None:
    """Each job is in one part, in its order; and no part costs more than its share and one job."""
    point = points_of([SweepSettings(lam=(0.5,))])[0]
    row = [(PlannedJob(point, str(number), BENCHMARKS[0]), float(cost)) for number, cost in enumerate(costs)]
    parts = [part_of(row, Shard(number, total)) for number in range(1, total + 1)]
    assert [slot.tuned for part in parts for slot in part] == [slot.tuned for slot, _ in row]
    cost_of = {slot.tuned: cost for slot, cost in row}
    for part in parts:
        assert sum(cost_of[slot.tuned] for slot in part) <= sum(costs) / total + max(costs, default=0)


def test_jobs_in_a_row() -> None:
    """A model's benchmarks stand together, the λs of a tuned model follow it, and merges of all come last."""
    points = points_of([SweepSettings(lam=(0.5,)), SweepSettings(method="model_stock")])
    row = [(slot.point.name, slot.tuned, slot.benchmark.name) for slot in planned_jobs(points, ["a", "b"], BENCHMARKS)]
    models = [("base", None), *((at, of) for of in "ab" for at in ("tuned", "linear@0.5")), ("model_stock", "all")]
    assert row == [(*model, name) for model in models for name in ("first", "second")]


def test_two_at_once_and_one_that_finishes(reference: Path, tmp_path: Path) -> None:
    """Two processes over one directory, one of them killed and begun again, leave what one process leaves."""
    directory = tmp_path / "run"
    both = [start(directory, "1/2"), start(directory, "2/2")]
    deadline = time.monotonic() + 120
    while num_units(directory) < 2:
        assert both[0].exitcode is None, left_of(directory, "1/2").with_suffix(".log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    both[0].kill()
    both[0].join()
    assert num_units(directory) < NUM_JOBS
    left = finished(both[1], directory, "2/2")
    assert not (directory / "results.json").exists()
    for shard in ("1/2", "2/2"):
        left = finished(start(directory, shard), directory, shard)
    assert left == 0
    assert num_units(directory) == NUM_JOBS
    run_experiment(small(), directory)
    # what confirms the choice, and nothing else
    assert num_made(directory) == num_made(reference) - NUM_JOBS * NUM_PROMPTS > 0
    ours, theirs = contents(directory), contents(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
    told = [file.read_text() for file in directory.glob("shards/*/sessions.jsonl")]
    rows = [json.loads(line) for text in told for line in text.splitlines()]
    assert len(rows) == 3  # the killed one left none
    assert all(row["ended"] == "done" for row in rows)
    assert sum(row["num_generated"] for row in rows) <= NUM_JOBS * NUM_PROMPTS


def whole_shard(reference: Path, *more: str) -> ShardDone:
    """The only shard, over a run that is there, with other settings."""
    return run_shard(small(*more), reference, Shard(1, 1))


def test_a_finished_run_has_nothing_left(reference: Path) -> None:
    """A shard over a run that is done makes nothing, and changes nothing of it."""
    before = contents(reference)
    done = run_shard(small(), reference, Shard(2, 3))
    assert 0 < done.num_jobs < NUM_JOBS
    assert done.num_left == 0
    assert done.cost.startswith("0 answers generated")
    assert contents(reference) == before


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("merge.0.lam=[0.75]", "merge.0.lam.0"),
        ("choice.margin=0.9", "choice.margin"),
        ("evaluate.max_new_tokens=5", "evaluate.max_new_tokens"),
    ],
)
def test_other_settings_are_refused(reference: Path, setting: str, key: str) -> None:
    """Shards of different experiments don't mix: the key is named, and nothing is touched."""
    before = contents(reference)
    with pytest.raises(RunError, match=f"'{key}'"):
        whole_shard(reference, setting)
    assert contents(reference) == before


def test_where_answers_are_made_may_differ(reference: Path) -> None:
    """Each shard may have workers of its own."""
    assert whole_shard(reference, "execution.num_workers=2").num_left == 0


def test_other_inputs_are_refused(reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard on another kind of machine would leave what nobody finds; who finishes there is told so."""
    import shutil

    from backmerge.generation.protocol import made_engine
    from backmerge.pipeline.sharding import tell_of_shards
    from backmerge.planning.prepare import prepare

    directory = tmp_path / "run"
    shutil.copytree(reference, directory)
    file = directory / "shards" / "measured-on.json"
    whole_shard(directory)
    prepared = prepare(small())
    engine = made_engine(small().evaluate.engine)
    tell_of_shards(RunDirectory(directory), prepared, engine)
    assert capsys.readouterr().err.count("generated again") == 0
    measured: dict[str, Any] = json.loads(file.read_text())
    measured["engine"]["device"] = "cuda"
    file.write_text(json.dumps(measured))
    with pytest.raises(RunError, match=r"'engine\.device' cuda, but this one has cpu"):
        whole_shard(directory)
    tell_of_shards(RunDirectory(directory), prepared, engine)
    assert "engine.device cuda, but this process has cpu" in capsys.readouterr().err
    file.write_text("{")
    with pytest.raises(RunError, match="damaged"):
        whole_shard(directory)


@pytest.mark.parametrize("search", ["auto", "race"])
def test_searches_that_go_step_by_step(search: str, tmp_path: Path) -> None:
    """What asks for the next λ by the last one's finding cannot be cut; nothing is made for it."""
    with pytest.raises(ConfigError, match="race"):
        run_shard(small(f"search.name={search}"), tmp_path / "run", Shard(1, 2))
    assert not (tmp_path / "run").exists()


def test_restore_finishes_shards_by_the_search_that_they_shared(
    run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default a run races, which would ask in another order; after shards it measures their grid."""
    searches: list[str] = []

    def asked(experiment: Experiment, *_: object, **__: object) -> None:
        searches.append(experiment.searched_by)
        raise RunError("seen")

    monkeypatch.setattr("backmerge.pipeline.stages.run_experiment", asked)
    monkeypatch.setattr("backmerge.pipeline.sharding.run_shard", asked)
    out = tmp_path / "run"
    command = ("restore", "demo", "demo", "--utility", "demo-plans", "--safety", "demo-harmful", "--out", out)
    assert run_cli(*command, "--shard", "1/2")[0] == 2
    run_cli(*command)
    (out / "shards").mkdir(parents=True)
    (out / "shards" / "measured-on.json").write_text("{}")
    run_cli(*command)
    run_cli(*command, "--search", "race")
    assert searches == ["grid", "race", "grid", "race"]


def test_seeds_that_another_tunes_are_left(tmp_path: Path) -> None:
    """While seeds are claimed their jobs and those of merges of all wait, and are reported; the base's are done."""
    directory = tmp_path / "run"
    experiment = small("merge=[{method: linear, lam: [0.5]}, {method: model_stock}]")
    directory.mkdir()
    (directory / "experiment.yaml").write_text(as_stored(experiment))  # as another shard writes it before it tunes
    with claimed(directory / "shards" / "seed-1.lock"), claimed(directory / "shards" / "seed-2.lock"):
        done = run_shard(experiment, directory, Shard(1, 1))
    num_left = (2 * 2 + 1) * NUM_BENCHMARKS
    assert (done.num_jobs, done.num_left, done.missing) == (NUM_BENCHMARKS + num_left, num_left, ("seed-1", "seed-2"))
    assert f"{num_left} wait for seed-1, seed-2" in done.sentence
    assert num_units(directory) == NUM_BENCHMARKS


def with_lock(directory: Path, work: Callable[[], object], *, is_shared: bool) -> None:
    """Do something while the directory is held."""
    with RunDirectory(directory).held(is_shared=is_shared):
        work()


def test_a_shard_and_a_whole_run_do_not_mix(reference: Path) -> None:
    """While one process has the whole run, no shard begins; while a shard is at work, nobody finishes."""
    with pytest.raises(RunError, match="another process"):
        with_lock(reference, lambda: whole_shard(reference), is_shared=False)
    with pytest.raises(RunError, match="another process"):
        with_lock(reference, lambda: run_experiment(small(), reference), is_shared=True)
