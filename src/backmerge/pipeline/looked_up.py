"""What an experiment names, looked up without the hub: found and checked, or told to be had first."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from backmerge.benchmarks.bertscore import DEFAULT_MODEL, SAFE_REVISIONS
from backmerge.benchmarks.catalogue import LM_EVAL, find_benchmark
from backmerge.benchmarks.protocol import Benchmark, BenchmarkSettings, Kind
from backmerge.checkpoints.files import ITEM_BYTES
from backmerge.checkpoints.locate import HUB_ID, locate_model
from backmerge.checkpoints.reader import Checkpoint
from backmerge.config import Document, KeyPath, Problems
from backmerge.errors import BackmergeError, CheckpointError, ConfigError, DataError, RunError
from backmerge.finetuning.datasets import load_training_data
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.finetuning.task import Task
from backmerge.generation.protocol import engine_class
from backmerge.judging.model_judge import published_model
from backmerge.judging.protocol import JudgeSettings
from backmerge.pipeline import declared
from backmerge.pipeline.declared import DeclaredModel
from backmerge.pipeline.training_data import load_for
from backmerge.pipeline.workload import Load
from backmerge.planning.settings import EvaluateSettings
from backmerge.progress import count_text
from backmerge.registry import DATASETS, Permissions, is_plugin, resolve

State = Literal["checked", "to fetch", "to give", "not here", "fault"]
ANSWER_TOKENS, PROMPT_TOKENS = 300, 150  # where nothing is declared
LETTERS = 4  # of English text to a token, about


class Finding(NamedTuple):
    """What was found of one thing that an experiment names.

    Attributes:
        what: Its role, such as `base` or `safety`.
        state: `checked`: here, and as a run wants it. `to fetch`: on the hub, and not looked at. `to give`: on no hub;
            the user has to put a file there. `not here`: software of this machine. `fault`: a run would end with it.
        told: The rest, for a person.
    """

    what: str
    state: State
    told: str


@dataclass
class Findings:
    """What was found so far.

    Attributes:
        all: In the order of looking.
        num_bytes_to_fetch: Of models that are not here; 0 where nothing is known of them.
        document: Where the settings come from, for the places of faults.
        key: What is being checked.
    """

    all: list[Finding] = field(default_factory=list)
    num_bytes_to_fetch: float = 0
    document: Document | None = None
    key: KeyPath = ()

    def add(self, what: str, state: State, told: str) -> None:
        """Note something; once."""
        finding = Finding(what, state, told)
        if finding not in self.all:
            self.all.append(finding)

    def fault(self, what: str, error: BackmergeError) -> None:
        """Note what a run would end with, and where it was written."""
        place = Problems(self.document).place(self.key)
        self.add(what, "fault", f"{place}: {error}" if place else str(error))

    def of_state(self, state: State) -> list[Finding]:
        """Those of one state."""
        return [finding for finding in self.all if finding.state == state]


class NamedModel(NamedTuple):
    """A model that is named: its folder if it is here, and its size if it is known."""

    folder: Path | None
    size: DeclaredModel | None


@contextmanager
def offline() -> Iterator[None]:
    """The hub's libraries take what is in their caches, and ask nobody."""
    import huggingface_hub.constants as hub

    before, variable = hub.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")
    hub.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    _tell_datasets(is_offline=True)
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
        os.environ.pop("HF_HUB_OFFLINE")
        if variable is not None:
            os.environ["HF_HUB_OFFLINE"] = variable
        _tell_datasets(is_offline=before)


def _tell_datasets(*, is_offline: bool) -> None:
    """The library keeps a copy of the hub's setting from when it was loaded, which may have been just now."""
    config: Any = sys.modules.get("datasets.config")
    if config is not None:
        config.HF_HUB_OFFLINE = config.HF_DATASETS_OFFLINE = is_offline


def find_model(found: Findings, what: str, name: str) -> NamedModel:
    """A model's folder and size; what is on the hub and not here is noted, with its size."""
    try:
        return NamedModel(locate_model(name), None)
    except CheckpointError as error:
        if HUB_ID.fullmatch(name) is None or Path(name).expanduser().exists() or name.startswith((".", "/", "~")):
            found.fault(what, error)
            return NamedModel(None, None)
    size = declared.MODELS.get(name.partition("@")[0])
    told = "its size is not known here" if size is None else f"about {2 * size.num_parameters / 1e9:.1f} GB in bfloat16"
    found.add(what, "to fetch", f"{name}, {told}; not looked at: not here")
    found.num_bytes_to_fetch += 0 if size is None else 2 * size.num_parameters
    return NamedModel(None, size)


def size_of(checkpoint: Checkpoint) -> DeclaredModel:
    """Parameters as they lie there, and the sum of rows and columns of the linear layers, embeddings apart."""
    linear = [
        info.shape for name, info in checkpoint.infos.items() if len(info.shape) == 2 and name.endswith("_proj.weight")
    ]
    return DeclaredModel(sum(info.num_elements for info in checkpoint.infos.values()), sum(map(sum, linear)))


class Rows(NamedTuple):
    """Examples to tune on and held-out ones, of one seed."""

    num_training: int
    num_validation: int


def find_rows(settings: FinetuneSettings, base: NamedModel, found: Findings, permissions: Permissions) -> Rows:
    """What is tuned on, read as for the first seed; as declared where it is not here."""
    what, seed = "tuning data", settings.seeds[0]
    try:
        if base.folder is not None:
            data = load_for(Checkpoint(base.folder), settings, seed, permissions)
        else:
            data = load_training_data(settings.dataset, settings.data, seed, permissions)
    except (DataError, ConfigError) as error:
        return _absent_rows(settings, found, error)
    except BackmergeError as error:
        found.fault(what, error)
        return Rows(0, 0)
    rows = Rows(len(data.training), len(data.validation))
    found.add(
        what,
        "checked",
        f"{settings.dataset}: {count_text(rows.num_training, 'row')} to tune on, {rows.num_validation:,} held out",
    )
    return rows


def _absent_rows(settings: FinetuneSettings, found: Findings, error: BackmergeError) -> Rows:
    """What is declared of data that is not here; anything else about it is a fault."""
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
            found.add("tuning data", "to give", f"{name}: its file, {where}; it is on no hub that we know")
            return _counted(num_rows, settings.data.validation)
    if not hub or file is not None or not isinstance(error, DataError):
        found.fault("tuning data", error)
        return Rows(0, 0)
    size = f"{num_rows:,} rows" if num_rows else "its size is not known here"
    found.add("tuning data", "to fetch", f"{hub}, {size}; not looked at")
    return _counted(num_rows, settings.data.validation)


def _counted(num_rows: int, share: float) -> Rows:
    held_out = round(share * num_rows)
    return Rows(num_rows - held_out, held_out)


def look_up_benchmark(
    asked: BenchmarkSettings, kind: Kind, found: Findings, permissions: Permissions
) -> Benchmark | None:
    """The benchmark where it can be loaded; what is missing for it is noted."""
    name, known = asked.name, declared.BENCHMARKS.get(asked.name)
    if (name == "bbh" or name.startswith(LM_EVAL)) and importlib.util.find_spec("lm_eval") is None:
        size = f"{known.num_prompts:,} prompts of {known.hub}" if known else "its size is not known here: not counted"
        found.add(kind, "not here", f"{name} needs lm-eval: pip install 'backmerge[lm-eval]'; {size}, not looked at")
        return None
    try:
        benchmark = find_benchmark(asked, kind, permissions)
    except RunError as error:  # nothing of this machine keeps what models write from harm
        found.add(kind, "not here", f"{name}: {error.message}")
    except DataError as error:
        _note_absence(asked, kind, found, error)
    except BackmergeError as error:
        found.fault(kind, error)
    else:
        found.add(kind, "checked", f"{name}: {count_text(len(benchmark.examples), 'prompt')}")
        return benchmark
    return None


def _note_absence(asked: BenchmarkSettings, kind: Kind, found: Findings, error: DataError) -> None:
    """Data that is not here is to be fetched or given; data that is here and cannot be read is a fault."""
    name, known = asked.name, declared.BENCHMARKS.get(asked.name)
    is_absent = asked.data is None or not Path(asked.data).expanduser().exists()
    if known is not None and known.hub is None and is_absent:
        where = "as its 'data'" if asked.data is None else f"at {asked.data}"
        found.add(kind, "to give", f"{name}: its file, {where}; it is on no hub that we know")
    elif asked.data is None and known is not None:
        found.add(kind, "to fetch", f"{name}: {known.hub}, {known.num_prompts:,} prompts; not looked at")
    elif asked.data is None and name.startswith(LM_EVAL):
        found.add(kind, "to fetch", f"{name}: its size is not known here, so it is not counted; not looked at")
    else:
        found.fault(kind, error)


def load_of(asked: BenchmarkSettings, kind: Kind, benchmark: Benchmark | None, settings: EvaluateSettings) -> Load:
    """What a model is asked of a benchmark: as it is here, or as declared."""
    known = declared.BENCHMARKS.get(asked.name)
    samples = asked.num_samples or (known.num_samples if known else 1)
    limit = asked.max_new_tokens or (known.max_new_tokens if known else 512)
    num_prompts = known.num_prompts if known else 0
    prompt_tokens: float = known.prompt_tokens if known else PROMPT_TOKENS
    if benchmark is not None:
        samples = int(benchmark.sampling.get("num_samples", samples))
        num_prompts, limit = len(benchmark.examples), benchmark.max_new_tokens
        letters = sum(len(message.content) for example in benchmark.examples for message in example.messages)
        prompt_tokens = letters / LETTERS / num_prompts
    sizes = (num_prompts, num_prompts) if settings.split == "whole" else (-(-num_prompts // 2), num_prompts // 2)
    counts = [min(size, settings.limit or size) * samples for size in sizes]
    limit = min(limit, settings.max_new_tokens or limit)
    answer_tokens = min(known.answer_tokens if known else ANSWER_TOKENS, limit)
    if benchmark is not None and benchmark.choices is not None:
        answer_tokens = 0
    return Load(
        {"selection": counts[0], "confirmation": counts[1]},
        prompt_tokens,
        answer_tokens,
        samples,
        kind in ("safety", "over_refusal"),
    )


def encoder_of(asked: BenchmarkSettings, benchmark: Benchmark | None) -> str | None:
    """The encoder that a benchmark's BERTScore takes, if it has one."""
    takes = asked.name in {"chatdoctor", "openfunctions"} and asked.options.get("bertscore", True)
    if benchmark is not None and benchmark.scorer is not None:
        takes = "bertscore_f1" in benchmark.scorer.metrics
    return str(asked.options.get("model", DEFAULT_MODEL)) if takes else None


def find_encoder(found: Findings, name: str) -> None:
    """BERTScore's encoder, where its weights are safe to load."""
    revision = SAFE_REVISIONS.get(name)
    if any(finding.what == "BERTScore" and finding.told.startswith(name) for finding in found.all):
        return
    if find_model(found, "BERTScore", f"{name}@{revision}" if revision else name).folder is not None:
        found.add("BERTScore", "checked", name)


def judge_model(settings: JudgeSettings) -> str | None:
    """What a judge's weights are called; nothing where a server has them."""
    if engine_class(settings.engine.name).is_served:
        return None
    return str(settings.model or settings.engine.options.get("model") or published_model(settings.name))


def bytes_of(model: NamedModel) -> float:
    """Of its weights: as they lie here, or in bfloat16."""
    if model.folder is not None:
        return sum(
            info.num_elements * ITEM_BYTES.get(info.dtype, 2) for info in Checkpoint(model.folder).infos.values()
        )
    return 2 * model.size.num_parameters if model.size else 0
