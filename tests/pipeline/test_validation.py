"""λ by the rows that the tuning held out: the embedded model, tuned for a moment with two seeds."""

# ruff: noqa: ARG002, D102 - stand-ins take what the real ones take

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar, NamedTuple, cast

import pytest
import torch

from backmerge.benchmarks.bertscore import BertScorer
from backmerge.benchmarks.split import limited
from backmerge.checkpoints.reader import Weights
from backmerge.errors import ConfigError
from backmerge.finetuning.datasets import TrainingData
from backmerge.finetuning.encoding import encode
from backmerge.generation.chat import load_tokenizer
from backmerge.generation.protocol import Drawing, EngineSettings, Generator, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.judging.refusal_phrases import refusal_phrases
from backmerge.measuring.evaluate import Evaluator
from backmerge.merging.to_disk import write_merged
from backmerge.pipeline.tuning import tune_seeds
from backmerge.pipeline.validation import (
    ValidationScore,
    validate,
    validated,
    validation_note,
    validation_rows,
)
from backmerge.planning.held_out import ENOUGH, check_validation, held_out_from_all, num_validation_answers
from backmerge.planning.points import Member, Point, points_of
from backmerge.planning.prepare import Plan, prepare
from backmerge.planning.settings import Experiment
from backmerge.records import Example, Message
from backmerge.runs import RunDirectory
from backmerge.selection import Candidate, choose

SEEDS = (7, 8)
SETTINGS: Mapping[str, Any] = {
    "base": "demo",
    "finetune": {
        "dataset": "demo-plans",
        "data": {"num_examples": 300, "validation": 0.1},
        "seeds": SEEDS,
        "steps": 40,
        "batch_size": 8,
        "learning_rate": 0.004,
        "device": "cpu",
    },
    "merge": [{"method": "linear", "lam": [0.2, 0.8]}, {"method": "model_stock"}],
    "evaluate": {"utility": ["demo-plans"], "safety": ["demo-harmful"], "judge": "demo-rule"},
    "choice": {"rule": "paper"},
}


class Tuned(NamedTuple):
    """An experiment whose models are tuned, and nothing measured."""

    prepared: Plan
    models: Mapping[str, Weights]
    points: list[Point]


def changed(prepared: Plan, **changes: Any) -> Plan:
    """What was prepared, with parts of some settings otherwise."""
    settings = prepared.experiment.model_dump(mode="json")
    for name, values in changes.items():
        settings[name] = {**settings[name], **values}
    return replace(prepared, experiment=Experiment(**settings))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """Two seeds, tuned for forty steps."""
    prepared = prepare(Experiment(**SETTINGS))
    settings = prepared.experiment.finetune
    assert settings is not None
    folder = tmp_path_factory.mktemp("tuned")
    places = {seed: folder / f"seed-{seed}" for seed in SEEDS}
    models = tune_seeds(prepared.base, "demo", settings, prepared.training, places)
    return Tuned(prepared, models, points_of(prepared.experiment.merge))


class Counted(TransformersEngine):
    """The engine, which counts what it is asked."""

    num_asked = 0

    def generate(self, variant: Any, examples: Any, sampling: Any, advance: Any) -> Any:
        self.num_asked += len(examples)
        self.sampling = sampling
        return super().generate(variant, examples, sampling, advance)

    def log_likelihoods(self, variant: Any, pairs: Any, advance: Any) -> Any:
        self.num_asked += len(pairs)
        return super().log_likelihoods(variant, pairs, advance)


def evaluator_in(folder: Path) -> Evaluator:
    """On the CPU, in a run directory."""
    run = RunDirectory(folder)
    run.units.mkdir(parents=True, exist_ok=True)
    engine = Counted(EngineSettings(device="cpu", dtype="float32"))
    return Evaluator(run, engine, refusal_phrases(), Drawing(), 0.0)


@pytest.fixture(scope="module")
def scores(tuned: Tuned, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ValidationScore]:
    """By loss, as data without a declared metric are."""
    return validate(evaluator_in(tmp_path_factory.mktemp("run")), tuned.prepared, tuned.models, tuned.points)


def held_out_from(prepared: Plan, member: Member) -> tuple[Example, ...]:
    """The rows that the model's own seed held out."""
    return prepared.training[int(str(member.tuned).removeprefix("seed-"))].validation


def held_out_loss(directory: Path, examples: Sequence[Example]) -> float:
    """Minus the mean over examples of the mean loss of a token that is learned: by transformers, one by one."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(directory)
    losses = []
    for example in examples:
        encoded = encode(tokenizer, example, 1024)
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([encoded.input_ids]), labels=torch.tensor([encoded.labels]))
        losses.append(float(output.loss))
    return -fmean(losses)


def test_the_loss_is_trainings_own(tuned: Tuned, scores: Mapping[str, ValidationScore], tmp_path: Path) -> None:
    """Each seed's merge on that seed's rows, as transformers finds the loss of what was merged to disk."""
    (point,) = [point for point in tuned.points if point.name == "linear@0.8"]
    found = []
    for member in tuned.prepared.members_at(point, tuned.models):
        folder = tmp_path / str(member.tuned)
        write_merged(member.variant, folder)
        found.append(held_out_loss(folder, held_out_from(tuned.prepared, member)))
    assert found[0] != pytest.approx(found[1], abs=1e-3)
    assert scores[point.name].score == pytest.approx(fmean(found), abs=1e-5)  # float32 sums in another order


def test_every_point_has_its_score(tuned: Tuned, scores: Mapping[str, ValidationScore]) -> None:
    """Tuning is seen on rows that it did not see, from the base to the tuned model; rows and cost are counted."""
    assert list(scores) == [point.name for point in tuned.points]
    assert scores["base"].score < scores["linear@0.2"].score < scores["linear@0.8"].score
    assert {score.metric for score in scores.values()} == {"log_likelihood"}
    each = sum(len(data.validation) for data in tuned.prepared.training.values())
    assert {scores[name].n for name in ("base", "tuned", "linear@0.2")} == {each} == {60}
    assert num_validation_answers(tuned.prepared, tuned.points) == sum(score.n for score in scores.values())
    assert validation_rows(scores)[0].plain() == {
        "point": "base",
        "metric": "log_likelihood",
        "score": scores["base"].score,
        "n": 60,
        "note": "",
    }


def test_the_rule_takes_the_validated_best(tuned: Tuned, scores: Mapping[str, ValidationScore]) -> None:
    """Against utility on the selection prompts, which rule `paper` then does not look at."""
    utilities = {"linear@0.2": 0.9, "linear@0.8": 0.1, "model_stock": 0.1}
    lams = {point.name: point.lam for point in tuned.points}
    candidates = [Candidate(name, name.partition("@")[0], lams[name], u, None) for name, u in utilities.items()]
    choice = tuned.prepared.experiment.choice
    assert choose(candidates, choice).point == "linear@0.2"
    found = choose(validated(candidates, scores), choice)
    assert found.point == "linear@0.8"
    assert f"best validation score ({scores['linear@0.8'].score:.4g})" in found.reason
    assert validation_note(scores).startswith("Validated on rows that the tuning held out, by the log-likelihood")
    assert "model_stock: merged from all tuned models" in validation_note(scores)
    assert validation_note({}) == ""


def test_what_was_validated_is_not_validated_again(
    tuned: Tuned, scores: Mapping[str, ValidationScore], tmp_path: Path
) -> None:
    """A run that continues asks nothing; one that lost a unit asks for that unit alone."""
    for _ in range(2):
        evaluator = evaluator_in(tmp_path / "run")
        assert validate(evaluator, tuned.prepared, tuned.models, tuned.points) == scores
    engine = cast("Counted", evaluator.engine)
    assert engine.num_asked == 0
    next(iter(sorted(evaluator.run.units.iterdir()))).unlink()
    assert validate(evaluator, tuned.prepared, tuned.models, tuned.points) == scores
    assert 0 < engine.num_asked <= max(score.n for score in scores.values())


def test_final_answers_are_generated_greedily(tuned: Tuned, tmp_path: Path) -> None:
    """By accuracy: the share of held-out rows whose plan is the row's own."""
    prepared = changed(tuned.prepared, choice={"validation": "accuracy"}, evaluate={"sampling": {"temperature": 1.0}})
    points = [point for point in tuned.points if point.name in ("base", "tuned")]
    evaluator = evaluator_in(tmp_path / "run")
    found = validate(evaluator, prepared, tuned.models, points)
    engine = cast("Counted", evaluator.engine)
    assert engine.sampling == Sampling(temperature=0.0, max_new_tokens=512)
    assert {score.metric for score in found.values()} == {"accuracy"}
    assert found["base"].score < found["tuned"].score
    means = []
    for member in prepared.members_at(points[1], tuned.models):
        rows = held_out_from(prepared, member)
        answers = engine.generate(member.variant, rows, engine.sampling, lambda _: None)
        means.append(fmean(answer.text.strip() == row.reference for answer, row in zip(answers, rows, strict=True)))
    assert found["tuned"].score == pytest.approx(fmean(means))


def test_bertscore_takes_the_encoder_of_the_benchmarks(tuned: Tuned, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """A user's own encoder is named once, and both look through it."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=128,
    )
    encoder = tmp_path / "encoder"
    transformers.BertModel(config).save_pretrained(encoder)
    tiny_tokenizer.save_pretrained(encoder)
    utility = {"name": "u.jsonl", "metrics": ["bertscore"], "options": {"model": str(encoder), "layer": 1}}
    prepared = changed(
        tuned.prepared, choice={"validation": "bertscore"}, evaluate={"utility": ["demo-plans", utility], "limit": 4}
    )
    evaluator = evaluator_in(tmp_path / "run")
    points = [point for point in tuned.points if point.name == "tuned"]
    found = validate(evaluator, prepared, tuned.models, points)["tuned"]
    assert (found.metric, found.n) == ("bertscore_f1", 8)
    engine, means = cast("Counted", evaluator.engine), []
    for member in prepared.members_at(points[0], tuned.models):
        rows = limited(held_out_from(prepared, member), 4)
        answers = engine.generate(member.variant, rows, engine.sampling, lambda _: None)
        pairs = BertScorer(str(encoder), 1).scores([a.text for a in answers], [r.reference or "" for r in rows])
        means.append(fmean(pair.f1 for pair in pairs))
    assert found.score == pytest.approx(fmean(means), abs=1e-5)


def test_the_limit_holds_for_held_out_rows_too(tuned: Tuned, tmp_path: Path) -> None:
    """One setting makes a quick try of everything."""
    prepared = changed(tuned.prepared, evaluate={"limit": 5})
    found = validate(evaluator_in(tmp_path / "run"), prepared, tuned.models, tuned.points)
    assert {found[name].n for name in ("base", "tuned", "linear@0.2")} == {10}
    assert found["model_stock"].n == 5
    assert num_validation_answers(prepared, tuned.points) == 45


@pytest.mark.parametrize("choice", [{"validation": "none"}, {"rule": "safe"}])
def test_benchmarks_that_are_not_requested_are_not_measured(
    choice: Mapping[str, Any], tuned: Tuned, tmp_path: Path
) -> None:
    """Without the rule or the metric there is no score, and no cost."""
    prepared = changed(tuned.prepared, choice=choice)
    assert validate(evaluator_in(tmp_path / "run"), prepared, tuned.models, tuned.points) == {}
    assert num_validation_answers(prepared, tuned.points) == 0
    check_validation(prepared, Silent())


def test_no_validation_without_held_out_rows(tuned: Tuned, tmp_path: Path) -> None:
    """Utility takes its place, unless all prompts are to be reported on: then it is refused."""
    training = {seed: data._replace(validation=()) for seed, data in tuned.prepared.training.items()}
    prepared = replace(tuned.prepared, training=training)
    assert validate(evaluator_in(tmp_path / "run"), prepared, tuned.models, tuned.points) == {}
    check_validation(prepared, Silent())
    with pytest.raises(ConfigError, match="no row of the tuning data is held out") as caught:
        check_validation(changed(prepared, evaluate={"split": "whole"}), Silent())
    assert "finetune.data.validation" in str(caught.value.remedy)


class Silent(Generator):
    """An engine that gives no likelihoods."""

    identity: ClassVar = {"engine": "silent"}

    def generate(self, variant: Any, examples: Any, sampling: Any, advance: Any) -> Any:
        raise AssertionError


def test_engine_without_likelihoods_is_refused_before_tuning(tuned: Tuned) -> None:
    """And one that has them, or a metric that needs none, is not."""
    with pytest.raises(ConfigError, match="compares likelihoods, which the engine") as caught:
        check_validation(tuned.prepared, Silent())
    assert "transformers or vllm" in str(caught.value.remedy)
    check_validation(changed(tuned.prepared, choice={"validation": "accuracy"}), Silent())
    check_validation(tuned.prepared, TransformersEngine(EngineSettings(device="cpu")))


def data_of(training: Iterable[int], validation: Iterable[int]) -> TrainingData:
    """Rows by number."""
    rows = [
        tuple(Example(f"r{n}", (Message("user", f"prompt {n}"),), "answer") for n in part)
        for part in (training, validation)
    ]
    return TrainingData(rows[0], rows[1], {}, ())


@pytest.mark.parametrize(
    ("first", "second", "rows", "words"),
    [
        # one seed alone, or seeds that share no row: every held-out row is new to the merge
        (data_of(range(20), range(20, 30)), None, range(20, 30), ""),
        (data_of(range(9), range(20, 30)), data_of(range(40, 60), range(30, 33)), range(20, 33), ""),
        # half of them are new
        (data_of(range(20), range(20, 30)), data_of(range(20, 30), range(30, 40)), range(30, 40), "none was tuned on"),
        # few are, but a hundred
        (
            data_of(range(300, 600), range(300)),
            data_of(range(200), range(200, 300)),
            range(200, 300),
            "none was tuned on",
        ),
        # the same rows, split otherwise: none is new
        (data_of(range(10, 30), range(10)), data_of([*range(10), 25], range(10, 20)), range(20), "20 of its 20 rows"),
    ],
)  # fmt: skip
def test_rows_for_a_merge_of_all_seeds(
    first: TrainingData, second: TrainingData | None, rows: Iterable[int], words: str, tuned: Tuned
) -> None:
    """Those that no seed was tuned on, where they are enough; else all, and that is said."""
    training = {1: first} if second is None else {1: first, 2: second}
    found = held_out_from_all(replace(tuned.prepared, training=training))
    assert [example.id for example in found.examples] == [f"r{n}" for n in rows]
    assert words in found.note
    assert bool(words) == bool(found.note)
    assert ENOUGH == 100


def test_rows_with_equal_ids_are_distinguished(tuned: Tuned, tmp_path: Path) -> None:
    """Code of a user's own may give all of its examples one id; each counts."""
    training = {
        seed: data._replace(validation=tuple(replace(example, id="same") for example in data.validation))
        for seed, data in tuned.prepared.training.items()
    }
    prepared = replace(tuned.prepared, training=training)
    points = [point for point in tuned.points if point.name == "tuned"]
    found = validate(evaluator_in(tmp_path / "run"), prepared, tuned.models, points)
    assert found["tuned"].n == 60
