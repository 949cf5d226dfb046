"""The report: self-contained, the same each time, and deaf to what a model wrote into it."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from backmerge.errors import RunError
from backmerge.reporting.findings import verdict_sentence
from backmerge.reporting.report import read_run, rendered, visible, write_report

from .synthetic import enriched, made_results, made_run, made_samples, typed

HOSTILE = (
    "<script>document.title='broken'</script></details></div></main><img src=x onerror=alert(1)>"
    "\"'><svg onload=alert(1)></style></pre>{{7*7}}{% raw %}\x00\x1b[31m\x85\u202e\ud800&lt;b&gt;"
)
# what of it a reader sees
SHOWN = (
    "<script>document.title='broken'</script></details></div></main><img src=x onerror=alert(1)>"
    "\"'><svg onload=alert(1)></style></pre>{{7*7}}{% raw %}\u2400\u241b[31m\ufffd\ufffd\ufffd&lt;b&gt;"
)


class Page(HTMLParser):
    """A page's tags in order, its attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.pieces: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the tag and its attributes."""
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        """Keep the end of a tag."""
        self.tags.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        """Keep the text."""
        self.pieces.append(data)

    @property
    def text(self) -> str:
        """All text, as a reader sees it."""
        return " ".join(" ".join(self.pieces).split())


def page_of(run: Path) -> Page:
    """The report of a run, parsed."""
    return Page(rendered(read_run(run)))


@pytest.mark.parametrize("text", ["full", "folded"])
def test_hostile_text_is_text(tmp_path: Path, text: str) -> None:
    """Markup in prompts and answers adds no tag, closes none, and is shown as it was written."""
    tame = page_of(made_run(tmp_path / "tame", text=text))
    hostile = page_of(made_run(tmp_path / "hostile", samples=made_samples(HOSTILE, HOSTILE), text=text))
    assert hostile.tags == tame.tags
    assert [row[:2] for row in hostile.attributes] == [row[:2] for row in tame.attributes]
    # four prompts, one reference, and the eleven answers that are seen without the script and not empty
    assert hostile.text.count(SHOWN) == 16
    # and for the script, within JSON: each sample's text once, and no sign in it that HTML reads
    data = next(piece for piece in hostile.pieces if piece.startswith('{"shown"'))
    assert json.loads(data)["samples"][0]["texts"] == [SHOWN]
    assert not set("<>&") & set(data)


def test_hostile_names_are_text(tmp_path: Path) -> None:
    """Names from the user's files, which also stand in plots and attributes, add no tag either."""
    results = made_results()
    tame = page_of(made_run(tmp_path / "tame", results))
    plain = json.dumps(results).replace('"harmful"', json.dumps('"><script>alert(1)</script>'))
    hostile = page_of(made_run(tmp_path / "hostile", json.loads(plain)))
    # the plots' own elements depend on the texts' sizes, so that tags are not compared one by one
    assert hostile.tags.count("script") == tame.tags.count("script") == 2
    assert not [name for _, name, _ in hostile.attributes if name.startswith("on")]
    assert '"><script>alert(1)</script>' in hostile.text


def test_control_characters_become_signs() -> None:
    """What moves a terminal's cursor or turns a line around is shown, not obeyed; line ends and λ stay."""
    assert visible("a\x1b[2J\x7f\u2066b\n\tλ") == "a\u241b[2J\u2421\ufffdb\n\tλ"


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    """The page has its data and one script, and names no address but in plain links; the policy allows no other."""
    html = rendered(read_run(made_run(tmp_path / "run", enriched(made_results(with_slerp=True)))))
    page = Page(html)
    assert page.tags.count("script") == 2
    assert "iframe" not in page.tags
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    assert policy.startswith("default-src 'none'; ")
    program = html.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(program.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'; " in policy
    # textContent only
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(", program)
    for tag, name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "srcset", "action", "data"}:
            assert value.startswith(("#", "data:")) or (tag == "a" and value.startswith("https://arxiv.org/")), value
        # a style may name an element of the page only
        assert not re.search(r"url\((?!#)", value)
    style = "".join(page.pieces)
    assert "@import" not in style
    assert "url(" not in style


def test_content_policy_comes_before_the_content(tmp_path: Path) -> None:
    """A policy in a meta tag holds only for what follows it."""
    html = rendered(read_run(made_run(tmp_path / "run")))
    assert html.lstrip().startswith("<!DOCTYPE html>")
    assert html.index("Content-Security-Policy") < html.index("<style>")


@pytest.mark.parametrize(
    "results",
    [
        made_results(),
        made_results(verdict="worse", difference_of_chosen=0.05),
        made_results(chosen=None, verdict="not shown"),
        made_results(chosen="tuned"),
        made_results(with_over_refusal=False, with_slerp=True, tuned=("only",), is_weak=True, unscored=1),
        made_results(tuned=("a", "b", "c"), own_verdicts=("restored", "worse", "restored")),
        made_results(chosen="model_stock", with_stock=True, with_slerp=True),
        enriched(made_results(chosen="model_stock", with_stock=True, with_slerp=True)),
        {**made_results(), "split": "whole"},
    ],
    ids=[
        "restored",
        "worse",
        "no λ",
        "tuned itself",
        "several series",
        "some confirmed",
        "no λ of its own",
        "all",
        "whole",
    ],
)
def test_every_outcome_has_its_report(tmp_path: Path, results: dict[str, object]) -> None:
    """The verdict is in it, and the models that are handed over are those that are confirmed, and no others."""
    page = page_of(made_run(tmp_path / "run", results))
    assert verdict_sentence(typed(results)) in page.text
    first_screen = page.text.split("What was done and found")[0]
    assert re.findall(r"\bmerged/[\w-]+", first_screen) == [
        row["directory"]
        for row in results["merged"]  # type: ignore[attr-defined]
        if row["confirmed"]
    ]
    assert ("No model was confirmed as safe" in first_screen) == ("merged/" not in first_screen)
    assert "{results." not in page.text  # a value that was not filled in


def test_unscored_answers_are_counted_next_to_the_rates(tmp_path: Path) -> None:
    """Each table and each number on the first screen says how many answers it lacks."""
    page = page_of(made_run(tmp_path / "run", made_results(unscored=3)))
    assert "n = 197 × 2, 6 unscored" in page.text
    assert "n = 197, 3 unscored" in page.text
    assert "· 6 unscored" in page.text.split("What was done and found")[0]


def test_findings_are_words_and_not_only_colours(tmp_path: Path) -> None:
    """Every finding on an answer is named in its badge."""
    page = page_of(made_run(tmp_path / "run"))
    answers = page.text.split("Answers side by side")[-1]
    for badge in ("refused", "harmful", "other: neither refused nor harmful", "answered", "unscored"):
        assert badge in answers
    assert "accuracy: 100.0 %" in answers
    assert "accuracy: unscored" in answers


def test_folded_text_is_behind_a_click(tmp_path: Path) -> None:
    """Folded, prompts and answers of harmful requests stand in details that are closed; in full, in none."""

    def tags_before_prompt(text: str) -> list[str]:
        html = rendered(read_run(made_run(tmp_path / text, samples=made_samples(prompt="THE PROMPT"), text=text)))
        return Page(html.split("THE PROMPT")[0]).tags

    folded, full = tags_before_prompt("folded"), tags_before_prompt("full")
    # the first is of a harmful request
    assert folded.count("details") - folded.count("/details") == 1
    assert full.count("details") - full.count("/details") == 0


def test_no_text_is_shown_where_none_is_wanted(tmp_path: Path) -> None:
    """With `text: none` nothing of the samples is in the page, not even for its script, and the report says why."""
    page = page_of(made_run(tmp_path / "run", samples=made_samples("THE ANSWER", "THE PROMPT"), text="none"))
    assert "THE ANSWER" not in page.text
    assert "THE PROMPT" not in page.text
    assert "No prompts and answers are shown, as set in the experiment" in page.text


def test_everything_is_written_and_nothing_left_over(tmp_path: Path) -> None:
    """The report, its tables, plots and cards are there, whole, and the page is small."""
    run = made_run(tmp_path / "run")
    before = {path for path in run.rglob("*") if path.is_file()}
    write_report(run)
    written = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} - {
        str(path.relative_to(run)) for path in before
    }
    assert written == {
        *("report.html", "scores.csv", "summary.csv"),
        *(f"plots/{name}.{form}" for name in ("curves", "pareto") for form in ("png", "svg", "pdf")),
        *(f"merged/seed-{seed}/{name}" for seed in (1, 2) for name in ("README.md", "curve.png")),
    }
    assert (run / "report.html").stat().st_size < 1_000_000
    with (run / "scores.csv").open() as stream:
        values = [float(row["value"]) for row in csv.DictReader(stream)]
    assert values == [score["value"] for score in made_results()["scores"]]


def test_two_reports_of_a_run_are_the_same_bytes(tmp_path: Path) -> None:
    """No time, path or random id is in any file."""
    first, second = made_run(tmp_path / "first"), made_run(tmp_path / "elsewhere" / "second")
    write_report(first)
    write_report(second)
    for path in sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file()):
        assert (first / path).read_bytes() == (second / path).read_bytes(), path


@pytest.mark.parametrize("name", ["results.json", "samples.json", "experiment.yaml"])
def test_an_unfinished_run_is_refused_with_a_remedy(tmp_path: Path, name: str) -> None:
    """A file that is not there yet is named, nothing is written, and the way on is given."""
    run = made_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(RunError, match=re.escape(f"has no {name}")) as raised:
        write_report(run)
    assert "continues where it stopped" in str(raised.value.remedy)
    assert not (run / "report.html").exists()
    assert not (run / "scores.csv").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tuned/seed-1/loss.jsonl", b'{"step": 1}\n'),
        ("tuned/seed-1/loss.jsonl", b"\xe4\n"),
        ("sessions.jsonl", b"3\n"),
        ("experiment.yaml", b"evaluate: {sampling: {seed: 0}}\n"),
        ("experiment.yaml", b"report: [\n"),
        ("experiment.yaml", b"- 3\n"),
    ],
)
def test_values_that_the_report_needs_are_checked(tmp_path: Path, name: str, content: bytes) -> None:
    """A loss, a session or a setting that is missing, or of another kind, names the file."""
    run = made_run(tmp_path / "run")
    (run / name).write_bytes(content)
    with pytest.raises(RunError, match=f"{name} is damaged"):
        read_run(run)


@pytest.mark.parametrize("name", ["results.json", "samples.json", "tuned/seed-1/loss.jsonl"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    """A file cut short is a clear error, not a traceback."""
    run = made_run(tmp_path / "run")
    (run / name).write_text('{"schema')
    with pytest.raises(RunError, match=f"{name} is damaged"):
        write_report(run)


def test_another_version_s_results_are_refused(tmp_path: Path) -> None:
    """Results of another schema are not guessed at."""
    run = made_run(tmp_path / "run", {**made_results(), "schema_version": 99})
    with pytest.raises(RunError, match="schema version 99"):
        write_report(run)


def test_missing_folder_is_reported(tmp_path: Path) -> None:
    """A mistyped path is distinguished from a run that is not finished."""
    with pytest.raises(RunError, match="there is no such folder"):
        write_report(tmp_path / "nowhere")


def test_recorded_cost_is_shown(tmp_path: Path) -> None:
    """In a separate section, from whole lines alone: a killed writer may have left half of the last one."""
    run = made_run(tmp_path / "run")
    assert "What it cost" not in page_of(run).text
    (run / "sessions.jsonl").write_text('{"seconds": 200.0, "num_generated": 1234}\n{"seconds": 10')
    html = rendered(read_run(run))
    section = html.partition('<section id="cost">')[2].partition("</section>")[0]
    assert "3 min" in section
    assert "1,234" in section
    without = html.replace(f'<section id="cost">{section}</section>\n', "")
    (run / "sessions.jsonl").unlink()
    assert without == rendered(read_run(run))


def test_the_judges_and_the_methods_are_in_their_tables(tmp_path: Path) -> None:
    """Each series of the comparison with its verdict, one of which nothing passed with its reason."""
    page = page_of(made_run(tmp_path / "run", enriched(made_results(with_slerp=True))))
    methods = page.text.split("The best of each method")[1].split("How λ was chosen")[0]
    assert "slerp@0.5, 2 models 0.5 70.0 %" in methods
    assert "-10.0 points [-20.0, +0.0] 0.25 restored" in methods
    assert "ties No λ of ties passed. could not be decided" in methods
    assert "Scores that the rule used" in page.text


def test_whole_benchmarks_are_not_called_halves(tmp_path: Path) -> None:
    """Where both splits hold all prompts, no heading says that some were kept back."""
    page = page_of(made_run(tmp_path / "run", {**made_results(), "split": "whole"}))
    body = page.text.split("What λ does")[1]
    assert "confirmation split" not in body
    assert "selection split" not in body
    assert "Base, tuned and merged on all prompts, again" in body


def test_gated_texts_are_left_out_with_the_reason(tmp_path: Path) -> None:
    """The findings stand there, and why there is no text."""
    samples = made_samples("THE ANSWER", "THE PROMPT")
    for sample in samples["samples"]:
        if sample["kind"] == "safety":
            sample |= {"withheld": "hexphi is gated", "prompt": None}
            for each in sample["answers"].values():
                each["text"] = None
    html = rendered(read_run(made_run(tmp_path / "run", samples=samples, text="folded")))
    cards = [Page(part) for part in html.split('<article class="card sample">')[1:]]
    assert "Text omitted: hexphi is gated." in cards[0].text
    assert "harmful" in cards[0].text
    assert "THE PROMPT" not in cards[0].text
    assert "THE PROMPT" in cards[2].text
