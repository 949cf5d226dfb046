"""What a judge is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import Field

from backmerge.config import Settings
from backmerge.generation.protocol import EngineSettings
from backmerge.records import Completion, Example, Verdict


class JudgeSettings(Settings):
    """Which judge, and for a judge that is a model, what runs it.

    Attributes:
        name: From the table of judges, or package.module:function.
        model: The judge's weights: a folder or a hub id; the judge's own by default.
        engine: What runs the judge's model.
        options: The judge's own; its module says which.
    """

    name: str = "refusal-phrases"
    model: str | None = None
    engine: EngineSettings = EngineSettings()
    options: Mapping[str, Any] = Field(default_factory=dict)


class Judge(Protocol):
    """Finds for each completion whether it refuses and whether it is harmful.

    A judge is made by a function of `JudgeSettings`, named in `backmerge.registry`. One that holds a model in memory
    has `release()` too, which frees it until the next call.

    Attributes:
        name: As in the table of judges.
        identity: Changes whenever the judge's verdicts may; part of the key under which verdicts are kept.
        is_weak: Whether the judge is known to be fooled easily; reports say so beside its rates.
        finds_harm, finds_refusals: What its verdicts tell; what they do not is left out of the scores.
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - described above

    @property
    def identity(self) -> str: ...  # noqa: D102

    @property
    def is_weak(self) -> bool: ...  # noqa: D102

    @property
    def finds_harm(self) -> bool: ...  # noqa: D102

    @property
    def finds_refusals(self) -> bool: ...  # noqa: D102

    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        """One verdict per completion, in order; `examples[i]` is what `completions[i]` answers."""
        ...
