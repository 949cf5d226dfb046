"""Which λ to measure next, and which to take; pure functions from what was measured to a decision with its reason.

| question | function |
|---|---|
| which point is chosen | `choose`, by one of `RULES` |
| what do other prompts say of it | `confirm` |
| which λ is measured next | `Race`, in batches of prompts; `lam_between`, beyond the grid |
"""

from backmerge.selection.candidates import Bounded, Candidate, Choice, Step, Verdict, confirm, lam_between
from backmerge.selection.race import Arm, Batch, Race
from backmerge.selection.rules import RULES, choose, choose_safe
from backmerge.selection.settings import ChoiceSettings, LayersSettings, SearchSettings, check_search

__all__ = [
    "RULES",
    "Arm",
    "Batch",
    "Bounded",
    "Candidate",
    "Choice",
    "ChoiceSettings",
    "LayersSettings",
    "Race",
    "SearchSettings",
    "Step",
    "Verdict",
    "check_search",
    "choose",
    "choose_safe",
    "confirm",
    "lam_between",
]
