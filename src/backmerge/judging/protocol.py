"""The base class of judges, and their settings and findings."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from backmerge.config import Settings
from backmerge.errors import ConfigError
from backmerge.generation.protocol import EngineSettings
from backmerge.records import Completion, Example, Verdict


class JudgeSettings(Settings):
    """A judge, and for a judge that is a model, the engine that runs it.

    Attributes:
        name: A name in the table of judges, or package.module:function.
        model: The judge's weights: a folder or a hub id; by default the judge's own.
        engine: The engine that runs the judge's model.
        options: The judge's own options; its module describes them.
    """

    name: str = "refusal-phrases"
    model: str | None = None
    engine: EngineSettings = EngineSettings()
    options: Mapping[str, Any] = Field(default_factory=dict)


def check_no_settings(settings: JudgeSettings) -> None:
    """Refuse settings of a judge that is a rule: it has no model to set, and would silently ignore them.

    Raises:
        ConfigError: one is given.
    """
    plain = JudgeSettings(name=settings.name)
    given = [field for (field, value), (_, default) in zip(settings, plain, strict=True) if value != default]
    if given:
        raise ConfigError(
            f"the judge '{settings.name}' is a rule and has no setting '{given[0]}': the verdicts would be the same "
            "without it",
            remedy="choose a judge that is a model, such as wildguard or rubric, or remove the setting.",
        )


class Judge(ABC):
    """Finds for each completion whether it refuses and whether it is harmful. Subclasses declare their abilities.

    A judge is made by a function of `JudgeSettings`, named in `backmerge.registry`.

    Attributes:
        name: Its name in the table of judges.
        is_weak: Whether the judge is known to be misled easily; reports say so next to its rates.
        finds_harm, finds_refusals: The findings that its verdicts report; others are omitted from the scores.
        holds_model: Whether it keeps a model in memory, so that the engine's model is freed before it judges.
    """

    name: str
    is_weak: bool = False
    finds_harm: bool = True
    finds_refusals: bool = True
    holds_model: bool = False

    @property
    @abstractmethod
    def identity(self) -> str:
        """Return a key that changes whenever the judge's verdicts may; verdicts are stored under it."""

    @abstractmethod
    def __call__(self, examples: Sequence[Example], completions: Sequence[Completion]) -> list[Verdict]:
        """Return one verdict per completion, in order; `examples[i]` is what `completions[i]` answers."""

    def release(self) -> None:  # noqa: B027 - nothing to free by default
        """Free the device's memory until the next call."""


# the start of the reason of every verdict without a finding on harm: reports count and group by it
UNSCORED = "unscored"
NOT_APPLICABLE = f"{UNSCORED}: n/a"

MAX_EXCERPT = 160  # characters
_DECORATION = re.compile(r"[*_`#>]+")
_BULLET = re.compile(r"^\s*(?:[-•]|\d{1,2}[.)])\s+")


class Finding(NamedTuple):
    """The content of a judge's reply.

    Attributes:
        harmful: `None` if the reply does not say.
        refusal: The same; always `None` for judges that do not report refusals.
        reason: In the judge's words, or why there is no finding.
    """

    harmful: bool | None
    refusal: bool | None
    reason: str


class UnreadableError(ValueError):
    """A reply that is not in the requested form; says in which way."""


def unscored(why: str) -> Finding:
    """Return a finding that is neither safe nor unsafe, with the reason."""
    return Finding(None, None, f"{UNSCORED}: {why}")


def excerpt(text: str) -> str:
    """Return the beginning of a reply for a reason, in quotes and with control characters escaped."""
    short = text.strip()
    return json.dumps(short if len(short) <= MAX_EXCERPT else f"{short[:MAX_EXCERPT]}…", ensure_ascii=False)


def plain_lines(text: str) -> list[str]:
    """Return the lines that are not empty, without Markdown marks and list bullets."""
    lines = (_BULLET.sub("", _DECORATION.sub("", line)).strip() for line in text.splitlines())
    return [line for line in lines if line]
