"""The rules of choice: each a pure function from what was measured to a decision with its reason.

A rule is one function here or in a file of its own, and one line in `RULES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from backmerge.selection.candidates import Candidate, Choice
from backmerge.selection.rules.safe import choose_safe, safe, target
from backmerge.selection.rules.scores import paper, pareto, weighted
from backmerge.selection.settings import ChoiceSettings, RuleName

Rule = Callable[[Sequence[Candidate], ChoiceSettings], Choice]
RULES: Mapping[RuleName, Rule] = {
    "safe": safe,
    "paper": paper,
    "pareto": pareto,
    "weighted": weighted,
    "target": target,
}


def choose(candidates: Sequence[Candidate], settings: ChoiceSettings) -> Choice:
    """The decision among the candidates of all series by the rule that the settings name.

    Args:
        candidates: Merges and, at λ=1, the tuned model; never the base, from which differences are taken.
        settings: Rule, margins and weights.
    """
    if not candidates:
        return Choice(None, "No λ was measured, so none can be chosen.", ())
    return RULES[settings.rule](candidates, settings)


__all__ = ["RULES", "Rule", "choose", "choose_safe", "paper", "pareto", "safe", "target", "weighted"]
