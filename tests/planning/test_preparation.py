"""What an experiment names: the halves of its benchmarks, and the names of its models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from backmerge.benchmarks.catalogue import find_benchmark
from backmerge.benchmarks.split import split_examples
from backmerge.checkpoints.locate import short_name
from backmerge.config import load_yaml, validated
from backmerge.errors import ConfigError, MergeError
from backmerge.merging.engine import merged_tensors
from backmerge.pipeline.stages import run_experiment
from backmerge.planning import findings
from backmerge.planning.points import TUNED, members_at, points_of
from backmerge.planning.prepare import Plan, find_models, prepare
from backmerge.planning.settings import Experiment
from backmerge.registry import NOTHING_ALLOWED

WORDS = ("kite", "ladder", "ticket", "kettle", "wagon", "fence", "lantern", "bucket", "mirror", "saddle", "bell", "rug")


def prompts_in(path: Path, prompts: list[str]) -> str:
    """A benchmark's file of these prompts, each its own answer."""
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": prompt}) + "\n" for prompt in prompts))
    return str(path)


def prepared_with(experiment: Experiment) -> Plan:
    """The experiment with its safety benchmarks only: splits need no model."""
    benchmarks = tuple(find_benchmark(name, "safety") for name in experiment.evaluate.safety)
    nothing = cast("Any", None)
    return Plan(experiment, nothing, {}, {}, benchmarks, nothing, None, (), NOTHING_ALLOWED)


def test_benchmarks_that_share_prompts_share_the_cut(tmp_path: Path) -> None:
    """What one benchmark selects on is not what another confirms on, though each has more prompts of its own."""
    first = prompts_in(tmp_path / "first.jsonl", [f"mend the {word}" for word in WORDS[:9]])
    second = prompts_in(tmp_path / "second.jsonl", [f"mend the {word} now" for word in WORDS[3:]])
    prepared = prepared_with(Experiment(base="demo", tuned=("x",), evaluate=cast("Any", evaluate(first, second))))
    sides = {
        split: {e.prompt.split()[2] for halves in prepared.splits.values() for e in halves[split]}
        for split in ("selection", "confirmation")
    }
    assert sides["selection"] | sides["confirmation"] == set(WORDS)
    assert sides["selection"] & sides["confirmation"] == set()


def test_cut_of_one_benchmark_ignores_the_others(tmp_path: Path) -> None:
    """With one benchmark of a kind, its halves are those of its own split."""
    file = prompts_in(tmp_path / "only.jsonl", [f"mend the {word}" for word in WORDS])
    prepared = prepared_with(Experiment(base="demo", tuned=("x",), evaluate=cast("Any", evaluate(file))))
    assert prepared.splits["only"] == split_examples(prepared.benchmarks[0].examples)


def evaluate(*safety: str) -> dict[str, Any]:
    """The settings of an evaluation on these."""
    return {"utility": ("u.jsonl",), "safety": safety}


def test_short_names_stay_inside_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model's name among others is never empty and leads nowhere else, however its folder is written."""
    folder = tmp_path / "mine@2"
    (folder / "inner").mkdir(parents=True)
    monkeypatch.chdir(folder / "inner")
    assert [short_name(name) for name in (".", "..", "./", str(folder) + "/")] == ["inner", "mine@2", "inner", "mine@2"]
    assert short_name("owner/name@refs/pr/1") == "name"
    assert short_name("demo") == "demo"


def test_tuned_models_of_one_name_are_all_kept(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that repeat are numbered, also where the number is taken."""
    base = make_model("llama", seed=0)
    monkeypatch.setattr(findings, "locate_model", lambda _: base)
    names = ("x/a", "x/a-3", "y/a")
    asked = Experiment(base="x/base", tuned=names, evaluate=cast("Any", evaluate("s.jsonl")))
    assert list(find_models(asked, findings.Findings()).tuned) == ["a", "a-3", "a-4"]


def test_one_tuned_model_given_twice_is_refused(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Given twice, a model would pass for two seeds that agree."""
    base, tuned = str(make_model("llama", seed=0)), str(make_model("llama", seed=1))
    file = prompts_in(tmp_path / "u.jsonl", [f"mend the {word}" for word in WORDS])
    safety = prompts_in(tmp_path / "s.jsonl", [f"break the {word}" for word in WORDS])
    settings = {"base": base, "tuned": (tuned, tuned), "evaluate": {"utility": (file,), "safety": (safety,)}}
    with pytest.raises(ConfigError, match="the same model"):
        prepare(Experiment.model_validate(settings))


def settings_of(base: Path, tuned: Path, folder: Path, **more: Any) -> Experiment:
    """An experiment on two models."""
    file = prompts_in(folder / "u.jsonl", [f"mend the {word}" for word in WORDS])
    safety = prompts_in(folder / "s.jsonl", [f"break the {word}" for word in WORDS])
    evaluate_ = {"utility": (file,), "safety": (safety,)}
    return Experiment.model_validate({"base": str(base), "tuned": (str(tuned),), "evaluate": evaluate_, **more})


def test_models_of_two_dtypes_need_an_output_dtype(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """A bfloat16 base with a float32 tuned model is refused with the setting that resolves it, and taken with it."""
    sides = make_model("llama", seed=0, dtype="bfloat16"), make_model("llama", seed=1)
    with pytest.raises(MergeError, match="is BF16 in the base and F32") as caught:
        prepare(settings_of(*sides, tmp_path))
    assert "merged_dtype" in (caught.value.remedy or "")
    assert "--dtype-out" in (caught.value.remedy or "")  # --dtype of restore is that of the computation
    prepared = prepare(settings_of(*sides, tmp_path, merged_dtype="bfloat16"))
    (member,) = members_at(TUNED, prepared.base, prepared.tuned, prepared.output)
    assert member.variant.dtype == "BF16"
    assert {tensor.dtype for _, tensor in merged_tensors(member.variant)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("method", "words"), [("model_stock", "at least 2"), ("nuslerp", "exactly 2"), ("resta", "'unaligned'")]
)
def test_what_cannot_be_swept_is_refused(
    make_model: Callable[..., Path], tmp_path: Path, method: str, words: str
) -> None:
    """Methods that take more tuned models than there are, or another model that was not given, are distinguished."""
    sides = make_model("llama", seed=0), make_model("llama", seed=1)
    with pytest.raises((ConfigError, MergeError), match=words):
        prepare(settings_of(*sides, tmp_path, merge=[{"method": method, "lam": [0.5]}]))


def test_an_extra_model_may_have_another_dtype(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """The result has the base's; only a tuned model of another dtype leaves open which one is meant."""
    sides = make_model("llama", seed=0), make_model("llama", seed=1)
    half = str(make_model("llama", seed=2, dtype="bfloat16"))
    merge = [{"method": "resta", "lam": [0.5], "models": {"unaligned": half}}]
    assert half in prepare(settings_of(*sides, tmp_path, merge=merge)).models
    with pytest.raises(MergeError, match=r"the tuned model .* does not fit"):
        prepare(settings_of(sides[0], Path(half), tmp_path))


def test_a_method_without_lam_takes_none(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Model Stock goes as far as it decides itself, and is measured as one point of all tuned models."""
    base, *tuned = make_model("llama", seed=0), make_model("llama", seed=1), make_model("llama", seed=2)
    settings = settings_of(base, tuned[0], tmp_path)
    both = settings.model_dump(mode="json") | {"tuned": [str(place) for place in tuned]}
    with pytest.raises(ConfigError, match="has no λ"):
        prepare(Experiment.model_validate(both | {"merge": [{"method": "model_stock", "lam": [0.5]}]}))
    prepared = prepare(Experiment.model_validate(both | {"merge": [{"method": "model_stock"}]}))
    point = points_of(prepared.experiment.merge)[-1]
    (member,) = prepared.members_at(point, prepared.tuned)
    assert (point.lam, member.tuned, len(member.variant.tuned_models)) == (None, "all", 2)


def test_every_setting_says_what_it_redoes() -> None:
    """A changed setting of any name is reported with the stages that follow from it; where work runs redoes nothing."""
    from backmerge.pipeline.stages import FIRST_STAGE_OF, STAGES

    assert FIRST_STAGE_OF.keys() == Experiment.model_fields.keys() - {"execution"}
    assert set(FIRST_STAGE_OF.values()) <= set(STAGES)


def test_a_server_cannot_be_given_merged_models(run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """Said before anything is asked of it, rather than after the sweep."""
    command = ["restore", "demo", "demo", "--utility", "demo-plans", "--safety", "demo-harmful", "--engine", "openai"]
    code, _, errors = run_cli(*command, "--engine-option", "url=http://localhost:9/v1", "--out", tmp_path / "out")
    assert code == 2
    assert "a server has its own models" in errors
    assert not (tmp_path / "out").exists()


BROKEN = """base: demo
tuned:
  - nowhere
merge:
  - method: linear
    lam: [0.5]
  - method: liner
evaluate:
  utility: [demo-plans]
  safety:
    - demo-harmful
    - mispelt
  judge: wildgard
"""


def test_all_problems_are_reported_together_each_with_its_line(tmp_path: Path) -> None:
    """Nobody corrects one thing only to be shown the next; what hangs on something missing is not reported for it."""
    (tmp_path / "e.yaml").write_text(BROKEN)
    document = load_yaml(tmp_path / "e.yaml")
    with pytest.raises(ConfigError, match="4 problems") as caught:
        run_experiment(validated(Experiment, document), tmp_path / "run", document=document)
    lines = [line for line in str(caught.value).splitlines() if line.startswith("  line")]
    places = [line.partition(":")[0].strip() for line in lines]
    assert sorted(places) == [
        "line 12, evaluate.safety.1",
        "line 13, evaluate.judge",
        "line 3, tuned.0",
        "line 7, merge.1.method",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["restore", "evaluate", "check"])
def test_commands_report_all_problems_with_their_options(
    command: str, run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """Base, benchmark and judge are wrong at once; each is named by what was typed."""
    models = {
        "restore": ["nobase", "demo", "--utility", "demo-plans"],
        "evaluate": ["demo", "--base", "nobase"],
        "check": ["demo", "--against", "nobase"],
    }
    options = ("--safety", "mispelt", "--over-refusal", "none.csv", "--judge", "wildgard", "--out", tmp_path / "run")
    code, _, said = run_cli(command, *models[command], *options)
    assert code == 2
    base = {"restore": "BASE", "evaluate": "--base", "check": "--against"}[command]
    for told in (f"{base}: there is no model", "--safety: there is no benchmark", "--over-refusal: there is no file"):
        assert told in said
    assert "--judge: there is no judge named 'wildgard'; did you mean 'wildguard'?" in said
    assert len(said) < 2_000
    assert not (tmp_path / "run").exists()
