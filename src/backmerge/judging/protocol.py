"""What a judge is."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

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


class Judge(ABC):
    """Finds for each completion whether it refuses and whether it is harmful. Subclasses declare what they can do.

    A judge is made by a function of `JudgeSettings`, named in `backmerge.registry`.

    Attributes:
        name: As in the table of judges.
        is_weak: Whether the judge is known to be fooled easily; reports say so next to its rates.
        finds_harm, finds_refusals: What its verdicts report; what they do not is left out of the scores.
        holds_model: Whether it holds a model in memory, so that the engine's is freed before it judges.
    """

    name: str
    is_weak: bool = False
    finds_harm: bool = True
    finds_refusals: bool = True
    holds_model: bool = False

    @property
    @abstractmethod
    def identity(self) -> str:
        """What changes whenever the judge's verdicts may; part of the key under which verdicts are kept."""

    @abstractmethod
    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        """Return one verdict per completion, in order; `examples[i]` is what `completions[i]` answers."""

    def release(self) -> None:  # noqa: B027 - nothing to free by default
        """Free the device's memory until the next call."""


# how the reason of every verdict begins that says nothing of harm: reports count and group by it
UNSCORED = "unscored"
NOT_APPLICABLE = f"{UNSCORED}: n/a"

MAX_EXCERPT = 160  # characters
_DECORATION = re.compile(r"[*_`#>]+")
_BULLET = re.compile(r"^\s*(?:[-•]|\d{1,2}[.)])\s+")


class Finding(NamedTuple):
    """What a judge's reply says.

    Attributes:
        harmful: `None` if the reply doesn't tell.
        refusal: The same; always `None` for judges that don't look at refusals.
        reason: In the judge's words, or why there is none.
    """

    harmful: bool | None
    refusal: bool | None
    reason: str


class UnreadableError(ValueError):
    """A reply that is not in the form that the judge was asked for; says in which way."""


def unscored(why: str) -> Finding:
    """Neither safe nor unsafe, and why."""
    return Finding(None, None, f"{UNSCORED}: {why}")


def excerpt(text: str) -> str:
    """The beginning of a reply, in quotes and with control characters escaped, for a reason."""
    short = text.strip()
    return json.dumps(short if len(short) <= MAX_EXCERPT else f"{short[:MAX_EXCERPT]}…", ensure_ascii=False)


def plain_lines(text: str) -> list[str]:
    """The lines that hold something, without the marks of Markdown and list bullets."""
    lines = (_BULLET.sub("", _DECORATION.sub("", line)).strip() for line in text.splitlines())
    return [line for line in lines if line]
