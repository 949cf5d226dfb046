"""Run a part of a sweep, in one of several processes that share a run directory, on one machine or many.

Each process tunes its share of the seeds, then answers, judges and scores its share of the grid, and stops before λ is
chosen; the last run of the experiment, without a shard, finds all of that done and continues. The processes do not
communicate:

- the settings alone decide which process does what. The jobs are in a row, tuned model by tuned model and λ by λ, and
  the row is cut into parts of equal cost, so that a model's benchmarks stay together except at the cuts;
- a job leaves units, named by a hash of everything that they depend on and written whole through a temporary file, so
  that work done twice, or by a shard of another count, does no harm;
- a job whose tuned model does not exist yet is skipped: no process waits for another.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.benchmarks.guards import fingerprints_of
from backmerge.benchmarks.protocol import Benchmark
from backmerge.benchmarks.split import Split
from backmerge.checkpoints.reader import Weights
from backmerge.errors import ConfigError, RunError
from backmerge.generation.protocol import Generator, made_engine
from backmerge.measuring.answer import Job
from backmerge.measuring.evaluate import evaluator_of
from backmerge.measuring.usage import Usage, session
from backmerge.outputs import check_apart, paths_read
from backmerge.pipeline.guarding import with_inputs
from backmerge.planning.points import ALL, Point
from backmerge.planning.prepare import Plan, prepare
from backmerge.planning.settings import Experiment, absolute_paths, as_stored, check_kind
from backmerge.progress import bar, say
from backmerge.records import to_json
from backmerge.registry import NOTHING_ALLOWED, Permissions
from backmerge.runs import SHARDS, RunDirectory, claimed, key_of, write_once

SELECTION: Split = "selection"


class Shard(NamedTuple):
    """One of several parts.

    Attributes:
        number: Counted from 1.
        total: Number of shards.
    """

    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    @property
    def folder(self) -> str:
        """The name of its logs' folder."""
        return f"{self.number}-of-{self.total}"


class PlannedJob(NamedTuple):
    """A job before its model exists: a benchmark, measured at a point of one tuned model.

    Attributes:
        tuned: The model's name; `all` for a merge of all, `None` for the base.
    """

    point: Point
    tuned: str | None
    benchmark: Benchmark


@dataclass(frozen=True)
class ShardDone:
    """The result of a shard.

    Attributes:
        shard: The shard.
        num_jobs: Number of its jobs.
        num_left: Number of those whose tuned models do not exist yet.
        missing: The missing tuned models.
        cost: Its cost, in words.
    """

    shard: Shard
    num_jobs: int
    num_left: int
    missing: tuple[str, ...]
    cost: str

    @property
    def sentence(self) -> str:
        """A sentence for the terminal."""
        done = f"Shard {self.shard}: {self.num_jobs - self.num_left} of its {self.num_jobs} jobs are done. {self.cost}."
        if not self.num_left:
            return f"{done} When all shards are done, the same command without --shard finishes the run."
        return (
            f"{done} {self.num_left} wait for {', '.join(self.missing)}, which other shards tune: run this command "
            "again after them, or the one without --shard, which does the rest."
        )


def shard_of(text: str) -> Shard:
    """Return the shard in a text such as `2/8`.

    Raises:
        ConfigError: it is not a shard.
    """
    number, slash, count = text.partition("/")
    if slash and number.isascii() and count.isascii() and number.isdigit() and count.isdigit():
        shard = Shard(int(number), int(count))
        if 1 <= shard.number <= shard.total:
            return shard
    raise ConfigError(f"--shard {text} is not a part", remedy="write I/N, from 1/N to N/N, such as 2/8.")


def run_shard(
    experiment: Experiment,
    directory: Path,
    shard: Shard,
    permissions: Permissions = NOTHING_ALLOWED,
) -> ShardDone:
    """Do one part of the tuning and of the sweep, in a run directory that others share.

    Args:
        experiment: The resolved settings; the same for all shards.
        directory: The run directory, made if absent; on storage that all shards see.
        shard: Which part.
        permissions: What may be run.

    Raises:
        ConfigError: the search cannot be divided.
        RunError: another shard has other settings, models or data, or a process without a shard is using the directory.
        BackmergeError: another user error; finished work is kept.
    """
    if experiment.searched_by != "grid":
        raise ConfigError(
            f"the search '{experiment.searched_by}' needs one λ after the other, so shards cannot share it",
            remedy="set search.name to grid, or run it without --shard, with a pool or Ray.",
        )
    check_apart(directory, paths_read(experiment))
    prepared = prepare(experiment, permissions)
    engine = made_engine(experiment.evaluate.engine, permissions)
    run = RunDirectory(directory, part=shard.folder)
    with run.held(is_shared=True):
        agree(run, prepared, engine)
        with session(run) as counted:
            with counted.usage.timed("fine-tuning"):
                tuned = _tuned(run, prepared, shard)
            prepared = with_inputs(prepared, tuned, run.path, engine)
            points = list(prepared.points)
            mine = part_of(_costs(prepared, planned_jobs(points, _names(prepared), prepared.benchmarks)), shard)
            missing = [name for name in _names(prepared) if name not in tuned]
            left = [slot for slot in mine if (missing if slot.point.is_joint else slot.tuned in missing)]
            jobs = jobs_of([slot for slot in mine if slot not in left], prepared, tuned)
            _measure(run, prepared, engine, jobs, shard, counted.usage, permissions=permissions)
            done = ShardDone(shard, len(mine), len(left), tuple(missing) if left else (), counted.usage.sentence)
            run.log(done.sentence)
    return done


def planned_jobs(points: Sequence[Point], tuned: Sequence[str], benchmarks: Sequence[Benchmark]) -> list[PlannedJob]:
    """Return all jobs of a grid in a row: the base's, those of each tuned model, and those of merges of all."""
    places: list[tuple[Point, str | None]] = [(point, None) for point in points if point.role == "base"]
    each = [point for point in points if point.role != "base" and not point.is_joint]
    places += [(point, name) for name in tuned for point in each]
    places += [(point, ALL) for point in points if point.is_joint]
    return [PlannedJob(point, name, benchmark) for point, name in places for benchmark in benchmarks]


def part_of(costs: Sequence[tuple[PlannedJob, float]], shard: Shard) -> list[PlannedJob]:
    """Return the shard's part of the row, cut into parts of equal cost: each job belongs where its middle is."""
    whole = sum(cost for _, cost in costs)
    before, mine = 0.0, []
    for slot, cost in costs:
        place = int(shard.total * (before + cost / 2) / whole) if whole else 0
        if min(place, shard.total - 1) == shard.number - 1:
            mine.append(slot)
        before += cost
    return mine


def jobs_of(slots: Iterable[PlannedJob], prepared: Plan, tuned: Mapping[str, Weights]) -> list[Job]:
    """Return these jobs with their models and examples, on the prompts that λ is chosen on."""
    return [
        Job(member, slot.benchmark, SELECTION, prepared.splits[slot.benchmark.name][SELECTION])
        for slot in slots
        for member in prepared.members_at(slot.point, tuned)
        if member.tuned == slot.tuned
    ]


def _costs(prepared: Plan, slots: Sequence[PlannedJob]) -> list[tuple[PlannedJob, float]]:
    """Return each job with the most tokens that it may generate; comparing likelihoods counts as one per prompt."""
    settings = prepared.experiment.evaluate

    def cost(benchmark: Benchmark) -> float:
        num_prompts = len(prepared.splits[benchmark.name][SELECTION])
        sampling = benchmark.sampling_as(settings.sampling, settings.max_new_tokens)
        each = 1 if benchmark.choices is not None else sampling.num_samples * sampling.max_new_tokens
        return float(num_prompts * each)

    return [(slot, cost(slot.benchmark)) for slot in slots]


def _measure(
    run: RunDirectory,
    prepared: Plan,
    engine: Generator,
    jobs: Sequence[Job],
    shard: Shard,
    usage: Usage,
    *,
    permissions: Permissions,
) -> None:
    """Answer, judge and score; the results are stored in the units."""
    experiment = prepared.experiment
    judges = (prepared.judge, prepared.second_judge)
    with (
        evaluator_of(
            run, engine, judges, experiment.evaluate, experiment.execution, permissions=permissions, usage=usage
        ) as evaluator,
        bar(f"Shard {shard} of the sweep", sum(len(job.examples) for job in jobs), "answers") as advance,
    ):
        evaluator.evaluate(jobs, advance)


def _names(prepared: Plan) -> list[str]:
    """Return the names of the tuned models, including those that must be made."""
    settings = prepared.experiment.finetune
    return list(prepared.tuned) if settings is None else [f"seed-{seed}" for seed in settings.seeds]


def _tuned(run: RunDirectory, prepared: Plan, shard: Shard) -> dict[str, Weights]:
    """Return the tuned models that exist once this shard has made its own, by name.

    Shard i of n tunes the i-th, (i+n)-th, ... seed, unless another process is tuning it.
    """
    settings = prepared.experiment.finetune
    if settings is None:
        return dict(prepared.tuned)
    # imported here: a run on existing models needs neither peft nor the Trainer
    from backmerge.finetuning.trainer import is_trained, training_key
    from backmerge.pipeline.tuning import tune_seeds

    places = {seed: run.tuned / f"seed-{seed}" for seed in settings.seeds}
    keys = {seed: training_key(prepared.base, prepared.training[seed], settings, seed) for seed in settings.seeds}

    def weights_of(seeds: Iterable[int]) -> dict[str, Weights]:
        chosen = {seed: places[seed] for seed in seeds}
        return tune_seeds(prepared.base, prepared.experiment.base, settings, prepared.training, chosen, log=run.log)

    for seed in settings.seeds[shard.number - 1 :: shard.total]:
        if is_trained(places[seed], keys[seed]):
            continue
        # two trainings of one seed would overwrite each other's states
        with claimed(run.path / SHARDS / f"seed-{seed}.lock") as is_free:
            if is_free:
                weights_of([seed])
            else:
                say(f"Seed {seed} is being tuned by another process.")
    return weights_of([seed for seed in settings.seeds if is_trained(places[seed], keys[seed])])


MEASURED_ON = "measured-on.json"
FREE = "execution"  # the settings that shards may differ in
Difference = tuple[str, Any, Any]  # dotted key, there, here


def measured_on(prepared: Plan, engine: Mapping[str, str]) -> dict[str, Any]:
    """Return everything that answers, verdicts and values depend on apart from the settings, as names and hashes."""
    methods = {p.method.name: p.method.code for p in prepared.points if p.method is not None and p.method.code}
    return {
        "base": prepared.base.fingerprint,
        "tuned": {name: weights.fingerprint for name, weights in prepared.tuned.items()},
        "training": {
            str(seed): key_of([[to_json(e) for e in part] for part in (data.training, data.validation)])
            for seed, data in prepared.training.items()
        },
        "benchmarks": {
            b.name: key_of([to_json(example) for example in b.examples], *filter(None, [b.code]))
            for b in prepared.benchmarks
        },
        **({"methods": methods} if methods else {}),
        "models": {name: weights.fingerprint for name, weights in prepared.models.items()},
        "guards": fingerprints_of(prepared.guards),
        "judge": prepared.judge.identity,
        "second_judge": None if prepared.second_judge is None else prepared.second_judge.identity,
        "engine": dict(engine),
    }


def agree(run: RunDirectory, prepared: Plan, engine: Generator) -> None:
    """Record what all shards must have in common, or check that it is the same.

    Raises:
        RunError: it is not the same; names the first difference.
    """
    check_kind(run.path, "experiment")
    file = run.path / "experiment.yaml"
    write_once(file, as_stored(prepared.experiment))
    theirs = {key: value for key, value in check_kind(run.path, "experiment").items() if key != FREE}
    ours = absolute_paths(prepared.experiment.model_dump(mode="json", exclude={FREE}))
    _check_same(run, theirs, ours, file, "give all shards the same settings")
    measured = measured_on(prepared, engine.identity)
    file = run.path / SHARDS / MEASURED_ON
    write_once(file, json.dumps(measured, indent=2) + "\n")
    _check_same(
        run, _read(file), measured, file, "give all shards the same data and versions, and the same kind of GPU"
    )


def is_sharded(run: Path) -> bool:
    """Return whether shards have measured in this run directory."""
    return (run / SHARDS / MEASURED_ON).is_file()


def tell_of_shards(run: RunDirectory, prepared: Plan, engine: Generator) -> None:
    """Print a note if shards used something other than this process does: their answers will not be found."""
    file = run.path / SHARDS / MEASURED_ON
    if file.exists():
        difference = _first_difference(_read(file), measured_on(prepared, engine.identity))
        if difference is not None:
            key, theirs, ours = difference
            say(
                f"The shards of {run.path} answered with {key} {theirs}, but this process has {ours}: their answers "
                "do not match this experiment, so they are generated again.",
            )


def _check_same(run: RunDirectory, theirs: Mapping[str, Any], ours: Mapping[str, Any], file: Path, remedy: str) -> None:
    difference = _first_difference(theirs, ours)
    if difference is None:
        return
    key, there, here = difference
    raise RunError(
        f"in {run.path} the first shard has '{key}' {there}, but this one has {here}",
        remedy=f"{remedy}; to use this one's, delete {file} while no shard is running: finished work is kept.",
    )


def _first_difference(theirs: Any, ours: Any, key: str = "") -> Difference | None:
    """Return the first place at which plain data differ."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        names: Iterable[Any] = {**theirs, **ours}
        pairs = [(name, theirs.get(name), ours.get(name)) for name in names]
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        pairs = [(place, *both) for place, both in enumerate(zip(theirs, ours, strict=True))]
    else:
        return None if theirs == ours else (key, theirs, ours)
    found = (_first_difference(there, here, f"{key}.{name}" if key else str(name)) for name, there, here in pairs)
    return next(filter(None, found), None)


def _read(file: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}", remedy="delete that file; finished work is kept.") from error
    return values
