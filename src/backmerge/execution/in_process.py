"""Units one after another in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backmerge.execution.work import Counter, OnDone, Told, Work, function_of, plain_copy


def carry_out_here(function: str, works: Sequence[Work], told: Told, on_done: OnDone) -> list[Any]:
    """The results, in the order of the units; an error passes as it is.

    Args:
        function: `module:function`.
        works: The units.
        told: Of the driver's bar.
        on_done: Told of each unit and its result.
    """
    do = function_of(function)
    results = []
    for work in works:

        def tell(steps: int, note: str, key: str = work.key) -> None:
            told.reached(key, steps, note)

        counter = Counter(tell, every=0.0)
        result = plain_copy(do(plain_copy(work.spec), counter))
        results.append(result)
        on_done(work, result)
    return results
