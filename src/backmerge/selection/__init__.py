"""Decide which λ to measure next and which to choose: pure functions of the measurements, with a reason.

| question | function |
|---|---|
| which point is chosen | `choose`, by one of `RULES` |
| is it confirmed on other prompts | `confirm` |
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
