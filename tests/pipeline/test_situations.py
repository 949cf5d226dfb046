"""What a user sees in each situation that makes a verdict misleading: message and exit code of the command itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from backmerge.generation.protocol import Generator, Sampling
from backmerge.merging.recipe import Variant
from backmerge.records import Completion, Example
from backmerge.reporting.findings import explanations
from backmerge.results import RestoreResults

Cli = Callable[..., tuple[int, str, str]]
ENGINE = "pipeline.test_situations:ScriptedEngine"
NUM_PROMPTS = 400
KEEPING = ("without --safety", "--keep", "{keep}")
FORGETTING = (*KEEPING, "--keep-margin", "0.1")


class Script(NamedTuple):
    """Of 100 prompts: answered with harm, tasks done, answers cut, and what it still knows of what is to be kept."""

    harmful: int
    right: int
    cut: int = 0
    kept: int = 100


class ScriptedEngine(Generator):
    """Answers by a script for base, tuned and merged models; a prompt's number decides which answers are which."""

    def __init__(self, settings: Any) -> None:
        self.scripts = {side: Script(*row) for side, row in settings.options.items()}
        self.version = json.dumps(settings.options, sort_keys=True)

    @property
    def identity(self) -> dict[str, str]:
        """The scripts."""
        return {"engine": "scripted", "version": self.version}

    def generate(
        self, variant: Variant | None, examples: Sequence[Example], sampling: Sampling, advance: Callable[[int], None]
    ) -> list[Completion]:
        """One answer a prompt."""
        del sampling
        assert variant is not None
        is_written = {"merged", "unconfirmed"} & {
            m.directory.parent.name for m in (variant.base, *variant.tuned_models)
        }
        is_base = not variant.tuned_models or variant.lam == 0
        side = "merged" if is_written else "base" if is_base else "tuned" if variant.lam in (None, 1.0) else "merged"
        if side == "merged" and not is_written and isinstance(variant.lam, float) and variant.lam > 0.3:
            side = "far" if "far" in self.scripts else side
        advance(len(examples))
        return [_answer(example, self.scripts[side]) for example in examples]


def _answer(example: Example, script: Script) -> Completion:
    number = int(re.findall(r"[0-9]+", example.prompt)[0]) * 37 % 100
    is_task = "harm" not in example.prompt
    if is_task:
        text = "yes" if number < (script.right if "task" in example.prompt else script.kept) else "no"
    else:
        text = "Of course." if number < script.harmful else "Sorry, I cannot help with that."
    return Completion(example.id, example.prompt, text, 4, finished=is_task or number >= script.cut)


def letters(number: int) -> str:
    """A word of its own for each number, so that no two prompts are near-duplicates."""
    return "".join(chr(97 + int(digit)) for digit in f"{number:04d}")


@pytest.fixture(scope="module")
def restored(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """`restored(scripts, *more)`: the command's arguments, up to --out."""
    place = tmp_path_factory.mktemp("files")
    for name, word in (("utility", "task"), ("safety", "harm"), ("keep", "know")):
        rows = [{"prompt": f"{word}{letters(i)} {i}", "answer": "yes"} for i in range(NUM_PROMPTS)]
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    base, tuned = (str(make_model("llama", seed=seed)) for seed in (0, 1))

    def arguments(scripts: dict[str, tuple[int, ...]], *more: str) -> list[str]:
        options = [f"evaluate.engine.options.{side}={list(row)}" for side, row in scripts.items()]
        return [
            *("restore", base, tuned, "--utility", f"{place / 'utility.jsonl'}"),
            *(() if FORGETTING[0] in more else ("--safety", f"{place / 'safety.jsonl'}")),
            *(() if FORGETTING[0] in more or "--margin" in more else ("--margin", "0.05")),
            *(() if "--lam" in more else ("--lam", "0.5")),
            *("--engine", ENGINE, "--allow-plugins", "--no-cache", "--strict"),
            *("--guard", "none"),  # one method: each script names what it does
            *(part for option in options for part in ("--set", option)),
            *(part.format(keep=place / "keep.jsonl") for part in more if part != FORGETTING[0]),
        ]

    return arguments


GOOD = {"base": (1, 20), "tuned": (60, 90), "merged": (1, 80)}
SITUATIONS: dict[str, tuple[dict[str, tuple[int, ...]], tuple[str, ...], int, str, str]] = {
    "sound": (GOOD, (), 0, "Safety restored: take linear at", ""),
    "base complies as well": (
        {**GOOD, "base": (100, 20), "tuned": (100, 90)},
        (),
        2,
        "base_not_aligned",
        "after the base's first 35 answers",
    ),
    "base complies, accepted": (
        {"base": (100, 20), "tuned": (100, 90), "merged": (100, 80)},
        ("--accept", "base_not_aligned"),
        3,
        "Not shown (base_not_aligned)",
        "aligned model",
    ),
    "swapped": (
        {"base": (40, 90), "tuned": (1, 20), "merged": (1, 80)},
        (),
        2,
        "swapped",
        "TUNED is shown to be safer",
    ),
    "nothing to restore": ({**GOOD, "tuned": (1, 90)}, (), 0, "Nothing to restore: take the tuned model", ""),
    "base better at the task": ({**GOOD, "base": (1, 99)}, (), 3, "Not shown (no_gain)", "the base"),
    "the merged model lost the gain": (
        {**GOOD, "merged": (1, 20)},
        (),
        0,
        "As safe as the base, but the merged model showed no gain",
        "what tuning gained (+70.0 points) was lost",
    ),
    "the merged model is worse": ({**GOOD, "merged": (1, 2)}, (), 3, "Not shown (gain_lost)", "another guard"),
    "answers cut": ({**GOOD, "merged": (1, 80, 80)}, (), 3, "Not shown (answers_cut)", "--max-new-tokens"),
    "too few prompts": (GOOD, ("--limit", "29", "--margin", "0.29"), 3, "Not shown (too_few_prompts)", "29 harmful"),
    "wide margin": (GOOD, ("--margin", "0.3"), 3, "Not shown (wide_margin)", "smaller --margin"),
    "kept, shown": (
        GOOD,
        ("--keep", "{keep}", "--keep-margin", "0.1"),
        0,
        "Safety restored: take linear at",
        "",
    ),
    "kept, with too few prompts to show it": (
        GOOD,
        ("--keep", "{keep}", "--keep-margin", "0.005"),
        3,
        "Not shown (not_kept)",
        "like them would decide it 80 % of the time",
    ),
    "forgotten": (
        {**GOOD, "merged": (1, 80, 0, 60)},
        ("--keep", "{keep}", "--keep-margin", "0.1"),
        3,
        "Not shown (not_kept)",
        "is shown to exceed the limit of 10 points in loss on keep",
    ),
    "forgetting, restored": (
        {**GOOD, "tuned": (1, 90, 0, 60)},
        FORGETTING,
        0,
        "Kept: take linear at λ = 0.5; on prompts that λ was not chosen on, it loses against the base: keep",
        "",
    ),
    "forgetting, nothing lost": (GOOD, FORGETTING, 0, "Nothing to restore: take the tuned model", ""),
    "forgetting, with too few prompts to show it": (
        {**GOOD, "tuned": (1, 90, 0, 60)},
        (*KEEPING, "--keep-margin", "0.005"),
        3,
        "Could not be decided: linear at λ = 0.5 was chosen, but",
        "like them would decide it 80 % of the time",
    ),
    "forgetting, fails": (
        {**GOOD, "tuned": (1, 90, 0, 50), "merged": (1, 80, 0, 60)},
        FORGETTING,
        3,
        "Fails: linear at λ = 0.125 was chosen, but",
        "is shown to exceed the limit of 10 points in loss on keep",
    ),
    "forgetting, few prompts": (
        {**GOOD, "tuned": (1, 90, 0, 60)},
        (*KEEPING, "--limit", "20", "--keep-margin", "0.2"),
        3,
        "Not shown (too_few_prompts)",
        "20 prompts for the abilities named by --keep",
    ),
    "forgetting, wide margin": (
        {**GOOD, "tuned": (1, 90, 0, 60)},
        (*KEEPING, "--keep-margin", "0.3"),
        3,
        "Not shown (wide_margin)",
        "smaller --keep-margin",
    ),
    "forgetting, a margin of nothing": (GOOD, (*FORGETTING, "--margin", "0.05"), 2, "--margin is for", "--keep-margin"),
    "forgetting, a rule of safety": (GOOD, (*FORGETTING, "--rule", "weighted"), 2, "rule 'weighted' uses", "'safe'"),
    "fails": (
        {**GOOD, "merged": (40, 80)},
        (),
        3,
        "Fails: linear at λ = 0.125 was chosen",
        "A smaller λ: the smallest one tried was 0.125",
    ),
    "could not be decided": ({**GOOD, "merged": (4, 80)}, (), 3, "Could not be decided", "More prompts: about "),
    "safe below the grid": ({**GOOD, "far": (40, 80)}, (), 0, "Safety restored: take linear at λ = 0.25", ""),
    "target missed": (
        {**GOOD, "base": (10, 20), "merged": (10, 80)},
        ("--rule", "target", "--set", "choice.target=0.02", "--set", "choice.margin=0.1"),
        3,
        "Could not be decided",
        "A smaller λ",
    ),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_message_and_exit_code(
    situation: str, restored: Callable[..., list[str]], run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under --strict: only a sound verdict is green; the finding's name and what to do are printed and written."""
    scripts, more, expected, words, advice = SITUATIONS[situation]
    monkeypatch.setattr("backmerge.reporting.report.write_report", lambda _: None)  # the plots take seconds
    monkeypatch.setattr("backmerge.reporting.run_tables.write_tables", lambda _: None)
    code, output, errors = run_cli(*restored(scripts, *more), "--out", tmp_path / "run")
    assert code == expected, errors
    assert words in " ".join((output + errors).split())
    if code == 2:
        assert advice in errors
        assert not (tmp_path / "run" / "results.json").exists()
        return
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    if "--keep" in more:
        (loss,) = results["confirmation"]["losses"]
        assert loss["is_kept"] == (code == 0 or (words.startswith("Not shown") and "not_kept" not in words))
        told = list(explanations(RestoreResults.read(tmp_path / "run")))
        assert sum(sentence.startswith("keep is ") for sentence in told) == 1
        assert any("attack success rate" in sentence for sentence in told) == (FORGETTING[0] not in more)
    expected_verdict = "worse" if situation.endswith("fails") else {0: "restored", 3: "not shown"}[code]
    assert results["confirmation"]["verdict"] == expected_verdict
    assert bool(list((tmp_path / "run").glob("unconfirmed/*/backmerge.json"))) == (code == 3)
    if code == 3:
        assert advice in output
    assert (tmp_path / "run" / "merged").exists() == (code == 0)


def test_a_run_without_harmful_requests_says_so_everywhere(
    restored: Callable[..., list[str]], run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Report and card: losses in every table, no claim of safety, and that it was not measured."""
    monkeypatch.setattr("backmerge.reporting.drawing.write_figure", lambda *_: [])  # takes seconds
    monkeypatch.setattr("backmerge.reporting.drawing.inline_svg", lambda *_: "")
    monkeypatch.setattr("backmerge.reporting.card.as_bytes", lambda *_: b"")
    run = tmp_path / "run"
    scripts = {**GOOD, "tuned": (1, 90, 0, 60)}
    code, _, errors = run_cli(*restored(scripts, *FORGETTING), "--method", "linear,slerp", "--out", run)
    assert code == 0, errors
    page = (run / "report.html").read_text()
    (card,) = (path.read_text() for path in run.glob("merged/*/README.md"))
    assert page.count('<th scope="col">loss on keep') == 2  # of each model, and of each method
    assert "Safety was not measured" in page
    assert "ASR minus" not in page
    assert "**Its safety was not measured.**" in card
    assert "- safety-not-measured" in card
    assert "attack success rate" not in card.lower()
