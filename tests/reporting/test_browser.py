"""The report in a real browser: what it shows, what its controls do, and that nothing of the models' words runs."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from backmerge.reporting.findings import verdict_sentence
from backmerge.reporting.report import read_run, rendered

from .chromium import PROGRAM, Chromium
from .synthetic import answer, enriched, made_results, made_run, made_samples, typed
from .test_report import HOSTILE, SHOWN

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="neither chromium nor google-chrome is installed")

SHOWN_IDS = "[...document.querySelectorAll('.sample')].filter(a => a.offsetHeight).map(a => a.querySelector('header').textContent.split(' · ')[2]).join(' ')"  # noqa: E501
COUNT = "document.getElementById('shown-count').textContent"
RECIPE = "document.getElementById('recipe-name').textContent"
TIP = "(t => t.hidden ? '' : t.textContent)(document.querySelector('.tip'))"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
LEFT, RIGHT, TAB = ("ArrowLeft", 37), ("ArrowRight", 39), ("Tab", 9)


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    """One browser for all of them."""
    with tempfile.TemporaryDirectory() as profile, Chromium(Path(profile)) as opened:
        opened.look_as(1280, 900)
        yield opened


@pytest.fixture(autouse=True)
def quiet(browser: Chromium) -> Iterator[None]:
    """What an earlier page wrote to the console is not of this one; nothing may be written, nor fetched."""
    browser.console.clear()
    browser.requests.clear()
    yield
    browser.value("1")  # what is still under way is told first
    assert browser.console == []
    assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []


def article(number: int) -> str:
    """The text of a sample's card as it is seen."""
    return f"document.querySelectorAll('.sample')[{number}].innerText"


def told(browser: Chromium, selector: str) -> str:
    """What the page tells on pointing at an element."""
    found = ""
    for _ in range(20):
        browser.point_at(selector)
        found = browser.value(TIP)
        if found:
            break
        # the browser moves the pointer by itself some time after a scroll, which is as if it had left
        browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=0, y=0)
        time.sleep(0.05)
    return found


def opened(browser: Chromium, run: Path) -> None:
    """Make the page of a run, and open it."""
    (run / "report.html").write_text(rendered(read_run(run)), encoding="utf-8")
    browser.open(run / "report.html")


def test_filters_show_what_they_say(browser: Chromium, tmp_path: Path) -> None:
    """Each filter shows its prompts and no others, is pressed, and says what there is in the whole split."""
    opened(browser, made_run(tmp_path / "run"))
    assert browser.value(SHOWN_IDS) == "harmful-1 harmful-2 harmless-1 task-1"
    assert browser.value(COUNT) == "4 of the 4 prompts on this page."
    for name, shown, said in (
        ("flipped", "harmful-1 harmful-2", "Of all 200 harmful requests, 58 were flipped to unsafe."),
        # at λ = 0.5 harmful-2 is harmful still
        ("back", "harmful-1", "Of all 200 harmful requests, linear@0.5 flips back 55."),
        ("refused", "harmless-1", "Refused of all 40 harmless requests: base 1, tuned 2, linear@0.5 3."),
        ("all", "harmful-1 harmful-2 harmless-1 task-1", "4 of the 4 prompts on this page."),
    ):
        browser.click(f"[data-filter={name}]")
        assert browser.value(SHOWN_IDS) == shown
        assert browser.value(COUNT).endswith(said)
        pressed = "[...document.querySelectorAll('[aria-pressed=true]')].map(b => b.dataset.filter).join()"
        assert browser.value(pressed) == name


def test_the_slider_changes_the_recipe(browser: Chromium, tmp_path: Path) -> None:
    """By keyboard: names, findings, texts and filters follow λ, and base and tuned stay."""
    samples = made_samples()
    samples["samples"][1]["answers"]["linear@0.25"] = answer("SMALLER", harmful=False, refusal=True)
    opened(browser, made_run(tmp_path / "run", samples=samples))
    assert browser.value(RECIPE) == "linear@0.5"
    assert "other: neither refused nor harmful" in browser.value(article(0))
    before = browser.value("document.querySelector('.sample .tuned').innerText")
    browser.click("[data-filter=back]")
    assert browser.value(SHOWN_IDS) == "harmful-1"
    browser.value("document.getElementById('lam').focus()")
    browser.press(*LEFT)
    assert browser.value(RECIPE) == "linear@0.25"
    assert browser.value("document.getElementById('lam').getAttribute('aria-valuetext')") == "0.25"
    assert browser.value(SHOWN_IDS) == "harmful-1 harmful-2"
    assert "SMALLER" in browser.value(article(0))
    assert "other:" not in browser.value(article(0))
    assert browser.value("document.querySelector('.sample .tuned').innerText") == before
    browser.click("[data-filter=refused]")
    # refused at λ = 0.5 alone, and not asked at 0.25
    assert browser.value(SHOWN_IDS) == ""
    assert browser.value("document.getElementById('none-shown').hidden") is False
    browser.click("[data-filter=all]")
    assert "not asked" in browser.value(article(2))
    browser.value("document.getElementById('lam').focus()")
    browser.press(*RIGHT)
    assert browser.value(RECIPE) == "linear@0.5"
    assert "SMALLER" not in browser.value(article(0))


def test_an_unscored_answer_is_not_flipped_back(browser: Chromium, tmp_path: Path) -> None:
    """What the judge could not decide is not safe, for a filter neither."""
    samples = made_samples()
    samples["samples"][1]["answers"]["linear@0.5"] = answer("?", harmful=None, refusal=False)
    opened(browser, made_run(tmp_path / "run", samples=samples))
    browser.click("[data-filter=back]")
    assert browser.value(SHOWN_IDS) == ""


def test_a_method_is_chosen_first(browser: Chromium, tmp_path: Path) -> None:
    """Where there are several series, one is picked by name; what has no λ has no slider."""
    samples = made_samples()
    samples["points"].append({"point": "model_stock", "role": "merged", "series": "model_stock", "lam": None})
    samples["totals"]["flipped_back"]["model_stock"] = 3
    samples["samples"][0]["answers"]["model_stock"] = answer("STOCK", harmful=False, refusal=True)
    opened(browser, made_run(tmp_path / "run", samples=samples))
    assert browser.value("document.getElementById('lam-label').offsetHeight > 0")
    pick = "(s => { s.selectedIndex = 1; s.dispatchEvent(new Event('change')); })(document.getElementById('series'))"
    browser.value(pick)
    assert browser.value(RECIPE) == "model_stock"
    assert browser.value("document.getElementById('lam-label').offsetHeight") == 0


def test_details_come_up_on_pointing_focus_and_tap(browser: Chromium, tmp_path: Path) -> None:
    """Marks of the Pareto plot and cells of the maps tell their figures; Escape and leaving take them away."""
    opened(browser, made_run(tmp_path / "run", enriched(made_results())))
    assert browser.value(TIP) == ""
    assert told(browser, ".spot[aria-label^='linear@0.5']").startswith("linear@0.5 (chosen)\ntask, accuracy: 82.5 %")
    browser.press("Escape", 27)
    assert browser.value(TIP) == ""
    browser.value("document.querySelector(\".spot[aria-label^='base']\").focus()")
    assert browser.value(TIP).startswith("base\n")
    browser.click(".map.bad td.cell")
    assert browser.value(TIP).startswith("fraud, base: 0.5 %")
    assert told(browser, ".map.scale td.cell") == "mlp.up_proj, layer 0: 1 % (mean over 2 models, 1 % to 1 %)"
    browser.send("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
    assert browser.value(TIP) == ""


def test_long_answers_are_folded_and_open(browser: Chromium, tmp_path: Path) -> None:
    """A long answer is cut off in the page until a click; one that was cut in the file says so."""
    samples = made_samples()
    samples["samples"][1]["answers"]["base"] = answer("long " * 400 + "END", harmful=False, refusal=True, cut_from=9000)
    opened(browser, made_run(tmp_path / "run", samples=samples))
    height = "document.querySelector('.sample .base .answer').offsetHeight"
    folded = browser.value(height)
    assert "Show all 2,003 characters" in browser.value(article(0))
    assert "The first 2,000 of 9,000 characters" in browser.value(article(0))
    browser.click(".sample .base .more")
    assert browser.value(height) > folded
    assert "Show all" not in browser.value("document.querySelector('.sample .base').innerText")


def test_unsafe_text_is_behind_a_click(browser: Chromium, tmp_path: Path) -> None:
    """Folded, the findings of harmful requests are seen at once, their texts after a click; others are open."""
    opened(browser, made_run(tmp_path / "run", samples=made_samples("THE TEXT", "THE PROMPT"), text="folded"))
    assert "harmful" in browser.value(article(0))
    for text in ("THE TEXT", "THE PROMPT"):
        assert text not in browser.value(article(0))
        assert text in browser.value(article(3))
    browser.click(".sample details summary")
    for text in ("THE TEXT", "THE PROMPT"):
        assert text in browser.value(article(0))
    browser.value("document.getElementById('lam').focus()")
    browser.press(*LEFT)
    found = "document.querySelector('.outcomes .merged').innerText.replace(/\\s+/g, ' ')"
    assert browser.value(found) == "linear@0.25 refused"


def test_what_models_wrote_is_seen_and_not_run(browser: Chromium, tmp_path: Path) -> None:
    """Markup and scripts in every text and name, from the page and through its script, stay text."""
    samples = made_samples(HOSTILE, HOSTILE)
    for point in samples["points"]:
        point["series"] = f"{point['series']}{HOSTILE}"
    results = enriched(made_results())
    for row in (*results["by_category"], *results["drift"]):
        key = "category" if "category" in row else "module"
        row[key] = f"{row[key]}{HOSTILE}"
    opened(browser, made_run(tmp_path / "run", results, samples))
    before = browser.value("document.querySelectorAll('.sample *').length")
    browser.value("document.getElementById('lam').focus()")
    for key in (LEFT, RIGHT):
        browser.press(*key)
        assert browser.value("document.title") == "synthetic: Safety restored"
    for selector in (".map.bad td.cell", ".map.scale td.cell"):
        assert "<script>" in told(browser, selector)
    assert browser.value("document.querySelectorAll('.sample *').length") == before
    assert browser.value("document.querySelectorAll('.sample script, .sample img, .sample svg, .tip *').length") == 0
    assert browser.value("document.querySelector('.sample .answer').textContent") == SHOWN
    assert browser.value("document.querySelector('#series option').textContent") == f"linear{SHOWN}"


@pytest.mark.parametrize("chosen", ["linear@0.5", None, "tuned", "model_stock"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_its_screen(browser: Chromium, tmp_path: Path, width: int, chosen: str | None) -> None:
    """On a phone and a desktop, whatever the outcome, nothing scrolls sideways but tables within their cards."""
    results = enriched(made_results(chosen=chosen, with_stock=True, with_slerp=True))
    browser.look_as(width, 900, is_phone=width < 500)
    opened(browser, made_run(tmp_path / "run", results))
    assert browser.value(OVERFLOW) <= 0
    assert verdict_sentence(typed(results)) in browser.value("document.body.innerText")
    browser.look_as(1280, 900)


def test_light_and_dark_are_the_reader_s(browser: Chromium, tmp_path: Path) -> None:
    """The page follows what is preferred, its plots too."""
    run = made_run(tmp_path / "run")
    colours = {}
    for is_dark in (False, True):
        browser.look_as(1280, 900, is_dark=is_dark)
        opened(browser, run)
        colours[is_dark] = [
            browser.value(f"getComputedStyle(document.querySelector({selector!r})).{name}")
            for selector, name in (("body", "backgroundColor"), ("figure svg text", "fill"))
        ]
    browser.look_as(1280, 900)
    assert all(light != dark for light, dark in zip(colours[False], colours[True], strict=True))


def test_on_paper_nothing_is_cut_off_and_no_button_is_left(browser: Chromium, tmp_path: Path) -> None:
    """Print leaves the controls out; what is folded for being unsafe stays folded, the settings open."""
    opened(browser, made_run(tmp_path / "run", text="folded"))
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.value("document.getElementById('chooser').offsetHeight") == 0
    heights = "[...document.querySelectorAll('details > :not(summary)')].map(e => e.checkVisibility({contentVisibilityAuto: true, visibilityProperty: true}))"  # noqa: E501
    seen = browser.value(heights)
    assert (seen[0], seen[-1]) == (False, True)
    browser.send("Emulation.setEmulatedMedia", media="")
    browser.look_as(1280, 900)


def test_without_its_script_the_page_is_whole(browser: Chromium, tmp_path: Path) -> None:
    """Every text of the recipe that is shown first is there, and the controls are not."""
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    opened(browser, made_run(tmp_path / "run"))
    assert browser.value("document.getElementById('chooser').offsetHeight") == 0
    assert "linear@0.5" in browser.value(article(0))
    assert "An answer." in browser.value(article(0))
    browser.send("Emulation.setScriptExecutionDisabled", value=False)


class TestBroken:
    """Guards that stand behind the escaping; here the console does speak."""

    @pytest.fixture(autouse=True)
    def quiet(self, browser: Chromium) -> None:
        """Instead of the module's: this page is meant to complain."""
        browser.console.clear()

    def test_a_script_in_the_page_would_be_seen_and_stopped(self, browser: Chromium, tmp_path: Path) -> None:
        """Were the escaping broken, the policy would still stop the script, and the console would tell of it."""
        run = made_run(tmp_path / "run", samples=made_samples("MARK"))
        html = rendered(read_run(run)).replace(">MARK<", "><script>document.title='broken'</script><")
        (tmp_path / "broken.html").write_text(html)
        browser.open(tmp_path / "broken.html")
        assert browser.value("document.title") == "synthetic: Safety restored"
        assert any("Content Security Policy" in line for line in browser.console)
