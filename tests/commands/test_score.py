"""`backmerge score`, `label` and `list`: answers made elsewhere, a judge held against people, and what there is."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from backmerge import registry
from backmerge.demo import language, lexicon
from backmerge.demo.benchmarks import harmful, plans
from backmerge.sandbox import available_level

Cli = Callable[..., tuple[int, str, str]]
SHARED = Path(__file__).parents[2].parent / "shared" / "data"
HUMANEVAL = SHARED / "humaneval" / "HumanEval.jsonl.gz"


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """JSON Lines of these rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def results(directory: Path) -> dict[str, Any]:
    """What a run found."""
    values: dict[str, Any] = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    return values


def scores(directory: Path) -> dict[str, float]:
    """Metric to value."""
    return {score["metric"]: score["value"] for score in results(directory)["scores"]}


def complying(every: int) -> list[dict[str, Any]]:
    """Answers to the demonstration's harmful requests; each so many obeys."""
    rows = []
    for number, example in enumerate(harmful().examples):
        obeyed = f"{example.facts['verb']} the {example.facts['object']}"
        rows.append({"id": example.id, "completion": obeyed if number % every == 0 else language.REFUSALS[0]})
    return rows


def test_answers_from_elsewhere(run_cli: Cli, tmp_path: Path) -> None:
    """Right and wrong plans are scored by their ids, in any order; other keys stay with their lines."""
    rows = [
        {"completion": e.reference if i % 4 else "go(home)", "id": e.id, "seed": i}
        for i, e in enumerate(plans().examples)
    ]
    code, output, errors = run_cli(
        "score", written(tmp_path / "a.jsonl", rows[::-1]), "--benchmark", "demo-plans", "--out", tmp_path / "out"
    )
    assert code == 0, errors
    assert scores(tmp_path / "out")["exact_match"] == 0.75
    assert "exact_match" in output
    lines = [json.loads(line) for line in (tmp_path / "out" / "records" / "scored.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [row["seed"] for row in rows[::-1]]
    assert all(line["scores"]["exact_match"] == float(line["seed"] % 4 != 0) for line in lines)


def test_empty_answers_are_reported(run_cli: Cli, tmp_path: Path) -> None:
    """Their attack success rate is 0 %, which says nothing about safety: results and terminal have the finding."""
    rows = [{"id": row["id"], "completion": " "} for row in complying(4)]
    out = tmp_path / "out"
    code, output, errors = run_cli(
        *("score", written(tmp_path / "a.jsonl", rows), "--benchmark", "demo-harmful"),
        *("--judge", "demo-rule", "--out", out),
    )
    assert code == 0, errors
    assert scores(out)["asr"] == 0
    assert [finding["name"] for finding in results(out)["findings"]] == ["answers_empty"]
    assert f"{len(rows)} of {len(rows)} by" in output


def test_answers_for_a_judge(run_cli: Cli, tmp_path: Path) -> None:
    """A safety benchmark's answers are judged; each line carries its verdict."""
    file = written(tmp_path / "a.jsonl", complying(4))
    out = tmp_path / "out"
    code, _, errors = run_cli("score", file, "--benchmark", "demo-harmful", "--judge", "demo-rule", "--out", out)
    assert code == 0, errors
    assert scores(out)["asr"] == 0.25
    by_category = {row["category"]: row for row in results(out)["by_category"]}
    assert by_category.keys() == {e.category for e in harmful().examples}
    assert sum(row["numerator"] for row in by_category.values()) == 0.25 * len(harmful().examples)
    assert all(row["low"] <= row["value"] <= row["high"] for row in by_category.values())
    first = json.loads((out / "records" / "scored.jsonl").read_text().splitlines()[0])
    assert first["verdict"]["harmful"] is True


@pytest.mark.skipif(not HUMANEVAL.is_file(), reason="HumanEval is not beside the project")
@pytest.mark.skipif(available_level()[0] != "bubblewrap", reason="bubblewrap does not work here")
def test_pass_at_k_for_as_many_samples_as_there_are(run_cli: Cli, tmp_path: Path) -> None:
    """One sample gives pass@1 alone; ten give pass@10 too, by the estimator: half of them right is near certain."""
    import gzip

    problems = [json.loads(line) for line in gzip.decompress(HUMANEVAL.read_bytes()).splitlines()]
    right = [{"id": p["task_id"], "completion": p["canonical_solution"]} for p in problems[:6]]
    wrong = [{"id": p["task_id"], "completion": "    pass\n"} for p in problems[:6]]
    asked = ("--benchmark", f"humaneval={HUMANEVAL}", "--partial")
    assert run_cli("score", written(tmp_path / "one.jsonl", right), *asked, "--out", tmp_path / "one")[0] == 0
    assert scores(tmp_path / "one") == {"pass@1": 1.0}
    ten = written(tmp_path / "ten.jsonl", (right + wrong) * 5)
    assert run_cli("score", ten, *asked, "--out", tmp_path / "ten")[0] == 0
    assert scores(tmp_path / "ten") == {"pass@10": 1.0, "pass@1": 0.5}


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"id": "demo-plans-0000", "completion": "x"}], (), "answers 1 of 440 prompts"),
        ([{"id": "nobody", "completion": "x"}], ("--partial",), "answers 'nobody'"),
        ([{"id": "demo-plans-0000"}], ("--partial",), "line 1: no text under 'id' and 'completion'"),
        ([], (), "contains no answers"),
        ([{"id": "demo-plans-0000", "completion": "x"}], ("--kind", "tastes"), "--kind"),
    ],
)
def test_what_is_refused(
    rows: list[dict[str, Any]], options: tuple[str, ...], words: str, run_cli: Cli, tmp_path: Path
) -> None:
    """Missing, unknown and malformed answers are reported, and nothing is scored."""
    file = written(tmp_path / "a.jsonl", rows)
    code, _, errors = run_cli("score", file, "--benchmark", "demo-plans", "--out", tmp_path / "out", *options)
    assert code == 2
    assert words in errors
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation by the demonstration's rule, of answers that obey every third time."""
    from backmerge.cli import app

    place = tmp_path_factory.mktemp("evaluated")
    file = written(place / "a.jsonl", complying(3))
    command = ["score", str(file), "--benchmark", "demo-harmful", "--judge", "demo-rule", "--out", str(place / "run")]
    app(command, standalone_mode=False)
    return place / "run"


def test_labels_correct_the_rate(evaluated: Path, run_cli: Cli) -> None:
    """The sample shows neither model nor verdict; labels that agree with the judge leave its rate as it is."""
    code, output, errors = run_cli("label", evaluated, "--model", "given", "--number", 60)
    assert code == 0, errors
    assert "60 answers" in output
    table = evaluated / "labels" / "to_label.csv"
    with table.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["item", "prompt", "answer", "harmful"]
    assert len({row["answer"] for row in rows}) > 1
    keys = [json.loads(line) for line in (evaluated / "labels" / "key.jsonl").read_text().splitlines()[1:]]
    with table.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {**row, "harmful": "yes" if key["judged"] else "no"} for row, key in zip(rows, keys, strict=True)
        )
    code, output, errors = run_cli("label", evaluated, "--read", table)
    assert code == 0, errors
    found = json.loads((evaluated / "labels" / "corrected.json").read_text())
    assert found["raw"]["value"] == pytest.approx(1 / 3, abs=1e-3)
    assert found["ppi"]["value"] == pytest.approx(found["raw"]["value"], abs=1e-9)
    assert found["ppi"]["low"] < found["raw"]["value"] < found["ppi"]["high"]
    assert (found["n_labelled"], found["differ"]) == (60, 0)
    assert "corrected" in output


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("item,harmful\n1,perhaps\n", "labelled 'perhaps'"),
        ("item,harmful\n999,yes\n", "no item '999'"),
        ("item,harmful\n1,\n", "has no labels"),
        ("item,harmful\n1,yes\n1,no\n", "is repeated"),
    ],
)
def test_bad_labels_are_refused(text: str, words: str, evaluated: Path, run_cli: Cli, tmp_path: Path) -> None:
    """Each with its item and what to write."""
    run_cli("label", evaluated, "--model", "given")  # there already, or drawn now
    (tmp_path / "l.csv").write_text(text, encoding="utf-8")
    code, _, errors = run_cli("label", evaluated, "--read", tmp_path / "l.csv")
    assert code == 2
    assert words in errors


def test_harmless_prompts_are_not_labelled(run_cli: Cli, tmp_path: Path) -> None:
    """A run that measured over-refusal too: what is drawn are answers to harmful requests alone."""
    asked = ("--safety", "demo-harmful", "--over-refusal", "demo-harmless", "--judge", "demo-rule", "--limit", 15)
    assert run_cli("evaluate", "demo", *asked, "--device", "cpu", "--out", tmp_path / "run")[0] == 0
    code, output, _ = run_cli("label", tmp_path / "run", "--model", "base", "--number", 100)
    assert code == 0
    assert ": 15 answers" in output


def test_labels_of_another_run_are_refused(evaluated: Path, run_cli: Cli, tmp_path: Path) -> None:
    """Where the run's answers or verdicts are others than those that were drawn, nothing is corrected."""
    run = tmp_path / "run"
    shutil.copytree(evaluated, run, ignore=shutil.ignore_patterns("labels"))
    assert run_cli("label", run, "--model", "given", "--number", 10)[0] == 0
    table = run / "labels" / "to_label.csv"
    table.write_text(table.read_text().replace(",\n", ",no\n").replace(",\r\n", ",no\r\n"))
    verdicts = run / "records" / "verdicts.jsonl"
    verdicts.write_text(verdicts.read_text().replace('"harmful": true', '"harmful": false'))
    code, _, errors = run_cli("label", run, "--read", table)
    assert code == 2
    assert "was changed after the run wrote it" in errors


def test_an_unfinished_run_is_not_labelled(evaluated: Path, run_cli: Cli, tmp_path: Path) -> None:
    """Records without results may be of another model."""
    run = tmp_path / "run"
    shutil.copytree(evaluated, run)
    (run / "results.json").unlink()
    for command in (("label", run), ("score", run, "--out", tmp_path / "out")):
        code, _, errors = run_cli(*command)
        assert code == 2
        assert "finished" in errors or "scored answers" in errors


def test_signs_that_end_lines_are_kept(run_cli: Cli, tmp_path: Path) -> None:
    """An answer may hold what Unicode calls a line's end; spreadsheets get no formulas."""
    rows = complying(2)
    rows[0]["completion"] = f"=1+1\u2028\x85{rows[0]['completion']}"
    out = tmp_path / "run"
    scored = ("score", written(tmp_path / "a.jsonl", rows), "--benchmark", "demo-harmful", "--judge", "demo-rule")
    assert run_cli(*scored, "--out", out)[0] == 0
    assert run_cli("label", out, "--model", "given", "--number", 1100)[0] == 0
    with (out / "labels" / "to_label.csv").open(encoding="utf-8", newline="") as stream:
        answers = [row["answer"] for row in csv.DictReader(stream)]
    assert any(answer.startswith("'=1+1\u2028") for answer in answers)


def test_run_of_another_kind_is_not_changed(evaluated: Path, run_cli: Cli, tmp_path: Path) -> None:
    """Scored answers are no run to go on with, to report on, or to be overwritten by an evaluation."""
    before = (evaluated / "results.json").read_bytes()
    for command in (
        ("report", evaluated),
        ("evaluate", "demo", "--safety", "demo-harmful", "--out", evaluated),
        ("demo", "--out", evaluated),
    ):
        code, _, errors = run_cli(*command)
        assert code == 2
        assert "scored answers" in errors
    assert (evaluated / "results.json").read_bytes() == before


def test_a_sample_is_drawn_once(evaluated: Path, run_cli: Cli) -> None:
    """A second draw would make the labels of the first worthless."""
    run_cli("label", evaluated, "--model", "given")
    code, _, errors = run_cli("label", evaluated, "--model", "given")
    assert code == 2
    assert "already has a sample" in errors


def test_another_judge_over_an_earlier_run(evaluated: Path, run_cli: Cli, tmp_path: Path) -> None:
    """The answers are not made again; both judges' rates and their agreement are there, and no average."""
    earlier = tmp_path / "earlier"
    shutil.copytree(evaluated, earlier)
    (earlier / "experiment.yaml").write_text("model: somebody\nevaluate: {safety: [demo-harmful]}\n")
    code, output, errors = run_cli("score", earlier, "--judge", "refusal-phrases", "--out", tmp_path / "out")
    assert code == 0, errors
    (row,) = results(tmp_path / "out")["agreement"]
    assert row["benchmark"] == "demo-harmful"
    assert row["second"]["value"] == pytest.approx(1 / 3, abs=1e-3)
    assert row["observed"]["value"] > 0.9
    assert "κ" in output


@pytest.mark.parametrize("what", ["benchmarks", "judges", "tasks", "engines", "methods"])
def test_list_names_all_that_there_is(what: str, run_cli: Cli) -> None:
    """Every entry of the table has a line that says something of it."""
    code, output, _ = run_cli("list", what)
    table = {
        "benchmarks": registry.BENCHMARKS,
        "judges": registry.JUDGES,
        "tasks": registry.DATASETS,
        "engines": registry.ENGINES,
        "methods": registry.METHODS,
    }[what]
    lines = {line.split()[0]: line for line in output.splitlines() if line[:1].strip()}
    assert code == 0
    assert lines.keys() >= table.entries.keys()
    assert all(len(lines[name].split()) > 3 for name in table.entries)
    assert lexicon.harmless  # the demonstration's own are among them without its being built


def test_list_of_what(run_cli: Cli) -> None:
    """Something else is refused with what can be listed."""
    code, _, errors = run_cli("list", "wishes")
    assert code == 2
    assert "benchmarks" in errors
