"""What can be said about the data to tune on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from backmerge.config import Settings


class DataSettings(Settings):
    """Which rows are learned from, which are held out, and under which system prompt.

    Attributes:
        file: Your own copy of a preset's data: a file, or a folder of files.
        revision: Of a data set on the hub; a preset has its own.
        columns: Where your columns have other names: what we call it, to what the file calls it, such as
            `{"prompt": "query", "completion": "reply"}`.
        num_examples: Examples that are sampled at most; a preset's own number (10,000) if not given, and all rows of
            your own data.
        validation: Share of the examples that is held out.
        system: In place of the preset's or the rows' own system prompt; `""` for none.
        drop_overlap: Whether examples that a safety benchmark also has are left out.
    """

    file: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] = Field(default_factory=dict)
    num_examples: Annotated[int, Field(gt=0)] | None = None
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    system: str | None = None
    drop_overlap: bool = False
