"""A part of a sweep, for one of several processes that share a run directory, on one machine or many.

Each process tunes its share of the seeds, then answers, judges and scores its share of the grid, and stops before λ is
chosen; whoever runs the experiment last, without a shard, finds all of that done and goes on. Nobody talks to anybody:

- what is whose follows from the settings alone. The jobs stand in a row, tuned model by tuned model and λ by λ, and the
  row is cut into parts that cost alike, so that a model's benchmarks stay together but at the cuts;
- a job leaves units, named by a hash of all that they depend on and written whole by a temporary of their own, so that
  what is done twice, or by a shard of another count, does no harm;
- a job whose tuned model is not there yet is left: nobody waits for anybody.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from backmerge.benchmarks.protocol import Benchmark
from backmerge.benchmarks.split import Split
from backmerge.checkpoints.reader import Weights
from backmerge.errors import ConfigError
from backmerge.generation.protocol import Generator, made_engine
from backmerge.measuring.answer import Job
from backmerge.measuring.evaluate import evaluator_of
from backmerge.measuring.usage import Spent, session
from backmerge.outputs import check_apart, paths_read
from backmerge.pipeline.guarding import with_inputs
from backmerge.pipeline.shared_ground import agree
from backmerge.planning.points import ALL, Point
from backmerge.planning.prepare import Plan, prepare
from backmerge.planning.settings import Experiment
from backmerge.progress import bar, say
from backmerge.registry import NOTHING_ALLOWED, Permissions
from backmerge.runs import SHARDS, RunDirectory, claimed

SELECTION: Split = "selection"


class Shard(NamedTuple):
    """One of several parts.

    Attributes:
        number: From 1.
        total: Of how many.
    """

    number: int
    total: int

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    @property
    def folder(self) -> str:
        """What its logs are called by."""
        return f"{self.number}-of-{self.total}"


class Slot(NamedTuple):
    """A job before its model is there: a benchmark, measured at a point of one tuned model.

    Attributes:
        tuned: Its name; `all` for a merge of all, nothing for the base.
    """

    point: Point
    tuned: str | None
    benchmark: Benchmark


@dataclass(frozen=True)
class ShardDone:
    """What a shard left.

    Attributes:
        shard: Which.
        num_jobs: Its jobs.
        num_left: Those of them whose tuned models are not there yet.
        missing: These tuned models.
        cost: What it cost, in words.
    """

    shard: Shard
    num_jobs: int
    num_left: int
    missing: tuple[str, ...]
    cost: str

    @property
    def sentence(self) -> str:
        """For the person at the terminal."""
        done = f"Shard {self.shard}: {self.num_jobs - self.num_left} of its {self.num_jobs} jobs are done. {self.cost}."
        if not self.num_left:
            return f"{done} Once all shards are, the same command without --shard finishes the run."
        return (
            f"{done} {self.num_left} wait for {', '.join(self.missing)}, which other shards tune: give this command "
            "again after them, or the one without --shard, which does what is left."
        )


def shard_of(text: str) -> Shard:
    """The shard that `2/8` names.

    Raises:
        ConfigError: it names none.
    """
    number, slash, count = text.partition("/")
    if slash and number.isascii() and count.isascii() and number.isdigit() and count.isdigit():
        shard = Shard(int(number), int(count))
        if 1 <= shard.number <= shard.total:
            return shard
    raise ConfigError(f"--shard {text} names no part", remedy="write I/N, from 1/N to N/N, such as 2/8.")


def run_shard(
    experiment: Experiment,
    directory: Path,
    shard: Shard,
    permissions: Permissions = NOTHING_ALLOWED,
) -> ShardDone:
    """Do one part of the tuning and of the sweep, over a run directory that others share.

    Args:
        experiment: The resolved settings; the same for all shards.
        directory: The run directory, made if absent; on storage that all shards see.
        shard: Which part.
        permissions: What may be run.

    Raises:
        ConfigError: the search cannot be cut into parts.
        RunError: another shard has other settings or measures on something else, or a process works here that shares
            the directory with none.
        BackmergeError: something else that the user can mend; what was done so far is kept.
    """
    if experiment.searched_by != "grid":
        raise ConfigError(
            f"the search '{experiment.searched_by}' asks for one λ after the other, which no shards can share",
            remedy="set search.name to grid, or run it without --shard, on a pool or on Ray.",
        )
    check_apart(directory, paths_read(experiment))
    prepared = prepare(experiment, permissions)
    engine = made_engine(experiment.evaluate.engine, permissions)
    run = RunDirectory(directory, part=shard.folder)
    with run.held(is_shared=True):
        agree(run, prepared, engine)
        with session(run) as counted:
            with counted.spent.timed("fine-tuning"):
                tuned = _tuned(run, prepared, shard)
            prepared = with_inputs(prepared, tuned, run.path)
            points = list(prepared.points)
            mine = part_of(_costs(prepared, slots_of(points, _names(prepared), prepared.benchmarks)), shard)
            missing = [name for name in _names(prepared) if name not in tuned]
            left = [slot for slot in mine if (missing if slot.point.is_joint else slot.tuned in missing)]
            jobs = jobs_of([slot for slot in mine if slot not in left], prepared, tuned)
            _measure(run, prepared, engine, jobs, shard, counted.spent, permissions=permissions)
            done = ShardDone(shard, len(mine), len(left), tuple(missing) if left else (), counted.spent.sentence)
            run.log(done.sentence)
    return done


def slots_of(points: Sequence[Point], tuned: Sequence[str], benchmarks: Sequence[Benchmark]) -> list[Slot]:
    """All jobs of a grid in a row: the base's, those of each tuned model, and those of merges of all."""
    places: list[tuple[Point, str | None]] = [(point, None) for point in points if point.role == "base"]
    each = [point for point in points if point.role != "base" and not point.is_joint]
    places += [(point, name) for name in tuned for point in each]
    places += [(point, ALL) for point in points if point.is_joint]
    return [Slot(point, name, benchmark) for point, name in places for benchmark in benchmarks]


def part_of(costs: Sequence[tuple[Slot, float]], shard: Shard) -> list[Slot]:
    """The shard's piece of the row, cut into pieces that cost alike: each job goes where its middle lies."""
    whole = sum(cost for _, cost in costs)
    before, mine = 0.0, []
    for slot, cost in costs:
        place = int(shard.total * (before + cost / 2) / whole) if whole else 0
        if min(place, shard.total - 1) == shard.number - 1:
            mine.append(slot)
        before += cost
    return mine


def jobs_of(slots: Iterable[Slot], prepared: Plan, tuned: Mapping[str, Weights]) -> list[Job]:
    """The jobs in these places, on the prompts that λ is chosen on."""
    return [
        Job(member, slot.benchmark, SELECTION, prepared.splits[slot.benchmark.name][SELECTION])
        for slot in slots
        for member in prepared.members_at(slot.point, tuned)
        if member.tuned == slot.tuned
    ]


def _costs(prepared: Plan, slots: Sequence[Slot]) -> list[tuple[Slot, float]]:
    """Each job with the most tokens that it may generate; comparing likelihoods costs about one for each prompt."""
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
    spent: Spent,
    *,
    permissions: Permissions,
) -> None:
    """Answer, judge and score; what is measured stays in the units."""
    experiment = prepared.experiment
    judges = (prepared.judge, prepared.second_judge)
    evaluator = evaluator_of(
        run, engine, judges, experiment.evaluate, experiment.execution, permissions=permissions, spent=spent
    )
    with bar(f"Shard {shard} of the sweep", sum(len(job.examples) for job in jobs), "answers") as advance:
        evaluator.evaluate(jobs, advance)
    engine.release()


def _names(prepared: Plan) -> list[str]:
    """The tuned models, also those that are still to be made."""
    settings = prepared.experiment.finetune
    return list(prepared.tuned) if settings is None else [f"seed-{seed}" for seed in settings.seeds]


def _tuned(run: RunDirectory, prepared: Plan, shard: Shard) -> dict[str, Weights]:
    """The tuned models that are there once this shard has made its own, by name.

    Shard i of n tunes the i-th, (i+n)-th, ... seed, unless another process is at it.
    """
    settings = prepared.experiment.finetune
    if settings is None:
        return dict(prepared.tuned)
    # imported here: a run on models that exist needs neither peft nor the Trainer
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
        # two trainings of a seed would write each other's states
        with claimed(run.path / SHARDS / f"seed-{seed}.lock") as is_free:
            if is_free:
                weights_of([seed])
            else:
                say(f"Seed {seed} is being tuned by another process.")
    return weights_of([seed for seed in settings.seeds if is_trained(places[seed], keys[seed])])
