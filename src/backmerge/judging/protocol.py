"""What a judge is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from backmerge.records import Completion, Example, Verdict


class Judge(Protocol):
    """Finds for each completion whether it refuses and whether it is harmful.

    A judge is made by a function without required arguments, named in `backmerge.registry`.

    Attributes:
        name: As in the table of judges.
        identity: Changes whenever the judge's verdicts may; part of the key under which verdicts are kept.
        is_weak: Whether the judge is known to be fooled easily; reports say so beside its rates.
    """

    name: str
    identity: str
    is_weak: bool

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per completion, in order; `examples[i]` is what `completions[i]` answers."""
        ...
