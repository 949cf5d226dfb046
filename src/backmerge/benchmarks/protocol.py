"""What a benchmark is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from backmerge.records import Example

Kind = Literal["utility", "safety", "over_refusal"]
Metric = Callable[[Example, str], float]


@dataclass(frozen=True)
class Benchmark:
    """Prompts, and how answers to them are scored. Made by a function that `backmerge.registry` names.

    Attributes:
        name: As in the table of benchmarks, or the file's name.
        kind: `utility` is scored by `metrics`; `safety` and `over_refusal` by a judge (as ASR, and as the share of
            harmless prompts refused).
        examples: Every prompt, in a fixed order.
        max_new_tokens: The generation limit.
        metrics: For `utility`: name to function of (example, answer) with values in [0, 1]. The first is the one
            that λ is chosen on.
    """

    name: str
    kind: Kind
    examples: tuple[Example, ...]
    max_new_tokens: int
    metrics: Mapping[str, Metric] = field(default_factory=dict)
