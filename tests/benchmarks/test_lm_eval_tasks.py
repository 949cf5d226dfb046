"""Tasks of lm-evaluation-harness are found and loaded as the harness would, or refused by name."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

import numpy as np
from lm_eval_folder import (
    CHOOSING,
    GENERATING,
    TURNS,
    filled,
    harness,
    load,
    write_task,
)

from backmerge.benchmarks import lm_eval_tasks
from backmerge.benchmarks.lm_eval_bridge import load_lm_eval_task
from backmerge.benchmarks.lm_eval_model import BackmergeLM
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.errors import BackmergeError, ConfigError, DataError, GenerationError
from backmerge.generation.chat import load_tokenizer, prompt_text
from backmerge.generation.protocol import EngineSettings
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.merging.recipe import Variant
from backmerge.registry import NOTHING_ALLOWED, Permissions

# what the harness and its dependencies do that this Python or this transformers calls old
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Task files of every kind."""
    return filled(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(autouse=True)
def _no_survey_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """For its report the harness asks pip and git about the machine, which takes longer than all else."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: None)


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    """One engine for all tests."""
    return TransformersEngine(EngineSettings(device="cpu", dtype="float32", batch_size=4))


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    """The embedded model, with a context of 256 tokens."""
    return Checkpoint(model_directory())


def test_shots_as_asked(folder: Path) -> None:
    """The number of shots is the task's, or the one asked for; a task that says 0 keeps it, as in the harness."""

    def num_turns(name: str, shots: int | None) -> int:
        return len(load(folder, name, num_fewshot=shots).examples[9].messages)

    assert [num_turns("generating", shots) for shots in (None, 0, 3)] == [5, 1, 7]
    assert num_turns("last_word", 1) == 3
    write_task(folder, "never", GENERATING.replace("num_fewshot: 2", "num_fewshot: 0"))
    assert num_turns("never", 3) == 1
    assert load(folder, "generating", num_fewshot=3).identity["generating"] == "Yaml, 3 shots"


FAULTS: dict[str, tuple[dict[str, Any], type[BackmergeError], str]] = {
    "no leave": ({"permissions": NOTHING_ALLOWED}, ConfigError, "may run code"),
    "no such folder": ({"task_path": Path("absent")}, ConfigError, "there is no file absent"),
    "beams": ({"name": "beams"}, GenerationError, "asks to generate with num_beams=4"),
    "code": ({"name": "unsafe"}, DataError, "runs model-written code"),
    "pictures": ({"name": "pictures"}, DataError, "for images"),
    "data that is not there": ({"name": "empty_handed"}, DataError, "the data of lm-eval's task 'empty_handed'"),
    "a package": ({"name": "wanting"}, DataError, "needs a package that is not installed: .*no_such_package_anywhere"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_run_is_refused(folder: Path, fault: str) -> None:
    """Each fault is one error that says what it is about."""
    write_task(folder, "beams", GENERATING.replace("do_sample: false", "num_beams: 4"))
    write_task(folder, "unsafe", GENERATING + "unsafe_code: true\n")
    write_task(folder, "pictures", GENERATING + "doc_to_image: q\n")
    write_task(folder, "empty_handed", GENERATING, "absent.jsonl")
    write_task(folder, "wanting", GENERATING + "process_results: !function wanting.score\n")
    (folder / "wanting.py").write_text("import no_such_package_anywhere\n", encoding="utf-8")
    changes, error, words = FAULTS[fault]
    options = {"name": "generating", "task_path": folder, "permissions": Permissions(plugins=True), **TURNS, **changes}
    with pytest.raises(error, match=words):
        load_lm_eval_task(**options)


@pytest.mark.slow
def test_a_name_that_is_not_there(folder: Path) -> None:
    """After a look at everything that the harness has, the closest name is offered."""
    with pytest.raises(ConfigError, match="named 'generatin'; did you mean 'generating'"):
        load(folder, "generatin")


def test_groups_that_ask_in_several_ways(folder: Path) -> None:
    """A group whose tasks generate unlike, or compare likelihoods, says so where one setting is asked for."""
    write_task(folder, "longer", GENERATING.replace("max_gen_toks: 12", "max_gen_toks: 13"))
    for name, members in {"unlike": "generating, longer", "mixed": "generating, choosing"}.items():
        (folder / f"{name}.yaml").write_text(f"group: {name}\ntask: [{members}]\n", encoding="utf-8")
        with pytest.raises(DataError, match="give its tasks one at a time"):
            _ = load(folder, name).sampling


def test_the_callers_random_state_stays(folder: Path) -> None:
    """Loading seeds as the harness does, and puts back what it found; twice the same shots are drawn."""
    write_task(folder, "shuffling", CHOOSING + "process_docs: !function shuffling.shuffled\n")
    (folder / "shuffling.py").write_text(
        "import random\n\ndef shuffled(rows):\n"
        "    return rows.map(lambda row: {'q': row['q'] + str(random.random())}, load_from_cache_file=False)\n",
        encoding="utf-8",
    )
    random.seed(5)
    np.random.seed(5)
    before = (random.getstate(), np.random.get_state()[1].tolist())
    first = load(folder, "shuffling").examples
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    assert load(folder, "shuffling").examples == first


def test_a_task_that_draws_as_it_loads_is_the_harnesss(
    engine: TransformersEngine, base: Checkpoint, folder: Path
) -> None:
    """What a task draws from global state while it loads is what it draws under `simple_evaluate`."""
    test_the_callers_random_state_stays(folder)
    seen = load(folder, "shuffling").examples
    theirs = harness(BackmergeLM(engine, Variant(base)), folder, "shuffling", **TURNS)
    tokenizer = load_tokenizer(base.directory)
    rendered = {f"shuffling/{row['doc_id']}": row["arguments"][0][0] for row in theirs["samples"]["shuffling"]}
    assert {e.id: prompt_text(tokenizer, e) for e in seen} == rendered


def test_the_harness_is_left_as_it_was(folder: Path) -> None:
    """Templates are kept only while tasks load, and its log's level comes back."""
    import logging

    from lm_eval import utils

    level = logging.getLogger("lm_eval").level
    load(folder, "generating")
    assert "from_string" not in vars(utils.env)
    assert logging.getLogger("lm_eval").level == level


def test_one_folder_is_indexed_for_a_name_of_the_harness() -> None:
    """A task, and a group of tasks in one folder, are found among few; both lead to what the file says."""
    for name, folder in {"gsm8k": "gsm8k", "bbh_cot_fewshot": "cot_fewshot"}.items():
        manager = lm_eval_tasks._manager(name, None)
        assert len(manager.all_tasks) < 100
        assert Path(manager.task_index[name].yaml_path).parent.name == folder
        assert not lm_eval_tasks._unknown(manager.task_index, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ai2_arc", "leaderboard", "mmlu", "copa", "xwinograd", "bbh", "no_such_task"])
def test_index_of_few_rows_finds_the_same_as_the_full_index(name: str) -> None:
    """Tags lead to the whole index; for groups of groups and names that many files mention, nothing is missed."""
    from lm_eval.tasks import TaskManager

    def leaves(index: Any, name: str) -> dict[str, str]:
        entry = index.get(name)
        if entry is None or entry.kind.name in {"TASK", "PY_TASK"}:
            return {name: str(entry and entry.yaml_path)}
        members = entry.tags if entry.kind.name == "TAG" else lm_eval_tasks._members(entry.cfg)
        return {leaf: path for member in members for leaf, path in leaves(index, member).items()}

    whole = TaskManager().task_index
    assert leaves(lm_eval_tasks._manager(name, None).task_index, name) == leaves(whole, name)


def test_an_old_or_absent_harness_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """One line with the pip command."""
    monkeypatch.setattr(lm_eval_tasks.importlib.metadata, "version", lambda _: "0.4.9.2")
    with pytest.raises(ConfigError, match=r"lm-eval 0\.4\.9\.2 is installed, but 0\.4\.12 or later") as caught:
        load(folder, "generating")
    assert caught.value.remedy == "pip install 'backmerge[lm-eval]'"

    def absent(_: str) -> str:
        raise lm_eval_tasks.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(lm_eval_tasks.importlib.metadata, "version", absent)
    with pytest.raises(ConfigError, match="which is not installed"):
        load(folder, "generating")
