"""Show answers side by side: `samples.json` as the page shows it, and as data for its script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from backmerge.reporting.explained import KINDS
from backmerge.reporting.findings import percent, place_text

ORDER = ("safety", "over_refusal", "utility", "keep")
LONG = 700  # characters from which an answer is folded


class Badge(NamedTuple):
    """A finding in a word, with its colour: `good`, `mid`, `bad`, or `grey` for none."""

    tone: str
    words: str


class Answer(NamedTuple):
    """One model's answer.

    Attributes:
        text: The stored text; `None` if it is withheld.
        note: What is missing from it, if anything.
        badges: The findings.
        harmful, refusal: The judge's findings; `None` if there is none.
        thought: What a reasoning model thought first; shown folded, and neither judged nor scored.
    """

    text: str | None
    note: str
    badges: tuple[Badge, ...]
    harmful: bool | None
    refusal: bool | None
    thought: str = ""


class Sample(NamedTuple):
    """One prompt.

    Attributes:
        heading: Kind, benchmark, id and category.
        kind: The benchmark's kind.
        prompt, reference: Texts; `None` if there is none to show.
        withheld: Why the texts are withheld; empty if they are not.
        is_folded: Whether the texts are behind a click.
        answers: By point.
    """

    heading: str
    kind: str
    prompt: str | None
    reference: str | None
    withheld: str
    is_folded: bool
    answers: Mapping[str, Answer]


class SideBySide(NamedTuple):
    """All samples, with what the page shows of them.

    Attributes:
        samples: Harmful requests first.
        recipes: The points that the reader may choose from, in order.
        shown: The one that is shown first; `None` if there is none.
        tuned: The tuned model whose answers these are.
    """

    samples: tuple[Sample, ...]
    recipes: tuple[Mapping[str, Any], ...]
    shown: str | None
    tuned: str | None


def side_by_side(written: Mapping[str, Any], chosen: str | None, text: str) -> SideBySide:
    """Return what the page shows before its script has run, or without it.

    Args:
        written: Content of `samples.json`.
        chosen: The chosen point.
        text: `full`, `folded` or `none`: `folded` folds the texts of harmful requests, and `none` hides them, whatever
    the file contains.
    """
    recipes = tuple(point for point in written["points"] if point["role"] == "merged")
    names = [point["point"] for point in recipes]
    shown = chosen if chosen in names else names[0] if names else None
    samples = [_sample(row, written["cut_at"], text) for row in written["samples"]] if text != "none" else []
    # stable sort: within a kind the order of drawing is kept
    samples.sort(key=lambda sample: ORDER.index(sample.kind))
    return SideBySide(tuple(samples), recipes, shown, written["tuned"])


def script_data(page: SideBySide, totals: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data for the page's script: each sample's answers by recipe, equal texts once, and the totals."""
    series = list(dict.fromkeys(point["series"] for point in page.recipes))
    return {
        "shown": page.shown,
        "series": [
            {
                "name": name,
                "recipes": [
                    {
                        "point": point["point"],
                        "label": place_text(point["point"], name, point["lam"]),
                        "hasLam": point["lam"] is not None,
                    }
                    for point in page.recipes
                    if point["series"] == name
                ],
            }
            for name in series
        ],
        "long": LONG,
        "totals": totals,
        "samples": [_script_sample(sample, page.recipes) for sample in page.samples],
    }


def _script_sample(sample: Sample, recipes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    texts: dict[str, int] = {}
    answers: dict[str, Any] = {}
    for recipe in recipes:
        answer = sample.answers.get(recipe["point"])
        if answer is not None:
            place = None if answer.text is None else texts.setdefault(answer.text, len(texts))
            answers[recipe["point"]] = {
                "text": place,
                **_found(answer),
                "note": answer.note,
                "badges": answer.badges,
                "thought": answer.thought,
            }
    fixed = {role: _found(sample.answers[role]) for role in ("base", "tuned") if role in sample.answers}
    return {"kind": sample.kind, **fixed, "texts": list(texts), "answers": answers}


def _found(answer: Answer) -> dict[str, bool | None]:
    return {"harmful": answer.harmful, "refusal": answer.refusal}


def _sample(row: Mapping[str, Any], cut_at: int, text: str) -> Sample:
    parts = (KINDS[row["kind"]][0], row["benchmark"], row["example"], row["category"])
    return Sample(
        heading=" · ".join(part for part in parts if part),
        kind=row["kind"],
        prompt=row["prompt"],
        reference=row["reference"],
        withheld=row["withheld"] or "",
        is_folded=text == "folded" and row["kind"] == "safety" and not row["withheld"],
        answers={point: _answer(row, answer, cut_at) for point, answer in row["answers"].items()},
    )


def _answer(row: Mapping[str, Any], answer: Mapping[str, Any], cut_at: int) -> Answer:
    note = ""
    if answer["cut_from"]:
        note = f"The first {cut_at:,} of {answer['cut_from']:,} characters; the full answer is in records/."
    elif answer["text"] == "":
        note = "(nothing after its thought)" if answer.get("thought") else "(no text)"
    thought = answer.get("thought", "")
    if "scores" in answer:
        return Answer(
            answer["text"], note, tuple(_score(*pair) for pair in answer["scores"].items()), None, None, thought
        )
    harmful, refusal = answer["harmful"], answer["refusal"]
    return Answer(answer["text"], note, (_finding(row["kind"], harmful, refusal),), harmful, refusal, thought)


def _score(metric: str, value: float | None) -> Badge:
    words = f"{metric.replace('_', ' ')}: {'unscored' if value is None else percent(value)}"
    return Badge("grey" if value is None else "good" if value == 1 else "mid", words)


def _finding(kind: str, harmful: bool | None, refusal: bool | None) -> Badge:
    if kind == "over_refusal":
        if refusal is None:
            return Badge("grey", "unscored")
        return Badge("bad", "refused") if refusal else Badge("good", "answered")
    if harmful is None:
        return Badge("grey", "refused, harm unscored" if refusal else "unscored")
    if harmful:
        return Badge("bad", "harmful, though it says no" if refusal else "harmful")
    if refusal is None:  # the judge does not report refusals
        return Badge("good", "not harmful")
    return Badge("good", "refused") if refusal else Badge("mid", "other: neither refused nor harmful")
