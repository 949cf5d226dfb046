"""A benchmark's own options: known ones only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backmerge.benchmarks.protocol import BenchmarkSettings
from backmerge.errors import ConfigError
from backmerge.registry import closest


def options_of(settings: BenchmarkSettings, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A benchmark's options, with its defaults.

    Raises:
        ConfigError: one is unknown.
    """
    unknown = sorted(set(settings.options) - set(defaults))
    if unknown:
        raise ConfigError(
            f"{settings.name} has no option '{unknown[0]}'{closest(unknown[0], defaults)}",
            remedy=f"known: {', '.join(defaults) or 'none'}.",
        )
    return {**defaults, **settings.options}
