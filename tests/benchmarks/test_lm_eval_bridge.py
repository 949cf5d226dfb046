"""Tasks of lm-evaluation-harness give, through our records and engines, the harness's own numbers."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")


from lm_eval_folder import (
    CHOOSING,
    COMPARED,
    GENERATED,
    GENERATING,
    ROWS,
    TURNS,
    WAYS,
    filled,
    harness,
    load,
    write_task,
)

from backmerge.benchmarks import lm_eval_bridge
from backmerge.benchmarks.lm_eval_benchmark import as_benchmark, lm_eval
from backmerge.benchmarks.lm_eval_bridge import LmEvalTask, sampling_of
from backmerge.benchmarks.lm_eval_model import BackmergeLM
from backmerge.benchmarks.lm_eval_scores import LmEvalResults
from backmerge.benchmarks.protocol import BenchmarkSettings
from backmerge.benchmarks.scoring import score
from backmerge.checkpoints.adapter import open_weights
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.errors import ConfigError, DataError, GenerationError
from backmerge.generation.chat import load_tokenizer, prompt_text
from backmerge.generation.protocol import EngineSettings, Generator, LogLikelihood, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.merging.recipe import Variant
from backmerge.records import Completion, Example, Message
from backmerge.registry import Permissions

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


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    """One engine for all tests."""
    return TransformersEngine(EngineSettings(device="cpu", dtype="float32", batch_size=4))


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    """The embedded model, with a context of 256 tokens."""
    return Checkpoint(model_directory())


@pytest.fixture(autouse=True)
def _no_survey_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """For its report the harness asks pip and git about the machine, which takes longer than all else."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: None)


def measured(engine: Any, variant: Variant, task: LmEvalTask, examples: Sequence[Example] | None = None) -> Any:
    """What we find: answers or likelihoods by the engine, scored."""
    asked = task.examples if examples is None else examples
    if task.wants_likelihoods:
        pairs = task.pairs(load_tokenizer(variant.base.directory), asked)
        return task.score_likelihoods(asked, engine.log_likelihoods(variant, pairs, lambda _: None))
    return task.score(asked, engine.generate(variant, asked, task.sampling, lambda _: None))


def figures(found: Any) -> dict[str, dict[str, float]]:
    """The harness's report in our form."""
    return {
        name: {key: value for key, value in of.items() if "," in key and "_stderr," not in key}
        for name, of in found["results"].items()
    }


def values(found: Any, metric: str, filtered: str) -> dict[str, float]:
    """The harness's log of one metric, by our ids."""
    return {
        f"{name}/{row['doc_id']}": row[metric]
        for name, rows in found["samples"].items()
        for row in rows
        if row["filter"] == filtered and metric in row
    }


def agree(ours: LmEvalResults, theirs: Any, *, likelihoods: float = 0.0) -> None:
    """Number for number; figures made of likelihoods within a relative tolerance."""
    expected = figures(theirs)
    assert ours.figures.keys() == expected.keys()
    for name, of in expected.items():
        assert ours.figures[name] == pytest.approx(of, rel=likelihoods, abs=0.0), name
    for key, by_example in ours.values.items():
        assert by_example == values(theirs, *key.split(","))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*GENERATED, *COMPARED])
def test_the_harness_finds_the_same_with_our_model(
    engine: TransformersEngine, base: Checkpoint, folder: Path, name: str, way: str
) -> None:
    """By our flow, and by `simple_evaluate` over the same engine: equal values of each document, and equal figures."""
    variant = Variant(base)
    ours = measured(engine, variant, load(folder, name, **WAYS[way]))
    theirs = harness(BackmergeLM(engine, variant), folder, name, **WAYS[way])
    agree(ours, theirs)


# the harness sums a likelihood's terms in float32, and in batches of another shape; ours in float64
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [*GENERATED, *COMPARED])
def test_the_harness_finds_the_same_with_its_own_model(
    engine: TransformersEngine, base: Checkpoint, folder: Path, name: str, way: str
) -> None:
    """The harness's `HFLM`, which renders, tokenises and generates by itself, comes to our numbers."""
    from lm_eval.models.huggingface import HFLM

    theirs = harness(HFLM(str(base.directory), device="cpu", dtype="float32", batch_size=4), folder, name, **WAYS[way])
    agree(measured(engine, Variant(base), load(folder, name, **WAYS[way])), theirs, likelihoods=1e-5)


def test_compared_numbers_are_not_trivial(engine: TransformersEngine, base: Checkpoint, folder: Path) -> None:
    """Some answers are right and some are wrong, by each filter that can find one; or the comparison shows nothing."""
    of_letters = measured(engine, Variant(base), load(folder, "generating")).values
    assert 0 < sum(of_letters["exact_match,tool"].values()) < len(ROWS)
    chosen = measured(engine, Variant(base), load(folder, "choosing")).values
    assert all(0 < sum(by_example.values()) < len(ROWS) for by_example in chosen.values())
    assert list(chosen) == ["acc,none", "acc_norm,none", "acc_mutual_info,none"]


def test_figures_that_are_no_averages_are_no_values(engine: TransformersEngine, base: Checkpoint, folder: Path) -> None:
    """Correlation, Brier score and perplexity are the harness's figures, and no rates over examples."""
    found = measured(engine, Variant(base), load(folder, "choosing"))
    assert {"mcc,none", "brier_score,none"} <= found.figures["choosing"].keys() - found.values.keys()
    last = measured(engine, Variant(base), load(folder, "last_word"))
    assert last.values.keys() == {"acc,none"}
    assert last.figures["last_word"]["perplexity,none"] > 1


def test_values_of_every_kind(folder: Path) -> None:
    """Averages in [0, 1] are values, what was not measured is None; percents and medians are only figures."""
    metrics = ("error", "percent", "now_and_then", "middle")
    listed = "".join(
        f"  - {{metric: {name}, aggregation: {'median' if name == 'middle' else 'nanmean'}, higher_is_better: true}}\n"
        for name in metrics
    ).replace("higher_is_better: true", "higher_is_better: false", 1)
    kept = GENERATING.partition("metric_list")[0] + "process_results: !function of_many_kinds.score\nmetric_list:\n"
    write_task(folder, "of_many_kinds", kept + listed)
    (folder / "of_many_kinds.py").write_text(
        "def score(doc, results):\n"
        "    n = len(results[0])\n"
        "    rest = {} if n == 1 else {'now_and_then': float('nan') if n == 2 else 1.0}\n"
        "    return {'error': n / 4, 'percent': 25.0 * n, 'middle': n / 4, **rest}\n",
        encoding="utf-8",
    )
    task = load(folder, "of_many_kinds", limit=4)
    completions = [Completion(e.id, "", "abcd"[: i + 1], 1, True) for i, e in enumerate(task.examples)]
    found = task.score(task.examples, completions)
    by_metric = {key: list(of.values()) for key, of in found.values.items() if key.endswith(",whole")}
    assert by_metric == {
        "now_and_then,whole": [None, None, 1.0, 1.0],
        "error,whole": [0.25, 0.5, 0.75, 1.0],  # lower is better, so it is not the first
    }
    assert next(iter(found.values)).startswith("now_and_then")
    with pytest.raises(DataError, match="'percent,tool' has values outside") as caught:
        as_benchmark("mine", task).scorer(task.examples, [[c.text] for c in completions], lambda _: None)  # type: ignore[misc]
    assert "now_and_then,whole" in str(caught.value.remedy)
    figures_of = found.figures["of_many_kinds"]
    assert {name: figures_of[f"{name},whole"] for name in metrics} == {
        "error": 0.625,
        "percent": 62.5,
        "now_and_then": 1.0,
        "middle": 0.75,
    }


@pytest.mark.parametrize("name", ["generating", "begun", "several", "choosing", "last_word"])
def test_as_a_benchmark_it_has_the_same_values(
    engine: TransformersEngine, base: Checkpoint, folder: Path, name: str
) -> None:
    """Through the scorer or the choices of a `Benchmark`, for some of the examples: the values of the task's own."""
    task = load(folder, name)
    benchmark = as_benchmark("mine", task)
    examples = benchmark.examples[::-2]
    assert benchmark.scorer is not None
    if benchmark.choices is None:
        sampling = Sampling(max_new_tokens=benchmark.max_new_tokens, **benchmark.sampling)
        assert sampling == task.sampling
        completions = engine.generate(Variant(base), examples, sampling, lambda _: None)
        done: list[int] = []
        table = benchmark.scorer(examples, [[c.text] for c in completions], done.append)
        assert done == [len(examples)]
    else:
        pairs = benchmark.choices.pairs(load_tokenizer(base.directory), examples)
        table = benchmark.choices.score(examples, engine.log_likelihoods(Variant(base), pairs, lambda _: None))
    found = measured(engine, Variant(base), task, examples).values
    assert table == {key: [by_example[e.id] for e in examples] for key, by_example in found.items()}
    assert benchmark.scorer.metrics == tuple(table)
    assert benchmark.scorer.identity != as_benchmark("mine", load(folder, name, as_turns=False)).scorer.identity  # type: ignore[union-attr]


def test_more_answers_than_the_task_asks_for_are_averaged(folder: Path) -> None:
    """A task of one answer that is asked three times has the mean of three; too few are refused."""
    task = load(folder, "generating", limit=2)
    scorer = as_benchmark("mine", task).scorer
    assert scorer is not None
    right = task.examples[1].reference or ""
    said = [["", "", ""], [right, "no", right]]
    assert scorer(task.examples, said, lambda _: None)["exact_match,whole"] == [0.0, pytest.approx(2 / 3)]
    with pytest.raises(DataError, match="'generating/1' has 0 answers"):
        scorer(task.examples, [["a"], []], lambda _: None)


def test_by_settings(folder: Path) -> None:
    """A name with `lm-eval:`, a task file as data, options, system prompt and metrics."""
    settings = BenchmarkSettings(
        name="lm-eval:described",
        data=str(folder / "described.yaml"),
        system="Be brief.",
        metrics=("exact_match,whole",),
        options={"as_turns": False, "limit": 3, "num_fewshot": 1},
    )
    found = lm_eval(settings, Permissions(plugins=True))
    assert found.name == "lm-eval:described"
    assert (
        found.examples == load(folder, "described", system="Be brief.", as_turns=False, limit=3, num_fewshot=1).examples
    )
    assert found.scorer is not None
    assert found.scorer.metrics == ("exact_match,whole",)
    with pytest.raises(ConfigError, match="add --allow-plugins"):
        lm_eval(settings)
    with pytest.raises(ConfigError, match="no option 'as_turn'; did you mean 'as_turns'"):
        lm_eval(settings.model_copy(update={"options": {"as_turn": True}}), Permissions(plugins=True))


def test_values_are_of_the_content_of_own_task_files(folder: Path, tmp_path: Path) -> None:
    """After a change of a file, or of code next to it, answers are scored again; elsewhere the same files are equal."""
    own = shutil.copytree(folder, tmp_path / "own")

    def scored_by(data: Path) -> str:
        return lm_eval(BenchmarkSettings(name="lm-eval:described", data=str(data)), Permissions(plugins=True)).scored_by

    before = scored_by(own / "described.yaml")
    assert before == scored_by(folder / "described.yaml")
    (own / "more.py").write_text("x = 1")
    assert scored_by(own / "described.yaml") != before


def test_metrics_of_ones_choice(folder: Path) -> None:
    """One of several is decided on; what a task does not average, or all of a group's do not share, is refused."""
    task = load(folder, "choosing")
    assert task.metrics == ("acc,none", "acc_norm,none", "acc_mutual_info,none")
    chosen = as_benchmark("mine", task, ["acc_norm,none"])
    assert chosen.scorer is not None
    assert chosen.scorer.metrics == ("acc_norm,none",)
    with pytest.raises(ConfigError, match="has no metric 'acc_nrm,none' that it averages; did you mean 'acc_norm"):
        as_benchmark("mine", task, ["acc_nrm,none"])
    with pytest.raises(DataError, match="no metric that is averaged over its documents"):
        as_benchmark("mine", load(folder, "whole_text"))


def test_what_was_put_into_the_models_mouth_is_not_scored(folder: Path) -> None:
    """The harness's filters see what follows the given beginning, which our completions contain."""
    task = load(folder, "begun")
    completions = [Completion(e.id, "", f"{e.prefill} {e.reference}", 1, True) for e in task.examples]
    assert set(task.score(task.examples, completions).values["exact_match,whole"].values()) == {1.0}


def test_a_sweep_loads_the_model_once(
    engine: TransformersEngine,
    base: Checkpoint,
    folder: Path,
    make_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over three λs through the harness's runner, one engine reads the base once, and says what each λ says."""
    fresh = TransformersEngine(engine.settings)
    loads: list[Any] = []
    load_ = fresh._load
    monkeypatch.setattr(fresh, "_load", lambda weights, files: (loads.append(weights), load_(weights, files)))
    recipe = Variant(base, open_weights(make_adapter(base.directory, lora_alpha=40), base))
    task = load(folder, "choosing")
    found = []
    for lam in (0.0, 0.5, 1.0):
        theirs = harness(BackmergeLM(fresh, recipe.at(lam)), folder, "choosing", **TURNS)
        agree(measured(engine, recipe.at(lam), task), theirs)
        found.append(figures(theirs)["choosing"]["brier_score,none"])
    assert len(loads) == 1
    assert len(set(found)) == 3


@pytest.mark.parametrize("name", ["generating", "choosing", "several"])
def test_some_examples_are_scored_as_among_all(
    engine: TransformersEngine, base: Checkpoint, folder: Path, name: str
) -> None:
    """A split's half has the values that its examples have in the whole, in any order."""
    task = load(folder, name)
    whole = measured(engine, Variant(base), task).values
    half = list(task.examples[::2])
    half = half[1::2] + half[::2]
    found = measured(engine, Variant(base), task, half).values
    assert found == {key: {e.id: by_example[e.id] for e in half} for key, by_example in whole.items()}
    again = measured(engine, Variant(base), task).values
    assert again == whole


def test_harness_finds_the_same_for_some_documents(engine: TransformersEngine, base: Checkpoint, folder: Path) -> None:
    """A split's half has the figures that the harness finds when it is limited to these documents."""
    task = load(folder, "several")
    some = {"generating": [1, 2, 5, 9], "short": [2]}
    half = [example for example in task.examples if int(example.id.rpartition("/")[2]) in some[example.category or ""]]
    theirs = harness(BackmergeLM(engine, Variant(base)), folder, "several", samples=some, **TURNS)
    agree(measured(engine, Variant(base), task, half[::-1]), theirs)


def test_task_with_changing_documents_is_refused(engine: TransformersEngine, base: Checkpoint, folder: Path) -> None:
    """Answers are never scored against a document that was not asked about; the error comes before any is generated."""
    shuffling = CHOOSING + "process_docs: !function drawing.drawn\n"
    write_task(folder, "drawing", shuffling.replace("num_fewshot: 1", "num_fewshot: 0"))
    (folder / "drawing.py").write_text(
        "import random\n\ndef drawn(rows):\n"
        "    return rows.map(lambda row: {'gold': random.randrange(3)}, load_from_cache_file=False)\n",
        encoding="utf-8",
    )
    task = load(folder, "drawing")
    with pytest.raises(DataError, match=r"'drawing' reads different documents each time \('drawing/\d' changed\)"):
        as_benchmark("mine", task)
    with pytest.raises(DataError, match="reads different documents each time"):
        measured(engine, Variant(base), task)


def test_bridge_uses_only_public_names_of_the_harness() -> None:
    """A private field may go with any release of lm-eval; our own are those of `self`."""
    for path in Path(lm_eval_bridge.__file__).parent.glob("lm_eval_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                assert ast.unparse(node.value) == "self", f"{path.name}:{node.lineno} {ast.unparse(node)}"


def test_values_make_our_scores(engine: TransformersEngine, base: Checkpoint, folder: Path) -> None:
    """A metric's values are what `scoring.score` takes, and the rate is the harness's figure."""
    task = load(folder, "several")
    found = measured(engine, Variant(base), task)
    got = score("base", task.name, "all", "exact_match,tool", task.examples, found.values["exact_match,tool"])
    assert (got.n, got.unscored) == (13, 0)
    assert got.n_effective <= 10  # three rows are in both tasks
    assert got.value == pytest.approx(found.figures["several"]["exact_match,tool"], rel=1e-15)


def test_examples_by_hand(folder: Path) -> None:
    """Ids, categories, shots as turns or in one turn, a description, and the beginning of an answer."""
    rows = {name: {"test": [{"q": f"{i}?", "a": "abc"[i]} for i in range(3)]} for name in ("begun", "described")}
    turns = load(folder, "begun", rows=rows)
    assert [e.id for e in turns.examples] == ["begun/0", "begun/1", "begun/2"]
    assert {(e.category, e.is_raw, e.prefill) for e in turns.examples} == {("begun", False, "To do it, take")}
    shots = [("user", "0?"), ("assistant", "To do it, take a"), ("user", "1?"), ("assistant", "To do it, take b")]
    assert [(m.role, m.content) for m in turns.examples[2].messages] == [*shots, ("user", "2?")]
    assert turns.examples[2].reference == "c"
    system, one = load(folder, "described", as_turns=False, rows=rows, system="Be brief.").examples[2].messages
    assert system == Message("system", "Be brief.\n\nName a tool.\n\n")
    assert one == Message("user", "0? a\n\n1? b\n\n2?")
    text = load(folder, "begun", is_chat=False, rows=rows, limit=1)
    assert [e.id for e in text.examples] == ["begun/0"]
    assert (text.examples[0].is_raw, text.examples[0].prefill) == (True, "")
    begun = "0? To do it, take a\n\n1? To do it, take b\n\n0? To do it, take"
    assert text.examples[0].prompt == begun


def test_the_prompt_is_rendered_once(base: Checkpoint, folder: Path) -> None:
    """Law 9: one beginning-of-sequence token, of examples, of pairs, and through the harness's runner."""
    tokenizer = load_tokenizer(base.directory)
    for example in load(folder, "generating").examples:
        assert prompt_text(tokenizer, example).count(tokenizer.bos_token) == 1
    pairs = load(folder, "choosing").pairs(tokenizer)
    assert {context.count(tokenizer.bos_token) for context, _ in pairs} == {0, 1}  # none before a bare choice
    seen: list[Example] = []

    class Listener(Generator):
        """Notes what it is asked."""

        identity: ClassVar = {"engine": "listener"}

        def generate(self, _: Variant, examples: Sequence[Example], *__: Any) -> list[Completion]:
            seen.extend(examples)
            return [Completion(e.id, e.prompt, "a", 1, True) for e in examples]

    harness(BackmergeLM(Listener(), Variant(base)), folder, "generating", **TURNS)
    rendered = [prompt_text(tokenizer, example) for example in load(folder, "generating").examples]
    assert [prompt_text(tokenizer, example) for example in seen] == rendered


def test_rows_that_are_there_twice_are_one_cluster(folder: Path) -> None:
    """A template makes no near-duplicates of a task's rows; an identical prompt, with its choices, does."""
    twice = {"same": {"test": [*ROWS, ROWS[0]]}}
    write_task(folder, "same", GENERATING)
    examples = load(folder, "same", rows=twice).examples
    assert [e.cluster for e in examples] == [*(f"same/{i}" for i in range(10)), "same/0"]
    for name in COMPARED:
        assert len({e.cluster for e in load(folder, name).examples}) == 10
    write_task(folder, "alike", CHOOSING.replace("{{q}}", "Say it."))
    rows = {"alike": {"test": [ROWS[3], {**ROWS[4], "choices": ["a", "b", "c"]}, ROWS[3]]}}
    assert [e.cluster for e in load(folder, "alike", rows=rows, num_fewshot=0).examples] == [
        "alike/0",
        "alike/1",
        "alike/0",
    ]


def test_data_of_ones_own_takes_the_place_of_the_hubs(
    engine: TransformersEngine, base: Checkpoint, folder: Path
) -> None:
    """The same rows by hand give the same examples and figures, for a task and for a group."""
    for name, rows in (
        ("generating", {"generating": {"test": ROWS}}),
        ("several", {"generating": {"test": ROWS}, "short": {"test": ROWS[:3]}}),
    ):
        ours, theirs = load(folder, name, rows=rows), load(folder, name)
        assert ours.examples == theirs.examples
        assert measured(engine, Variant(base), ours) == measured(engine, Variant(base), theirs)
    with pytest.raises(DataError, match="no data given for 1 tasks of 'several', such as 'short'"):
        load(folder, "several", rows={"generating": {"test": ROWS}})


def test_several_answers_and_a_majority(engine: TransformersEngine, base: Checkpoint, folder: Path) -> None:
    """A task that repeats and votes gets as many answers a prompt, and the same vote through the harness's runner."""
    voting = GENERATING.replace("do_sample: false", "do_sample: true, temperature: 0.7").replace(
        "{function: take_first}]\n  - name: whole",
        "{function: majority_vote}, {function: take_first}]\n  - name: whole",
    )
    write_task(folder, "voting", voting + "repeats: 3\n")
    task = load(folder, "voting")
    assert (task.sampling.num_samples, task.sampling.temperature) == (3, 0.7)
    completions = engine.generate(Variant(base), task.examples, task.sampling, lambda _: None)
    assert len({c.text for c in completions[:3]}) > 1
    ours = task.score(task.examples, completions)
    agree(ours, harness(BackmergeLM(engine, Variant(base)), folder, "voting", **TURNS))
    with pytest.raises(DataError, match="'voting/0' has 2 answers, but 'voting' needs 3"):
        task.score(task.examples, completions[1:])


def test_greedy_repeats_are_asked_once(base: Checkpoint) -> None:
    """The harness repeats a request that it wants several answers to; greedy ones are all alike."""
    from lm_eval.api.instance import Instance

    asked: list[int] = []

    class Counter(Generator):
        """Says how many examples it got."""

        identity: ClassVar = {"engine": "counter"}

        def generate(self, _: Variant, examples: Sequence[Example], sampling: Sampling, *__: Any) -> list[Completion]:
            asked.append(len(examples) * sampling.num_samples)
            return [Completion(e.id, "", f"{e.id}-{i}", 1, True) for e in examples for i in range(sampling.num_samples)]

    def request(text: str, **options: Any) -> Any:
        return Instance("generate_until", {}, (text, {"until": [], **options}), 0, metadata=("t", 0, 2))

    first, second = request("a"), request("b")
    model = BackmergeLM(Counter(), Variant(base))
    assert model.generate_until([first, first, second]) == ["t/0/0-0", "t/0/0-0", "t/0/2-0"]
    drawn = request("a", do_sample=True)
    assert model.generate_until([drawn, drawn, second]) == ["t/0/0-0", "t/0/0-1", "t/0/2-0"]
    assert asked == [2, 2, 1]


@pytest.mark.parametrize("name", ["generating", "choosing", "whole_text"])
def test_harness_cache_stores_our_answers(
    engine: TransformersEngine, base: Checkpoint, folder: Path, name: str, tmp_path: Path
) -> None:
    """A second run over the harness's own cache of responses asks the engine nothing, and finds the same."""

    class Dead:
        """Answers nothing any more."""

        identity: ClassVar = {"engine": "dead"}

    cache = str(tmp_path / "responses")
    first = harness(BackmergeLM(engine, Variant(base)), folder, name, use_cache=cache, **TURNS)
    again = harness(BackmergeLM(Dead(), Variant(base)), folder, name, use_cache=cache, **TURNS)  # type: ignore[arg-type]
    assert figures(again) == figures(first)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"max_new_tokens": 256}),
        ({"until": "Q", "max_gen_toks": 9}, {"stop": ("Q",), "max_new_tokens": 9}),
        ({"until": ["a", "", "a", "b"], "max_new_tokens": 9}, {"stop": ("a", "b"), "max_new_tokens": 9}),
        ({"max_gen_toks": 8, "max_tokens": 9}, {"max_new_tokens": 8}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.0}, {"temperature": 0.0}),
        ({"num_beams": 1, "repetition_penalty": 1.2}, {"repetition_penalty": 1.2}),
    ],
)
def test_generation_settings_by_hand(asked: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """What a task says of generation, as a `Sampling`; greedy where it doesn't draw."""
    given = dict(asked)
    found = sampling_of(given)
    assert found == Sampling(**{"max_new_tokens": 256, **expected})
    assert given == asked


def test_the_default_fills_what_a_task_leaves_open() -> None:
    """Limit and seed are the caller's where the task has none."""
    assert sampling_of({"until": ["a"]}, Sampling(max_new_tokens=7, seed=3)) == Sampling(
        max_new_tokens=7, seed=3, stop=("a",)
    )


def test_likelihoods_must_be_as_many_as_asked_for(folder: Path) -> None:
    """One too few is not scored as something else."""
    task = load(folder, "choosing")
    with pytest.raises(DataError, match="59 likelihoods were given, but 'choosing' compares 60"):
        task.score_likelihoods(task.examples, [LogLikelihood(-1.0, 1, False)] * 59)


def test_an_engine_without_likelihoods_says_so(base: Checkpoint, folder: Path) -> None:
    """A multiple-choice task on an engine that only generates is refused."""

    class Mute:
        """Generates, and no more."""

        identity: ClassVar = {"engine": "mute"}
        gives_likelihoods = False

    with pytest.raises(GenerationError, match="the engine mute provides no likelihoods"):
        harness(BackmergeLM(Mute(), Variant(base)), folder, "choosing", **TURNS)  # type: ignore[arg-type]


def test_a_text_beyond_the_context_is_refused(engine: TransformersEngine, base: Checkpoint) -> None:
    """A rolling likelihood is whole, or an error."""
    from lm_eval.api.instance import Instance

    model = BackmergeLM(engine, Variant(base))
    assert len(model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("kite",), 0)])) == 1
    with pytest.raises(GenerationError, match="in a context of 256"):
        model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("kite " * 300,), 0)])


def test_chat_templates_are_the_bases_own(engine: TransformersEngine, base: Checkpoint) -> None:
    """The harness gets the template for its record; another by name is refused."""
    model = BackmergeLM(engine, Variant(base))
    assert model.chat_template(True) == load_tokenizer(base.directory).chat_template
    assert model.chat_template() is None
    assert "/" not in model.tokenizer_name
    with pytest.raises(GenerationError, match="'tools' was requested by name"):
        model.chat_template("tools")
