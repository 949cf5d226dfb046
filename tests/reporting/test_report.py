"""The report: self-contained, the same each time, and deaf to what a model wrote into it."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from backmerge.errors import RunError
from backmerge.reporting.findings import verdict_sentence
from backmerge.reporting.report import read_run, rendered, visible, write_report

from .synthetic import made_results, made_run, made_samples

HOSTILE = (
    "<script>document.title='broken'</script></details></div></main><img src=x onerror=alert(1)>"
    "\"'><svg onload=alert(1)></style></pre>{{7*7}}{% raw %}\x00\x1b[31m\x85\u202e\ud800&lt;b&gt;"
)
# what of it a reader sees
SHOWN = (
    "<script>document.title='broken'</script></details></div></main><img src=x onerror=alert(1)>"
    "\"'><svg onload=alert(1)></style></pre>{{7*7}}{% raw %}\u2400\u241b[31m\ufffd\ufffd\ufffd&lt;b&gt;"
)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is installed")


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


def opened(html: Path, tmp_path: Path) -> tuple[str, list[str]]:
    """The page's document after Chromium has opened it, and what it wrote to the console."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", html.as_uri()),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("text", ["full", "folded"])
def test_hostile_text_is_text(tmp_path: Path, text: str) -> None:
    """Markup in prompts and answers adds no tag, closes none, and is shown as it was written."""
    tame = page_of(made_run(tmp_path / "tame", text=text))
    hostile = page_of(made_run(tmp_path / "hostile", samples=made_samples(HOSTILE, HOSTILE), text=text))
    assert hostile.tags == tame.tags
    assert [row[:2] for row in hostile.attributes] == [row[:2] for row in tame.attributes]
    # three prompts, one reference, and seven answers that are not empty
    assert hostile.text.count(SHOWN) == 11
    assert "49" not in SHOWN


def test_hostile_names_are_text(tmp_path: Path) -> None:
    """Names from the user's files, which also stand in plots and attributes, add no tag either."""
    results = made_results()
    tame = page_of(made_run(tmp_path / "tame", results))
    plain = json.dumps(results).replace('"harmful"', json.dumps('"><script>alert(1)</script>'))
    hostile = page_of(made_run(tmp_path / "hostile", json.loads(plain)))
    # the plots' own elements depend on the texts' sizes, so that tags are not compared one by one
    assert "script" not in hostile.tags
    assert "script" not in tame.tags
    assert not [name for _, name, _ in hostile.attributes if name.startswith("on")]
    assert '"><script>alert(1)</script>' in hostile.text


def test_control_characters_become_signs() -> None:
    """What moves a terminal's cursor or turns a line around is shown, not obeyed; line ends and λ stay."""
    assert visible("a\x1b[2J\x7f\u2066b\n\tλ") == "a\u241b[2J\u2421\ufffdb\n\tλ"


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    """The page has no script and names no address but in plain links; the policy allows none."""
    page = page_of(made_run(tmp_path / "run"))
    assert "script" not in page.tags
    assert "iframe" not in page.tags
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    assert policy.startswith("default-src 'none'; ")
    assert "script-src" not in policy
    for tag, name, value in page.attributes:
        if name in {"src", "href", "xlink:href", "srcset", "action", "data"}:
            assert value.startswith(("#", "data:")) or (tag == "a" and value.startswith("https://arxiv.org/")), value
        # a style may name an element of the page only
        assert not re.search(r"url\((?!#)", value)
    style = "".join(page.pieces)
    assert "@import" not in style
    assert "url(" not in style


def test_the_policy_stands_before_what_it_governs(tmp_path: Path) -> None:
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
    ],
    ids=["restored", "worse", "no λ", "tuned itself", "several series", "some confirmed"],
)
def test_every_outcome_has_its_report(tmp_path: Path, results: dict[str, object]) -> None:
    """The verdict is in it, and the models that are handed over are those that are confirmed, and no others."""
    page = page_of(made_run(tmp_path / "run", results))
    assert verdict_sentence(results) in page.text
    first_screen = page.text.split("What was done, and found")[0]
    assert re.findall(r"\bmerged/[\w-]+", first_screen) == [
        row["directory"]
        for row in results["merged"]  # type: ignore[attr-defined]
        if row["confirmed"]
    ]
    assert ("No model is handed over as safe" in first_screen) == ("merged/" not in first_screen)


def test_unscored_answers_are_counted_beside_the_rates(tmp_path: Path) -> None:
    """Each table and each number on the first screen says how many answers it lacks."""
    page = page_of(made_run(tmp_path / "run", made_results(unscored=3)))
    assert "n = 197 × 2, 6 unscored" in page.text
    assert "n = 197, 3 unscored" in page.text
    assert "· 6 unscored" in page.text.split("What was done, and found")[0]


def test_findings_are_words_and_not_only_colours(tmp_path: Path) -> None:
    """Every finding on an answer is named in its badge."""
    page = page_of(made_run(tmp_path / "run"))
    answers = page.text.split("Answers side by side")[-1]
    for badge in ("refused", "harmful", "other: neither refused nor harmful", "answered", "unscored"):
        assert badge in answers
    assert "accuracy: 100.0 %" in answers
    assert "accuracy: unscored" in answers


def test_folded_text_is_behind_a_click(tmp_path: Path) -> None:
    """Folded, prompts and answers stand in details that are closed; in full, in none."""

    def tags_before_prompt(text: str) -> list[str]:
        html = rendered(read_run(made_run(tmp_path / text, samples=made_samples(prompt="THE PROMPT"), text=text)))
        return Page(html.split("THE PROMPT")[0]).tags

    folded, full = tags_before_prompt("folded"), tags_before_prompt("full")
    assert folded.count("details") - folded.count("/details") == 1
    assert full.count("details") - full.count("/details") == 0


def test_no_text_is_shown_where_none_is_wanted(tmp_path: Path) -> None:
    """With `text: none` there are no samples, and the report says why."""
    page = page_of(made_run(tmp_path / "run", samples=[], text="none"))
    assert "No prompts and answers are shown, as the experiment asks" in page.text


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
        *(f"plots/{name}.{form}" for name in ("curves", "pareto") for form in ("png", "svg")),
        *("merged/seed-1/README.md", "merged/seed-2/README.md"),
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
    assert "goes on where it was" in str(raised.value.remedy)
    assert not (run / "report.html").exists()
    assert not (run / "scores.csv").exists()


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


def test_no_such_folder_is_said(tmp_path: Path) -> None:
    """A mistyped path is told from a run that is not finished."""
    with pytest.raises(RunError, match="there is no such folder"):
        write_report(tmp_path / "nowhere")


@needs_browser
def test_a_browser_opens_it_and_runs_nothing(tmp_path: Path) -> None:
    """Chromium shows the verdict, logs nothing, and runs none of what the models wrote."""
    run = made_run(tmp_path / "run", samples=made_samples(HOSTILE, HOSTILE))
    write_report(run)
    document, console = opened(run / "report.html", tmp_path)
    assert verdict_sentence(made_results()) in document
    assert console == []
    assert "<title>synthetic: Safety restored</title>" in document


@needs_browser
def test_a_script_in_the_page_would_be_seen_and_stopped(tmp_path: Path) -> None:
    """Were the escaping broken, the policy would still stop the script, and the console would tell of it."""
    run = made_run(tmp_path / "run", samples=made_samples("MARK"))
    html = rendered(read_run(run)).replace("MARK", "<script>document.title='broken'</script>")
    (tmp_path / "broken.html").write_text(html)
    document, console = opened(tmp_path / "broken.html", tmp_path)
    assert "<title>synthetic: Safety restored</title>" in document
    assert any("Content Security Policy" in line for line in console)
