"""The model card: README.md next to a merged model's weights, for people and for the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from backmerge.checkpoints.reader import CARD as RECIPE
from backmerge.outputs import CURVE, EVAL_RESULTS
from backmerge.reporting.card_facts import CardFacts, plain
from backmerge.reporting.card_front import front_matter, registered_results
from backmerge.reporting.card_reading import json_object, license_of, license_terms
from backmerge.reporting.drawing import as_bytes
from backmerge.reporting.explained import KINDS, counted
from backmerge.reporting.findings import (
    bound_text,
    caveats,
    cell_text,
    lam_text,
    limiting,
    looks_sentence,
    losses_text,
    pair_test_lines,
    recipe_text,
    served_text,
    standings,
    verdict_sentence,
)
from backmerge.reporting.markdown import escaped
from backmerge.reporting.merge_card import write_card
from backmerge.reporting.plots import curves
from backmerge.results import RestoreResults
from backmerge.runs import write_whole

__all__ = ["license_of", "license_terms", "model_card", "write_cards"]

PAPER = "[Farn et al. 2024](https://arxiv.org/abs/2412.19512)"


def write_cards(directory: Path, results: RestoreResults, curve: bytes | None = None) -> None:
    """Write a card into every merged model's folder, confirmed or not, with its curve and the results for the hub.

    Args:
        directory: The run directory.
        results: Its `results.json`.
        curve: Its `plots/curves.png`, which is drawn if omitted.
    """
    file = directory / "experiment.yaml"
    experiment = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    if curve is None and results.merged and results.benchmarks:
        curve = as_bytes(curves(results), "png")
    for row in results.merged:
        folder = directory / row.directory
        # the user may have moved the folder away
        if folder.is_dir():
            fingerprint = json_object(folder / RECIPE).get("fingerprint")
            if curve is not None:
                write_whole(folder / CURVE, curve)
            facts = CardFacts(
                results,
                row,
                experiment=experiment if isinstance(experiment, dict) else {},
                fingerprint=fingerprint if isinstance(fingerprint, str) else None,
                files=frozenset(file.name for file in folder.iterdir()),
            )
            write_card(folder, model_card(facts))
            if entries := registered_results(facts):
                text = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=10**6)
                write_whole(folder / EVAL_RESULTS, text)


def model_card(facts: CardFacts) -> str:
    """Return README.md of one merged model."""
    front = yaml.safe_dump(front_matter(facts), sort_keys=False, allow_unicode=True, width=10**6)
    return f"---\n{front}---\n\n" + "\n".join(body(facts)) + "\n"


def body(facts: CardFacts) -> Iterator[str]:
    """Yield the lines below the front matter. Names are escaped."""
    results = facts.results
    yield f"# {_words(results.name)}: {_words(facts.row.point)} of {_words(facts.row.tuned)}"
    yield ""
    yield from _verdict(facts)
    yield from ("", "## Recipe", "", *_recipe(facts))
    yield from ("", "## Measured", "", *_table(facts))
    if CURVE in facts.files:
        yield from ("", f"![Each benchmark against λ, with 95 % intervals; base at 0, tuned model at 1]({CURVE})")
    yield from ("", "## How it was measured", "", *_measuring(facts))
    yield from ("", "## Limits", "", *(f"- {_words(line)}" for line in caveats(results)))
    yield from ("", "## Licence", "", _license(facts))
    yield from ("", "## To load it", "", "```python", *_loading(facts), "```")


def _words(text: Any) -> str:
    return escaped(plain(text))


def _code(text: Any) -> str:
    """Return text as a code span that the text cannot end."""
    return f"`{plain(text).replace('`', '')}`"


def _verdict(facts: CardFacts) -> Iterator[str]:
    results, own = facts.results, facts.own_confirmation
    kind = "adapter" if facts.is_adapter else "model"
    yield _confirmed(facts, kind)
    where = "prompts that λ was not chosen on" if not results.is_whole else "prompts, on which λ was not chosen"
    yield ""
    limits = [finding.name for finding in limiting(results)]
    shown = "not shown" if limits else standings(results)[own.verdict].badge
    because = f" ({_words(', '.join(limits))})" if limits else ""
    head = f"This {kind}: {_words(shown)}{because}."
    difference = own.asr_difference
    if difference is not None:
        yield (
            f"{head} Its attack success rate differs from the base's by {bound_text(difference, own.verdict)} on "
            f"{difference.n} {where} (margin: {results.choice.margin * 100:g} points)."
        )
    elif own.losses:
        yield (
            f"{head} It loses, on {where}: {_words(losses_text(own.losses))} (margin: "
            f"{own.losses[0].margin * 100:g} points)."
        )
    if len(results.merged) > 1:
        yield ""
        yield f"The mean over {len(results.merged)} models: {_words(verdict_sentence(results))}"


def _confirmed(facts: CardFacts, kind: str) -> str:
    """Return whether the model may be used, as one sentence."""
    is_worse = facts.own_confirmation.verdict == "worse"
    if not facts.results.has_safety:
        if facts.row.confirmed:
            return (
                f"**Confirmed:** what this {kind} loses against the base was shown to be below the margin. "
                "**Its safety was not measured.**"
            )
        fails = f" It fails: this {kind} is shown to lose more than the margin." if is_worse else ""
        return f"**Not confirmed.**{fails} Its safety was not measured either."
    if facts.row.confirmed:
        return f"**Confirmed:** the attack success rate of this {kind} was shown to be within the margin of the base's."
    if is_worse:
        return (
            f"**Not confirmed as safe.** It fails: this {kind} is shown to be less safe than the base. Do not use it."
        )
    return f"**Not confirmed as safe.** Do not treat the safety of this {kind} as restored."


def _recipe(facts: CardFacts) -> Iterator[str]:
    results, choice, point = facts.results, facts.results.choice, facts.point
    if facts.row.point == "tuned":
        yield "- the tuned model, unmerged"
    elif facts.is_merge:
        yield f"- method: {_words(choice.series)} (merged back with the base, {PAPER})"
    else:
        yield f"- {_words(recipe_text(results))}, unmerged"
    if choice.lam is not None:
        yield f"- λ: {lam_text(choice.lam)} (0 is the base, 1 the tuned model)"
    elif choice.setting is not None:
        yield f"- λ, by part (0 is the base, 1 the tuned model): {_code(json.dumps(choice.setting))}"
    if facts.is_merge and point is not None and point.parameters:
        yield f"- parameters: {_code(json.dumps(point.parameters, sort_keys=True))}"
    guard = None if point is None else point.parameters.get("guard")
    for guarded in results.guards:
        if guarded.guard == guard:
            yield (
                f"- made to act like the base on {_words(guarded.description)}; nothing here was measured on these "
                f"prompts"
            )
    yield f"- base: {_words(facts.base_words)} ({_code(results.base.fingerprint)})"
    for row in facts.tuned_rows:
        yield f"- tuned: {_words(row.name)} ({_code(row.fingerprint)})"
    if form := served_text(facts.row):
        yield f"- measured and written as {_words(form)}"
    yield f"- made by backmerge {_words(results.backmerge)}; `backmerge.json` holds the recipe"


def _table(facts: CardFacts) -> Iterator[str]:
    """Yield the scores of this model, not the mean over all."""
    cells = facts.cells()
    yield f"| | metric | {' | '.join(cells)} | n |"
    yield f"|---|---|{'---:|' * (len(cells) + 1)}"
    for benchmark in facts.results.benchmarks:
        key = (benchmark.name, benchmark.metric)
        texts = [cell_text(found.get(key)) for found in cells.values()]
        kind = f"{KINDS[benchmark.kind][0]}: {_words(benchmark.name)}"
        size = benchmark.sizes.confirmation
        yield f"| {kind} | {_words(benchmark.metric)} | {' | '.join(texts)} | {size} |"
    yield ""
    over = {heading: {cell.covers for cell in found.values()} for heading, found in cells.items()}
    with_seeds = [heading for heading, covers in over.items() if "prompts and seeds" in covers]
    seeds = f" ({', '.join(with_seeds)}: over prompts and seeds)" if with_seeds else ", not seeds"
    yield f"Rates with 95 % intervals over prompts{seeds}, on the confirmation prompts. Answers that could not be"
    yield "scored are in no rate."
    yield "Every metric with its interval is in the front matter, under `model-index`."
    for line in pair_test_lines(facts.results):
        yield from ("", _words(line))


def _measuring(facts: CardFacts) -> Iterator[str]:
    results, choice = facts.results, facts.results.choice
    chosen_on = "held-out rows of the tuning data" if results.validation else "one half of the prompts (selection)"
    if results.is_whole:
        yield f"- λ was chosen on {chosen_on}; these weights then answered all prompts."
    else:
        yield f"- λ was chosen on {chosen_on}; these weights answered the other half (confirmation)."
        yield "  Near-duplicate prompts are kept in the same half and count once."
    yield f"- Rule: {_words(choice.rule)}. “{standings(results)['restored'].badge.capitalize()}” means that"
    if results.has_safety:
        yield f"  the attack success rate was shown to be less than {choice.margin * 100:g} percentage points above the"
        yield "  base's, with 95 % confidence, paired by prompt."
    if choice.keep_margin is not None:
        also = "also, " if results.has_safety else ""
        yield f"  {also}on each benchmark to keep, the loss was shown to be below {choice.keep_margin * 100:g}"
        yield "  percentage points, with 95 % confidence, paired by prompt."
    if looks := looks_sentence(results):
        yield f"- {looks}"
    for benchmark in results.benchmarks:
        sizes = benchmark.sizes
        asked = (
            f"{sizes.confirmation} prompts"
            if results.is_whole
            else f"{sizes.selection} prompts to choose, {sizes.confirmation} to confirm"
        )
        judge = f", judged by {_words(benchmark.judge)}" if benchmark.judge else ""
        yield f"- {_words(benchmark.name)} ({benchmark.kind.replace('_', '-')}): {asked}{judge}"
    if results.second_judge:
        yield (
            f"- A second judge, {_words(results.second_judge)}, was also used. If the two put the model on different "
            f"sides of the margin, the verdict is 'not shown'."
        )
    yield from _circumstances(facts)


def _circumstances(facts: CardFacts) -> Iterator[str]:
    """Yield engine, sampling and seeds, as far as they are known."""
    environment = facts.results.environment
    engine = " ".join(str(environment[key]) for key in ("engine", "version") if environment.get(key))
    made = [f"{key} {environment[key]}" for key in ("dtype", "device") if environment.get(key)]
    sampling = (facts.experiment.get("evaluate") or {}).get("sampling") or {}
    drawn = [f"{key.replace('_', ' ')} {sampling[key]}" for key in ("temperature", "top_p", "seed") if key in sampling]
    if told := [*filter(None, [engine]), *made, *drawn]:
        yield f"- Answers: {_words(', '.join(told))}"
    finetune = facts.experiment.get("finetune")
    if isinstance(finetune, dict) and finetune.get("seeds"):
        seeds = f"{counted(len(finetune['seeds']), 'seed')}: {', '.join(map(str, finetune['seeds']))}"
        yield f"- Tuned on {_words(finetune.get('dataset'))} with {_words(seeds)}"


def _license(facts: CardFacts) -> str:
    base, words = facts.results.base, _words(facts.base_words)
    if not base.license:
        return (
            f"The base, {words}, states no licence in its files. Its terms also apply to this model: find them "
            f"before you use or share it, and put `license` into the front matter."
        )
    name = base.license_name if base.license == "other" else None
    return f"The licence of the base, {words}: {_words(name or base.license)}. The tuning data may add terms."


def _loading(facts: CardFacts) -> Iterator[str]:
    yield "from transformers import AutoModelForCausalLM, AutoTokenizer"
    if facts.is_adapter:
        yield "from peft import PeftModel"
    yield ""
    yield 'place = "."  # this folder, or the name of this repository on the hub'
    if facts.is_adapter:
        base = facts.base_on_hub or "BASE"
        yield f'base = "{base}"'
        yield "model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), place)"
        yield "tokenizer = AutoTokenizer.from_pretrained(base)"
        return
    yield "model = AutoModelForCausalLM.from_pretrained(place)"
    yield "tokenizer = AutoTokenizer.from_pretrained(place)"
