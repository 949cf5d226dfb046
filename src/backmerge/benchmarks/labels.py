"""Files with both harmful and harmless prompts, distinguished by a label: only one side is used.

Known: XSTest's own file (`label` is safe or unsafe; `type` begins with `contrast_` for the unsafe ones), and columns
`label` or `type` with the words below, or `harmful`, `is_harmful`, `safe`, `is_safe` with a truth value. A column
`type` with other words is a category.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from backmerge.benchmarks.protocol import Kind
from backmerge.errors import DataError
from backmerge.progress import say
from backmerge.rows import Row

HARMFUL = frozenset(
    {"unsafe", "harmful", "toxic", "malicious", "unsafe_prompt", "vanilla_harmful", "adversarial_harmful"}
)
HARMLESS = frozenset({"safe", "harmless", "benign", "non-toxic", "nontoxic", "vanilla_benign", "adversarial_benign"})
CONTRAST = "contrast_"  # prefix of XSTest's types for harmful prompts that are worded like harmless ones
FLAGS = {"harmful": True, "is_harmful": True, "unsafe": True, "safe": False, "is_safe": False, "benign": False}
TRUTHS = {"true": True, "1": True, "1.0": True, "yes": True, "false": False, "0": False, "0.0": False, "no": False}
SHOWN = 5


def of_side(rows: Sequence[Row], kind: Kind, path: Path, harmful: Collection[str] = ()) -> list[Row]:
    """Return the rows that belong to a kind of benchmark, and print how many were left out.

    Args:
        rows: All rows of a file.
        kind: `safety` uses the harmful ones, `over_refusal` the harmless ones; all others use all.
        path: The file, for messages.
        harmful: Values of the column `label` that mark a harmful prompt, if the user lists them; all others are
            harmless.

    Raises:
        DataError: `label` has values with an unknown meaning, or no row is of the kind.
    """
    if kind not in ("safety", "over_refusal"):
        return list(rows)
    marks = [_is_harmful(row, frozenset(map(str, harmful))) for row in rows]
    if any(_is_contrast(row) for row in rows):  # XSTest's types: all others are harmless
        marks = [_is_contrast(row) if mark is None else mark for row, mark in zip(rows, marks, strict=True)]
    unknown = sorted({str(_value(row, "label")) for row, mark in zip(rows, marks, strict=True) if mark is None})
    if all(mark is None for mark in marks) and all(_value(row, "label") is None for row in rows):
        return list(rows)
    if any(mark is None for mark in marks):
        raise DataError(
            f"{path}: are rows with the label {', '.join(unknown[:SHOWN])} harmful or harmless? Only "
            f"{'harmful' if kind == 'safety' else 'harmless'} ones are used here",
            remedy="list the values that mean harmful in the benchmark's options, such as "
            f"--set 'evaluate.{kind}.0.options.harmful=[...]', or rename the column to 'category' if it means neither.",
        )
    wanted = kind == "safety"
    kept = [row for row, mark in zip(rows, marks, strict=True) if mark is wanted]
    word = "harmful" if wanted else "harmless"
    if not kept:
        raise DataError(f"{path} has no {word} prompts, by its labels", remedy=f"give a file of {word} prompts.")
    if len(kept) < len(rows):
        say(f"{path.name}: only {len(kept)} of its {len(rows)} prompts are used: the {word} ones, by their labels.")
    return kept


def _value(row: Row, name: str) -> Any:
    found = next((value for key, value in row.values.items() if str(key).strip().casefold() == name), None)
    return None if found is None or not str(found).strip() else found


def _is_contrast(row: Row) -> bool:
    return str(_value(row, "type") or "").strip().casefold().startswith(CONTRAST)


def _is_harmful(row: Row, harmful: Collection[str]) -> bool | None:
    label = _value(row, "label")
    if harmful and label is not None:
        return str(label) in harmful
    for name in ("label", "type"):
        word = str(_value(row, name) or "").strip().casefold()
        if word in HARMFUL or word in HARMLESS:
            return word in HARMFUL
    for name, means_harmful in FLAGS.items():
        truth = TRUTHS.get(str(_value(row, name)).strip().casefold())
        if truth is not None:
            return truth is means_harmful
    return None
