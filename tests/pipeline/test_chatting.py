"""The three models of a chat: which they are, and that turning λ gives what a fresh engine gives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.errors import BackmergeError, CheckpointError, ConfigError, RunError
from backmerge.generation.protocol import EngineSettings, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.merging.recipe import Variant
from backmerge.pipeline.chatting import Chat, triple_of, triple_of_run

PROMPTS = ("How do I carve a kettle?", "How do I decorate a robot?")
SAMPLING = Sampling(max_new_tokens=24)


def new_engine() -> Any:
    """On this machine's CPU."""
    return TransformersEngine(EngineSettings(device="cpu", dtype="float32", batch_size=1))


def texts(chat: Chat, prompt: str) -> dict[str, str]:
    """Role to answer."""
    return {said.role: said.text for said in chat.ask(prompt)}


@pytest.fixture(scope="module")
def tuned(tuned_demo: Callable[[int], Path]) -> Path:
    """The embedded model, tuned on plans: an adapter."""
    return tuned_demo(42)


@pytest.fixture(scope="module")
def finished(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two methods on that adapter, under another name too, which chose λ by utility alone."""
    from backmerge.config import Document, validated
    from backmerge.pipeline.stages import run_experiment
    from backmerge.planning.settings import Experiment

    values: dict[str, Any] = {
        "base": "demo",
        "tuned": [str(tuned)],
        "merge": [{"method": "slerp", "lam": [0.5]}, {"method": "linear", "lam": [0.3]}],
        "evaluate": {
            "utility": ["demo-plans"],
            "safety": ["demo-harmful"],
            "judge": "demo-rule",
            "limit": 12,
            "engine": {"device": "cpu"},
        },
        "choice": {"rule": "weighted", "weight": 10.0},
        "report": {"num_samples": 0},
    }
    place = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("backmerge.reporting.report.write_report", lambda _: None)  # the plots take seconds
        run_experiment(validated(Experiment, Document("the test", values, {})), place)
    return place


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_ends_are_base_and_tuned(prompt: str, tuned: Path) -> None:
    """At λ=0 the merged model answers as the base, at λ=1 as the tuned one; the two differ, or nothing is shown."""
    chat = Chat(new_engine(), triple_of("demo", str(tuned)), SAMPLING)
    chat.turn(0.0)
    at_base = texts(chat, prompt)
    chat.turn(1.0)
    at_tuned = texts(chat, prompt)
    assert at_base["merged"] == at_base["base"]
    assert at_tuned["merged"] == at_tuned["tuned"]
    assert at_base["base"] != at_base["tuned"]


def test_changing_lam_equals_starting_again(tuned: Path) -> None:
    """After any turns of λ, each answer is that of a fresh engine that was never another model."""
    chat = Chat(new_engine(), triple_of("demo", str(tuned)), SAMPLING)
    for lam in (0.7, 0.2, 1.0, 0.45, 0.2):
        chat.turn(lam)
        assert chat.triple.merged_name == f"linear, λ = {lam:g}"
        live = texts(chat, PROMPTS[0])["merged"]
        fresh = Chat(new_engine(), triple_of("demo", str(tuned)).at(lam), SAMPLING)
        assert texts(fresh, PROMPTS[0])["merged"] == live, lam


def test_only_what_changed_is_asked_again(tuned: Path) -> None:
    """A turn of λ asks the merged model alone, and a λ that was there not even that; another prompt asks all three."""
    engine = new_engine()
    asked: list[Variant] = []
    generate = engine.generate
    engine.generate = lambda variant, *rest: asked.append(variant) or generate(variant, *rest)
    chat = Chat(engine, triple_of("demo", str(tuned)), SAMPLING)
    chat.ask(PROMPTS[0])
    assert len(asked) == 3
    chat.turn(0.1)
    chat.again()
    assert [variant.lam for variant in asked[3:]] == [0.1]
    chat.turn(0.4)
    chat.again()
    assert len(asked) == 4
    chat.system = "Answer as a robot."
    chat.again()
    assert len(asked) == 7
    chat.ask(PROMPTS[1])
    assert len(asked) == 10


@pytest.mark.parametrize("lam", [-0.1, 1.5, float("nan")])
def test_lam_is_a_share(lam: float, tuned: Path) -> None:
    """Anything else is refused, and λ stays."""
    chat = Chat(new_engine(), triple_of("demo", str(tuned)), SAMPLING)
    with pytest.raises(ConfigError, match="share of the tuned model"):
        chat.turn(lam)
    assert chat.triple.merged.lam == 0.4


def test_a_run_knows_its_models(finished: Path, tuned: Path) -> None:
    """Base, tuned and chosen recipe are those of the run: the same weights as its merge, and λ can be turned."""
    chosen = json.loads((finished / "results.json").read_text())["choice"]
    triple = triple_of_run(finished)
    base = Checkpoint(model_directory())
    assert triple.base.identity == {"base": base.fingerprint}
    assert triple.merged.method.name == chosen["series"]
    assert triple.merged.lam == chosen["lam"]
    assert triple.has_lam
    assert triple.at(0.25).merged.lam == 0.25
    assert triple.tuned.identity == triple_of("demo", str(tuned)).tuned.identity


def test_a_run_finds_its_models_from_any_folder(
    finished: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a run of an earlier version, which stored a relative path: in the folder that contains the run."""
    shutil.copytree(tuned, tmp_path / "own" / tuned.name)
    run = shutil.copytree(finished, tmp_path / "own" / "run")
    settings = yaml.safe_load((run / "experiment.yaml").read_text())
    (run / "experiment.yaml").write_text(yaml.safe_dump({**settings, "tuned": [tuned.name]}))
    (tmp_path / tuned.name).mkdir()  # another folder with that name
    monkeypatch.chdir(tmp_path)
    assert triple_of_run(run).tuned.identity == triple_of("demo", str(tuned)).tuned.identity
    shutil.rmtree(tmp_path / "own" / tuned.name)
    monkeypatch.chdir("/")
    with pytest.raises(CheckpointError, match=rf"no model folder at '{tuned.name}' \(a path relative to /\)"):
        triple_of_run(run)


def test_the_merged_model_on_the_disk_says_the_same(finished: Path) -> None:
    """What is merged in memory answers as what the run wrote."""
    (written,) = [card.parent for card in finished.glob("*/*/backmerge.json")]
    chat = Chat(new_engine(), triple_of_run(finished), SAMPLING)
    from_disk = Chat(new_engine(), triple_of("demo", str(written)), SAMPLING)
    assert texts(chat, PROMPTS[0])["merged"] == texts(from_disk, PROMPTS[0])["tuned"]


def changed(finished: Path, place: Path, change: dict[str, Any]) -> Path:
    """A copy of a run whose results say something else."""
    shutil.copytree(finished, place)
    results = json.loads((place / "results.json").read_text())
    (place / "results.json").write_text(json.dumps({**results, **change}))
    (place / "digests.json").unlink()  # as of a run of an earlier version: what is changed would be found by them
    return place


def test_a_run_that_chose_nothing_is_merged_all_the_same(finished: Path, tmp_path: Path) -> None:
    """Linearly, at 0.4, and it is reported; where the tuned model was chosen, at 1."""
    choice = json.loads((finished / "results.json").read_text())["choice"]
    nothing = triple_of_run(changed(finished, tmp_path / "a", {"choice": {**choice, "point": None}}))
    assert (nothing.merged.method.name, nothing.merged.lam) == ("linear", 0.4)
    assert "chose no recipe" in nothing.told
    all_of_it = triple_of_run(changed(finished, tmp_path / "b", {"choice": {**choice, "point": "tuned"}}))
    assert (all_of_it.merged.method.name, all_of_it.merged.lam) == ("linear", 1.0)


def test_another_kind_of_run_is_refused(finished: Path, tmp_path: Path) -> None:
    """An unfinished run, another kind, a tuned model that it has not, and weights that are no longer those measured."""
    with pytest.raises(ConfigError, match="has no tuned model 'x'"):
        triple_of_run(finished, "x")
    results = json.loads((finished / "results.json").read_text())
    other = [{**results["tuned"][0], "fingerprint": "0" * 32}]
    with pytest.raises(RunError, match="has changed since the run measured it"):
        triple_of_run(changed(finished, tmp_path / "a", {"tuned": other}))
    (tmp_path / "a" / "results.json").unlink()
    with pytest.raises(BackmergeError, match=r"results\.json"):
        triple_of_run(tmp_path / "a")
    (tmp_path / "a" / "experiment.yaml").write_text("model: demo\n")
    with pytest.raises(RunError, match="not a run with a merge"):
        triple_of_run(tmp_path / "a")


def test_a_method_without_lam_is_not_turned(tuned: Path) -> None:
    """Where a method decides by itself how far to go there is nothing to turn."""
    triple = triple_of("demo", str(tuned))._replace(has_lam=False)
    with pytest.raises(ConfigError, match="no λ to change"):
        triple.at(0.3)
