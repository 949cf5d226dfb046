"""What an experiment names: found on this machine, or noted as missing with its declared size.

A run ends with the missing things. A dry run does not use the hub: it notes what must be downloaded, given or
installed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from backmerge.benchmarks.bertscore import DEFAULT_MODEL, SAFE_REVISIONS
from backmerge.benchmarks.catalogue import LM_EVAL, find_benchmark
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, Kind
from backmerge.checkpoints.files import num_bytes
from backmerge.checkpoints.locate import HUB_ID, locate_model
from backmerge.checkpoints.reader import Checkpoint
from backmerge.config import Document, KeyPath, Problems
from backmerge.errors import BackmergeError, CheckpointError, ConfigError, DataError, RunError
from backmerge.finetuning.datasets import Task, TrainingData, load_training_data
from backmerge.finetuning.overlap import load_for
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.finetuning.validation import Encoder
from backmerge.generation.protocol import engine_class
from backmerge.judging.model_judge import ModelJudge, published_model
from backmerge.judging.protocol import Judge, JudgeSettings
from backmerge.planning import declared
from backmerge.planning.declared import ModelSize
from backmerge.planning.settings import EvaluateSettings
from backmerge.progress import count_text
from backmerge.registry import DATASETS, Permissions, is_plugin, resolve

State = Literal["checked", "to fetch", "to provide", "not here", "fault"]


class Finding(NamedTuple):
    """A finding about one thing that an experiment names.

    Attributes:
        what: Its role, such as `base` or `safety`.
        state: `checked`: on this machine, and as a run needs it. `to fetch`: on the hub. `to provide`: not on the hub;
            the user must provide a file. `not here`: software that is not installed. `fault`: a run would end with it.
        detail: The rest, for a person.
    """

    what: str
    state: State
    detail: str


class Findings(Problems):
    """The findings about the things that an experiment names, and all problems with them.

    Args:
        document: Where the settings come from.
        is_dry_run: Whether something may be missing.

    Attributes:
        notes: Things that are here and things that may be missing; in the order of the checks, each once.
        num_bytes_to_fetch: Size of models that must be downloaded; 0 for those of unknown size.
    """

    def __init__(self, document: Document | None = None, *, is_dry_run: bool = False) -> None:
        super().__init__(document)
        self.is_dry_run = is_dry_run
        self.notes: list[Finding] = []
        self.num_bytes_to_fetch = 0.0

    def add(self, what: str, state: State, detail: str) -> None:
        """Note something, once."""
        finding = Finding(what, state, detail)
        if finding not in self.notes:
            self.notes.append(finding)

    @property
    def is_complete(self) -> bool:
        """Return whether nothing is wrong or missing so far."""
        return not self.found and all(finding.state == "checked" for finding in self.notes)

    @property
    def all(self) -> list[Finding]:
        """Return the notes, and each problem with its place."""
        faults = []
        for problem in self.found:
            place = self.place(problem.at)
            detail = ": ".join(filter(None, (place, str(problem.error))))
            faults.append(Finding(_role(problem.at), "fault", detail))
        return [*self.notes, *faults]

    def locate(self, what: str, name: str) -> Path | None:
        """Return a model's folder; `None` if it is on the hub and a dry run does not download it, which is noted.

        Raises:
            CheckpointError: it is missing.
        """
        try:
            return locate_model(name)
        except CheckpointError:
            is_local = Path(name).expanduser().exists() or name.startswith((".", "/", "~"))
            if not self.is_dry_run or is_local or HUB_ID.fullmatch(name) is None:
                raise
        size = declared.model_size(name)
        known = "its size is not known" if size is None else f"about {size.num_bytes / 1e9:.1f} GB in bfloat16"
        self.add(what, "to fetch", f"{name}, {known}; not checked: not on this machine")
        self.num_bytes_to_fetch += 0 if size is None else size.num_bytes
        return None


def _role(at: KeyPath) -> str:
    """Return a name for the value of a key."""
    match at:
        case ("evaluate", "judge" | "second_judge", "engine", *_):
            return "judge's engine"
        case ("evaluate", str(kind), *_):
            return kind.replace("second_judge", "second judge")
        case ("finetune", "dataset", *_):
            return "tuning data"
        case ():
            return "settings"
    return str(at[0])


@contextmanager
def offline() -> Iterator[None]:
    """Let the hub's libraries use their caches only."""
    import huggingface_hub.constants as hub

    before, variable = hub.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
    hub.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    _set_datasets(is_offline=True)
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
        os.environ.pop("HF_HUB_OFFLINE")
        if variable is not None:
            os.environ["HF_HUB_OFFLINE"] = variable
        _set_datasets(is_offline=before)


def _set_datasets(*, is_offline: bool) -> None:
    """Set the library datasets' own copy of the hub's setting, which it makes when it is loaded."""
    config: Any = sys.modules.get("datasets.config")
    if config is not None:
        config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = is_offline


def size_of(checkpoint: Checkpoint) -> ModelSize:
    """Return the size of a checkpoint from its files; the linear layers are those of attention and MLP."""
    linear = [
        info.shape for name, info in checkpoint.infos.items() if len(info.shape) == 2 and name.endswith("_proj.weight")
    ]
    return ModelSize(
        sum(info.num_elements for info in checkpoint.infos.values()),
        sum(map(sum, linear)),
        sum(num_bytes(name, info) for name, info in checkpoint.infos.items()),
    )


class Rows(NamedTuple):
    """The numbers of training and held-out examples, for one seed."""

    num_training: int
    num_validation: int


class TuningData(NamedTuple):
    """The data that each seed is tuned on, if they are on this machine; and the number of rows for one seed."""

    by_seed: dict[int, TrainingData]
    rows: Rows


def find_training(
    settings: FinetuneSettings, base: Checkpoint | None, found: Findings, permissions: Permissions
) -> TuningData:
    """Find the rows to tune on; without the base they are only counted.

    Raises:
        BackmergeError: they are missing, or cannot be read.
    """
    if base is None and not found.is_dry_run:
        return TuningData({}, Rows(0, 0))
    try:
        if base is not None:
            by_seed = {seed: load_for(base, settings, seed, permissions) for seed in settings.seeds}
            data = by_seed[settings.seeds[0]]
        else:
            by_seed = {}
            data = load_training_data(settings.dataset, settings.data, settings.seeds[0], permissions)
    except (DataError, ConfigError) as error:
        rows = _declared_rows(settings, found, error) if found.is_dry_run else None
        if rows is None:
            raise
        return TuningData({}, rows)
    rows = Rows(len(data.training), len(data.validation))
    found.add(
        "tuning data",
        "checked",
        f"{settings.dataset}: {count_text(rows.num_training, 'row')} to train on, {rows.num_validation:,} held out",
    )
    return TuningData(by_seed, rows)


def _declared_rows(settings: FinetuneSettings, found: Findings, error: BackmergeError) -> Rows | None:
    """Return the size of data that are not on this machine; `None` if something else is wrong with them."""
    name, file = settings.dataset, settings.data.file
    task = resolve(DATASETS, name)() if name in DATASETS.entries else None
    is_on_hub = task is None and HUB_ID.fullmatch(name) and not Path(name).exists() and not is_plugin(name)
    num_rows = settings.data.num_examples or declared.NUM_ROWS.get(name, 0)
    hub = name if is_on_hub else ""
    if isinstance(task, Task):
        num_rows = settings.data.num_examples or task.num_examples or num_rows
        hub = task.hub.name if task.hub is not None else ""
        if task.hub is None and (file is None or not Path(file).expanduser().exists()):
            where = "as finetune.data.file" if file is None else f"at {file}"
            found.add("tuning data", "to provide", f"{name}: its file, {where}; we know of no copy on the hub")
            return _counted(num_rows, settings.data.validation)
    if not hub or file is not None or not isinstance(error, DataError):
        return None
    size = f"{num_rows:,} rows" if num_rows else "its size is not known"
    found.add("tuning data", "to fetch", f"{hub}, {size}; not checked")
    return _counted(num_rows, settings.data.validation)


def _counted(num_rows: int, share: float) -> Rows:
    held_out = round(share * num_rows)
    return Rows(num_rows - held_out, held_out)


def look_up_benchmark(
    asked: BenchmarkSettings, kind: Kind, found: Findings, permissions: Permissions
) -> Benchmark | None:
    """Return a benchmark; `None` if something that it needs is missing in a dry run, which is noted.

    Raises:
        BackmergeError: it is missing, or cannot be used.
    """
    name, known = asked.name, declared.BENCHMARKS.get(asked.name)
    needs_lm_eval = name == "bbh" or name.startswith(LM_EVAL)
    if found.is_dry_run and needs_lm_eval and importlib.util.find_spec("lm_eval") is None:
        size = f"{known.num_prompts:,} prompts of {known.hub}" if known else "its size is not known: not counted"
        found.add(kind, "not here", f"{name} needs lm-eval: pip install 'backmerge[lm-eval]'; {size}, not checked")
        return None
    try:
        benchmark = find_benchmark(asked, kind, permissions)
    except RunError as error:  # nothing on this machine isolates model-written code
        if not found.is_dry_run:
            raise
        found.add(kind, "not here", f"{name}: {error.message}")
        return None
    except DataError:
        if not (found.is_dry_run and _is_absent(asked, kind, found)):
            raise
        return None
    found.add(kind, "checked", f"{name}: {count_text(len(benchmark.examples), 'prompt')}")
    encoder = _encoder_of(asked, benchmark) if found.is_dry_run else None
    if encoder is not None:
        find_encoder(found, encoder)
    return benchmark


def _is_absent(asked: BenchmarkSettings, kind: Kind, found: Findings) -> bool:
    """Return whether a benchmark's data must be downloaded or given, and note it; otherwise it is unreadable."""
    name, known = asked.name, declared.BENCHMARKS.get(asked.name)
    is_missing = asked.data is None or not Path(asked.data).expanduser().exists()
    if known is not None and known.hub is None and is_missing:
        where = "as its 'data'" if asked.data is None else f"at {asked.data}"
        found.add(kind, "to provide", f"{name}: its file, {where}; we know of no copy on the hub")
    elif asked.data is None and known is not None:
        found.add(kind, "to fetch", f"{name}: {known.hub}, {known.num_prompts:,} prompts; not checked")
    elif asked.data is None and name.startswith(LM_EVAL):
        found.add(kind, "to fetch", f"{name}: its size is not known, so it is not counted; not checked")
    else:
        return False
    encoder = _encoder_of(asked, None)
    if encoder is not None:
        find_encoder(found, encoder)
    return True


def _encoder_of(asked: BenchmarkSettings, benchmark: Benchmark | None) -> str | None:
    """Return the encoder of a benchmark's BERTScore, if it has one."""
    takes = asked.name in {"chatdoctor", "openfunctions"} and asked.options.get("bertscore", True)
    if benchmark is not None and benchmark.scorer is not None:
        takes = "bertscore_f1" in benchmark.scorer.metrics
    return str(asked.options.get("model", DEFAULT_MODEL)) if takes else None


def encoder_of(settings: EvaluateSettings) -> Encoder:
    """Return BERTScore's encoder for held-out rows: that of the first benchmark that names one."""
    named = (one.options for one in settings.utility if "model" in one.options)
    options = next(named, None)
    return Encoder() if options is None else Encoder(str(options["model"]), options.get("layer"))


def find_encoder(found: Findings, name: str) -> None:
    """Find BERTScore's encoder, at the revision whose weights are safe to load; a run loads it with the scorer."""
    revision = SAFE_REVISIONS.get(name)
    is_noted = any(finding.what == "BERTScore" and finding.detail.startswith(name) for finding in found.notes)
    if found.is_dry_run and not is_noted and found.locate("BERTScore", f"{name}@{revision}" if revision else name):
        found.add("BERTScore", "checked", name)


def find_judge_model(what: str, settings: JudgeSettings, judge: Judge, found: Findings) -> float | None:
    """Find the model of a judge.

    Returns:
        Its parameters; 0 for a judge without a model on this machine, `None` if its size is not known.

    Raises:
        BackmergeError: it is missing.
    """
    if not found.is_dry_run:
        _ = judge.identity  # includes its model's: missing files are found before hours of answers
        return 0.0
    if not isinstance(judge, ModelJudge) or engine_class(settings.engine.name).is_served:
        found.add(what, "checked", f"{settings.name}{'' if judge.is_weak is False else ', weak'}")
        return 0.0
    name = str(settings.model or settings.engine.options.get("model") or published_model(settings.name))
    folder = found.locate(what, name)
    if folder is None:
        size = declared.model_size(name)
        return None if size is None else size.num_parameters
    found.add(what, "checked", f"{settings.name}: {name}")
    return size_of(Checkpoint(folder)).num_parameters
