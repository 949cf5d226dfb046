"""Call a function in another process, over two pipes; sent as text to both, so only the standard library is used.

The caller is trusted, the other side is not. Results are built only from plain values: no object of the other side
reaches the caller, so none can claim to equal everything, and nothing is unpickled.
"""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable
from typing import Any

MAX_BYTES = 1 << 24  # of one message


def encode(value: Any) -> Any:  # noqa: PLR0911 - one for each kind
    """Return a value as JSON data: scalars unchanged, everything else as [kind, content].

    Subclasses are treated as their base class, as in comparisons.

    Raises:
        TypeError: it is not of a plain kind.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return ["int", hex(int(value))]
    if isinstance(value, (float, str)):
        return float(value) if isinstance(value, float) else str(value)
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(held)] for key, held in value.items()]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [encode(held) for held in value]]
    raise TypeError(f"a {type(value).__name__} cannot be sent to another process")


def decode(data: Any) -> Any:
    """Return the value that `encode` turned into data.

    Raises:
        ValueError, TypeError: the data are invalid.
    """
    if data is None or isinstance(data, (bool, float, str)):
        return data
    kind, content = data
    if kind == "int":
        return int(content, 16)
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "dict":
        return {decode(key): decode(held) for key, held in content}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(decode, content))


def caller(requests: int, replies: int) -> Callable[..., Any]:
    """Return a proxy for a function in the process at the other end of two pipes.

    An error that the function raises is raised here, as the built-in exception of the same name. A result that is not a
    plain value, or no result, also raises an error.

    Args:
        requests: Descriptor to write to.
        replies: Descriptor to read from.
    """
    asked, answered = os.fdopen(requests, "w", encoding="ascii"), os.fdopen(replies, "r", encoding="ascii")

    def call(*given: Any, **named: Any) -> Any:
        print(json.dumps([encode(given), encode(named)]), file=asked, flush=True)
        line = answered.readline(MAX_BYTES)
        if not line.endswith("\n"):
            raise RuntimeError("the function did not return, or returned too much")
        kind, content = json.loads(line)
        if kind == "returned":
            return decode(content)
        found = getattr(builtins, str(content), None)
        is_error = isinstance(found, type) and issubclass(found, Exception)
        raise found("raised by the function") if is_error and found is not None else RuntimeError(str(content))

    return call


def serve(function: Callable[..., Any], requests: int, replies: int) -> None:
    """Answer calls of a function until there are no more.

    Args:
        function: The function to call.
        requests: Descriptor to read from.
        replies: Descriptor to write to.
    """
    with os.fdopen(requests, "r", encoding="ascii") as asked, os.fdopen(replies, "w", encoding="ascii") as answered:
        for line in asked:
            given, named = map(decode, json.loads(line))
            try:
                reply = ["returned", encode(function(*given, **named))]
            except Exception as error:  # noqa: BLE001  # boundary: whatever the function raises is raised at the other end
                reply = ["raised", type(error).__name__]
            print(json.dumps(reply), file=answered, flush=True)
