"""Damaged and hostile files of every kind that commands read: one clear error or a result, and nothing left behind."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

from backmerge.checkpoints.reader import INDEX, Checkpoint
from backmerge.cli import app
from backmerge.commands.application import USAGE_ERROR
from backmerge.demo import EXPERIMENT
from backmerge.errors import BackmergeError, remedy_for
from backmerge.generation.protocol import EngineSettings, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.measuring.recorded import read_records
from backmerge.merging.recipe import Variant
from backmerge.merging.to_disk import write_all
from backmerge.records import Example, Message, Value, Verdict
from backmerge.reporting.report import read_run
from backmerge.runs import RunDirectory, write_results
from input_cases import statistics

SECONDS, BYTES = 20, 2_000_000_000  # of processor time and of memory, that one try may take
BATCH = 25  # tries in one process
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
TEXTS = {
    "e.yaml": """
base: demo
tuned: [demo]
merge: [{method: linear, lam: [0.2, 0.4]}]
evaluate: {utility: [demo-plans], safety: [demo-harmful]}
""",
    "m.yaml": """
merge_method: linear
models:
  - {model: base, parameters: {weight: 0.5}}
  - {model: tuned, parameters: {weight: 0.5}}
dtype: float32
""",
    "rows.jsonl": '{"id": "x", "completion": "one"}\n{"id": "y", "completion": "two"}\n',
    "rows.csv": 'id,prompt,answer\nx,"a, b",c\ny,d,e\n',
    "prompts.jsonl": '{"id": "x", "prompt": "a", "answer": "one"}\n{"id": "y", "prompt": "b", "answer": "c"}\n',
    "chats.jsonl": '{"prompt": "How?", "completion": "So."}\n{"messages": [{"role": "user", "content": "a"}, '
    '{"role": "assistant", "content": "b"}]}\n{"instruction": "c", "input": "", "output": "d"}\n' * 3,
}
DONE, REFUSED = "done", "refused"


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


class Kind(NamedTuple):
    """A kind of file, and a command that reads it.

    Attributes:
        file: What is damaged, as a pattern; of several files, one.
        needs: What the command reads besides.
        read: The command.
        is_slow: Whether it takes seconds, so that the long run makes fewer tries.
    """

    file: str
    needs: tuple[str, ...]
    read: Callable[[], object]
    is_slow: bool = False


def command(*arguments: str) -> Callable[[], object]:
    """A command line, whose errors come out as they are."""

    def call() -> None:
        done = CliRunner().invoke(app, arguments)
        if done.exception is not None:
            raise done.exception

    return call


def answer() -> object:
    """Load a model with its tokenizer and template, and let it answer."""
    engine = TransformersEngine(EngineSettings(device="cpu"))
    asked = [Example("a", (Message("user", "How do I mend a kite?"),))]
    return engine.generate(Variant(Checkpoint(Path("base"))), asked, Sampling(max_new_tokens=3), lambda *_: None)


def unit(kind: Any, stage: str) -> Callable[[], object]:
    """Take a unit of a run as done."""
    return lambda: RunDirectory(Path("run")).unit(stage, "k", kind, list, ["a"])


MERGE = ("merge", "base", "--lam", "0.5", "--out", "out", "--allow-unrelated")
FINETUNE = ("finetune", "base", "--device", "cpu", "--safety", "none", "--steps", "1", "--rank", "1", "--out", "out")
KINDS: Mapping[str, Kind] = {
    "weights": Kind("base/model.safetensors", ("base", "tuned"), command(*MERGE, "tuned")),
    "index": Kind(f"shards/{INDEX}", ("base", "shards"), command(*MERGE, "shards")),
    "a shard": Kind("shards/model-*.safetensors", ("base", "shards"), command(*MERGE, "shards")),
    "config, merged": Kind("base/config.json", ("base", "tuned"), command(*MERGE, "tuned")),
    "config, loaded": Kind("base/config.json", ("base",), answer),
    "generation config": Kind("base/generation_config.json", ("base",), answer),
    "tokenizer": Kind("base/tokenizer.json", ("base",), answer),
    "tokenizer's config": Kind("base/tokenizer_config.json", ("base",), answer),
    "chat template": Kind("base/chat_template.jinja", ("base",), answer),
    "tokenizer, merged": Kind("tuned/tokenizer*.json", ("base", "tuned"), command(*MERGE, "tuned")),
    "adapter's config": Kind("adapter/adapter_config.json", ("base", "adapter"), command(*MERGE, "adapter")),
    "adapter's config, folded": Kind(
        "adapter/adapter_config.json", ("base", "adapter"), command(*MERGE, "adapter", "--as", "adapter")
    ),
    "adapter's weights": Kind(
        "adapter/adapter_model.safetensors", ("base", "adapter"), command(*MERGE, "adapter", "--as", "adapter")
    ),
    "compared models": Kind("tuned/*.json", ("base", "tuned"), command("diff", "base", "tuned")),
    "experiment": Kind("e.yaml", (), command("run", "e.yaml", "--dry-run")),
    "mergekit's YAML": Kind("m.yaml", ("base", "tuned"), command("merge", "--config", "m.yaml", *MERGE[4:])),
    "answers": Kind(
        "rows.jsonl", ("rows.csv",), command("score", "rows.jsonl", "--benchmark", "rows.csv", "--out", "out")
    ),
    "prompts, CSV": Kind(
        "rows.csv", ("rows.jsonl",), command("score", "rows.jsonl", "--benchmark", "rows.csv", "--out", "out")
    ),
    "prompts, JSONL": Kind(
        "prompts.jsonl", ("rows.jsonl",), command("score", "rows.jsonl", "--benchmark", "prompts.jsonl", "--out", "out")
    ),
    "training rows": Kind("chats.jsonl", ("base",), command(*FINETUNE, "--data", "chats.jsonl"), is_slow=True),
    "input statistics": Kind(
        "guard.safetensors",
        ("base", "tuned"),
        command(*MERGE, "tuned", "--method", "anchored", "--guard", "guard.safetensors"),
    ),
    "records": Kind("run/records/*.jsonl", (), lambda: read_records(Path("run"))),
    "verdicts": Kind("run/units/verdicts-k.jsonl", (), unit(Verdict, "verdicts")),
    "values": Kind("run/units/values-k.jsonl", (), unit(Value, "values")),
}
# a run that tunes, measures, chooses and confirms in a few seconds
MERGE_AGAIN = ("--lam", "0.5", "--out", "merged", "--allow-unrelated")
RUN = (
    *("run", str(EXPERIMENT), "--out", "done"),
    *("--set", "finetune.seeds=[1]", "--set", "finetune.steps=3", "--set", "merge.0.lam=[0.5]"),
    *("--set", "evaluate.limit=4", "--set", "evaluate.cache=false", "--set", "choice.margin=0.95"),
    *("--set", "choice.accept=[wide_margin,too_few_prompts,answers_cut,no_gain,nothing_to_restore]"),
    *("--set", "choice.over_refusal_margin=0.95"),
)
RESUME = command(*RUN)
JUDGE_AGAIN = command("score", "done", "--judge", "demo-rule", "--out", "out")
# they begin with a run that has ended: making it takes seconds, and so does going on with it
KINDS_OF_RUNS: Mapping[str, Kind] = {
    "merged again": Kind("merged/*", ("base", "tuned"), command("merge", "base", "tuned", *MERGE_AGAIN)),
    "results": Kind("done/results.json", (), lambda: read_run(Path("done"))),
    "results, records": Kind("done/records/*", (), lambda: read_records(Path("done"))),
    "report": Kind("done/*.[jy][sa]*", (), command("report", "done"), is_slow=True),
    "report, losses": Kind("done/tuned/*/*.jsonl", (), command("report", "done"), is_slow=True),
    "reports compared": Kind(
        "done/*.[jy][sa]*", ("other",), command("report", "done", "other", "--out", "out"), is_slow=True
    ),
    "pushed": Kind("merged/*", (), command("push", "merged", "me/x", "--dry-run", "--unconfirmed")),
    "judged again": Kind("done/records/*", (), JUDGE_AGAIN, is_slow=True),
    "judged again, settings": Kind("done/*.[jy][sa]*", (), JUDGE_AGAIN),
    "to label": Kind("unlabelled/records/*", (), command("label", "unlabelled", "--number", "2")),
    "labelled": Kind("done/labels/*", (), command("label", "done", "--read", "done/labels/to_label.csv")),
    "resumed, units": Kind("done/units/*", (), RESUME, is_slow=True),
    "resumed, tuned": Kind("done/tuned/*/*", (), RESUME, is_slow=True),
    "resumed, merged": Kind("done/*merged/*/*", (), RESUME, is_slow=True),
    "resumed, others": Kind("done/*.*", (), RESUME, is_slow=True),
}


class Inputs:
    """Sound inputs, from which each try takes a copy with one damaged file."""

    def __init__(self, root: Path, base: Path, tuned: Path, adapter: Path) -> None:
        self.sound = root / "sound"
        for name, source in (("base", base), ("tuned", tuned), ("adapter", adapter)):
            shutil.copytree(source, self.sound / name)
        between = Variant(Checkpoint(self.sound / "base"), Checkpoint(self.sound / "tuned")).at(0.5)
        write_all({self.sound / "shards": between}, max_shard_bytes=40_000)
        statistics(Checkpoint(self.sound / "base"), self.sound / "guard.safetensors")
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
            found = {"schema_version": 2, "backmerge": "0.1.0", "model": "m", "judge": {"name": "j", "is_weak": False}}
            write_results(run.path, json.dumps(found))
        for name, text in TEXTS.items():
            (self.sound / name).write_text(text)

    def add_runs(self, here: Path) -> None:
        """Make a run, answers of it to label, and a merged model, as the commands do."""
        for source in ("base", "tuned"):
            shutil.copytree(self.sound / source, here / source)
        for arguments in (
            ("merge", "base", "tuned", *MERGE_AGAIN),
            RUN,
            ("report", "done"),
        ):
            command(*arguments)()
        for name in ("other", "unlabelled"):
            shutil.copytree(here / "done", here / name)
        command("label", "done", "--number", "2")()
        labels = here / "done" / "labels" / "to_label.csv"
        header, *rows = labels.read_text().splitlines()
        labels.write_text("\n".join([header, *(f"{row}yes" for row in rows), ""]))
        for name in ("done", "other", "unlabelled", "merged"):
            (here / name).replace(self.sound / name)


@pytest.fixture
def inputs(
    tmp_path: Path, tiny_base: Path, tiny_tuned: Path, make_adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> Inputs:
    """Models, an adapter, a run and files of a user's, all sound; the working directory is where copies go."""
    monkeypatch.setenv("BACKMERGE_CACHE", str(tmp_path / "cache"))
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return Inputs(tmp_path, tiny_base, tiny_tuned, make_adapter(tiny_base, seed=5))


def copy_inputs(inputs: Inputs, kind: Kind) -> None:
    """Copy here what a command reads, and nothing else."""
    for entry in Path().iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for source in {*kind.needs, Path(kind.file).parts[0]}:
        sound = inputs.sound / source
        shutil.copytree(sound, source) if sound.is_dir() else shutil.copy(sound, source)


def damage(kind: Kind, rng: random.Random) -> str:
    """Damage one file here, and return its name."""
    file = rng.choice(sorted(path for path in Path().glob(kind.file) if path.is_file()))
    file.write_bytes(damaged(file.read_bytes(), rng))
    if (
        file.parent != Path() and file.name != "digests.json" and rng.random() < 0.8
    ):  # a run of an earlier version has none
        (Path(file.parts[0]) / "digests.json").unlink(missing_ok=True)
    return str(file)


def outcome_of(read: Callable[[], object]) -> str:
    """Run a command; return how it ended."""
    try:
        read()
    except (BackmergeError, USAGE_ERROR):
        return REFUSED
    except SystemExit as ended:
        return {0: DONE, 2: REFUSED, 3: DONE}.get(ended.code, f"exit {ended.code}")  # type: ignore[call-overload]
    except OSError as error:
        return REFUSED if remedy_for(error) else repr(error)
    except Exception as error:  # noqa: BLE001 - boundary: whatever else comes out is what the test looks for
        return f"{type(error).__name__}: {str(error)[:200]}"
    return DONE


class Try(NamedTuple):
    """A command that read a damaged file.

    Attributes:
        outcome: How it ended: `DONE`, `REFUSED`, or what else came out.
        fault: What was wrong with that, if anything.
        seconds: Of processor time.
    """

    outcome: str
    fault: str
    seconds: float


def attempt(inputs: Inputs, kind: Kind, seed: int) -> Try:
    """Damage one file, and run the command, in this process."""
    copy_inputs(inputs, kind)
    file = damage(kind, random.Random(seed))  # noqa: S311 - damage, not a secret
    began = _processor_seconds()
    outcome = outcome_of(kind.read)
    seconds = _processor_seconds() - began
    there = [*Path().rglob("*"), *Path(tempfile.gettempdir()).iterdir()]
    left = [str(path) for path in there if path.name.endswith(".partial") or path.is_relative_to(tempfile.gettempdir())]
    if outcome == REFUSED and Path("out").exists():
        left.append("out")
    num_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    faults = [
        outcome if outcome not in (DONE, REFUSED) else "",
        f"left {left[:3]} behind" if left else "",
        f"took {seconds:.0f} s" if seconds > SECONDS else "",
        f"took {num_bytes / 1e9:.1f} GB" if num_bytes > BYTES else "",
        "ended with other results" if outcome == DONE and _has_other_results(inputs, kind) else "",
    ]
    return Try(outcome, "; ".join(f"{file}: {fault}" for fault in faults if fault), seconds)


def _processor_seconds() -> float:
    used = (resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def attempts(inputs: Inputs, kind: Kind, seeds: Sequence[int]) -> Iterator[Try]:
    """Make tries in a fork of this process, so that none can end it, hang it or leave anything in it.

    A try that ends the fork is wrong; another fork continues with the next one.
    """
    while seeds:
        num_made = 0
        for line in _lines_of_fork(inputs, kind, seeds[:BATCH]):
            found = Try(*json.loads(line))
            num_made += 1
            yield found
        if num_made < len(seeds[:BATCH]):
            num_made += 1
            yield Try("ended", f"the process was ended: over {SECONDS} s of processor time, or worse", SECONDS)
        seeds = seeds[num_made:]


def _lines_of_fork(inputs: Inputs, kind: Kind, seeds: Sequence[int]) -> Iterator[str]:
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks while there are threads: see below
        child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)  # a fork has none of the threads of its parent, and would wait for them
            resource.setrlimit(resource.RLIMIT_DATA, (4 * BYTES, 4 * BYTES))
            for seed in seeds:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process: nobody handles it
                signal.alarm(15 * SECONDS)  # for what waits without end; of time that others may take from us
                os.write(writer, json.dumps(attempt(inputs, kind, seed)).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, encoding="utf-8") as pipe:
        yield from pipe
    os.waitpid(child, 0)


def _has_other_results(inputs: Inputs, kind: Kind) -> bool:
    """Whether a run that continued with something damaged found other values than the sound one."""
    if kind.read is not RESUME:
        return False
    found, sound = (json.loads((place / "results.json").read_text()) for place in (Path("done"), inputs.sound / "done"))
    return bool(found["summary"] != sound["summary"] or found["choice"] != sound["choice"])


def check_tries(inputs: Inputs, kinds: Mapping[str, Kind], number: int, report: Path | None = None) -> None:
    """Make so many tries of each kind, the same ones every time; write a table of how they ended.

    Next to the table is a line for each try, so that a run that was stopped continues, and repeats what was wrong.
    """
    lines = report.with_suffix(".jsonl") if report is not None else None
    made = [json.loads(line) for line in lines.read_text().splitlines()] if lines is not None and lines.exists() else []
    tries = {(name, seed): Try(*found) for name, seed, *found in made if not found[1]}
    for name, kind in kinds.items():
        left = [seed for seed in range(number // 10 if kind.is_slow else number) if (name, seed) not in tries]
        if left:
            copy_inputs(inputs, kind)
            assert outcome_of(kind.read) == DONE, f"{name}: sound files are not read either"
        for seed, found in zip(left, attempts(inputs, kind, left), strict=True):
            tries[name, seed] = found
            if lines is not None:
                with lines.open("a") as log:
                    log.write(json.dumps([name, seed, *found]) + "\n")
    faults = [f"{name}, {seed}: {found.fault}" for (name, seed), found in tries.items() if found.fault]
    if report is not None:
        report.write_text("\n".join([*table_of(tries), "", *faults, ""]), encoding="utf-8")
    assert not faults, "\n".join([f"{len(faults)} of {len(tries)} tries are wrong:", *faults[:20]])


def table_of(tries: Mapping[tuple[str, int], Try]) -> list[str]:
    """Return the lines of a table: for each kind of file, how its tries ended."""
    ends: defaultdict[str, Counter[str]] = defaultdict(Counter)
    longest: defaultdict[str, float] = defaultdict(float)
    for (name, _), found in tries.items():
        for row in (name, "all"):
            ends[row]["wrong" if found.fault else found.outcome] += 1
            longest[row] = max(longest[row], found.seconds)
    rows = [*(row for row in ends if row != "all"), "all"]
    return [
        "| file | tries | done | refused | wrong | longest, CPU s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        *(
            f"| {row} | {found.total()} | {found[DONE]} | {found[REFUSED]} | {found['wrong']} | {longest[row]:.1f} |"
            for row in rows
            for found in [ends[row]]
        ),
    ]


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.is_slow])
def test_damaged_files_are_clear_errors(inputs: Inputs, name: str) -> None:
    """A short run: some tries for each kind of file."""
    check_tries(inputs, {name: KINDS[name]}, 4)


# of earlier long runs: values that reached peft, JSON that was read before it was checked, a token of
# no embedding, and a template of 3,000 brackets
FOUND = {
    "adapter's config, folded": (982, 1822, 3908, 6246, 6834, 7450, 8542, 8752),
    "generation config": (0, 22, 27),
    "tokenizer's config": (20,),
    "chat template": (43,),
}


@pytest.mark.parametrize("name", FOUND)
def test_damage_that_was_a_traceback_is_a_clear_error(inputs: Inputs, name: str) -> None:
    """Tries that once ended in the code of a library, or of ours."""
    assert [found.fault for found in attempts(inputs, KINDS[name], FOUND[name]) if found.fault] == []


def report_of_tries() -> Path | None:
    """Where the long run writes its table, if anywhere: BACKMERGE_FUZZ_REPORT."""
    place = os.environ.get("BACKMERGE_FUZZ_REPORT")
    return Path(place).absolute() if place else None


@pytest.mark.slow
def test_ten_thousand_damaged_files_are_clear_errors(inputs: Inputs) -> None:
    """The long run, for all kinds of files; its table goes to the file that BACKMERGE_FUZZ_REPORT names."""
    report = report_of_tries()
    inputs.add_runs(Path.cwd())
    check_tries(inputs, KINDS | KINDS_OF_RUNS, 340, report)
