"""Fine-tune without losing safety: merge the tuned weights back with the base's, measure, choose λ.

The Python interface: `finetune`, `merge`, `restore`, `evaluate`, `check`, `diff`, `load_results` and the results that
they return. Each is imported when it is first used, so that `import backmerge` does not load torch.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing takes a while, in which Ctrl-C would not be caught
if TYPE_CHECKING:
    from typing import Any

    from backmerge.api import check, diff, evaluate, finetune, load_results, merge, restore
    from backmerge.records import Estimate
    from backmerge.reporting.diff import Diff
    from backmerge.results import CheckResults, EvaluateResults, RestoreResults, Results

__version__: str

_PLACES = {
    **dict.fromkeys(("check", "diff", "evaluate", "finetune", "load_results", "merge", "restore"), "backmerge.api"),
    **dict.fromkeys(("CheckResults", "EvaluateResults", "RestoreResults", "Results"), "backmerge.results"),
    "Diff": "backmerge.reporting.diff",
    "Estimate": "backmerge.records",
}

__all__ = [
    "CheckResults",
    "Diff",
    "Estimate",
    "EvaluateResults",
    "RestoreResults",
    "Results",
    "__version__",
    "check",
    "diff",
    "evaluate",
    "finetune",
    "load_results",
    "merge",
    "restore",
]


def __getattr__(name: str) -> Any:
    """Import a public name, or find out the version, when it is first used."""
    if name == "__version__":
        from importlib.metadata import version

        return globals().setdefault(name, version("backmerge"))
    if name not in _PLACES:
        raise AttributeError(f"module 'backmerge' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    """List the public names, for completion in notebooks."""
    return sorted(__all__)
