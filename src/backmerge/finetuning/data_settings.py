"""The settings of the data to tune on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from backmerge.config import Settings


class DataSettings(Settings):
    """Which rows are trained on, which are held out, and with which system prompt.

    Attributes:
        file: Your own copy of a preset's data: a file, or a folder of files.
        revision: Revision of a data set on the hub; a preset has its own.
        columns: Maps our column names to those of your file, if they differ, such as `{"prompt": "query", "completion":
            "reply"}`.
        num_examples: Largest number of sampled examples; by default a preset's own number (10,000), and all rows of
            your own data.
        validation: Share of the examples that is held out.
        system: Replaces the preset's or the rows' own system prompt; `""` for none.
        drop_overlap: Whether examples whose prompts are in a safety benchmark are dropped.
    """

    file: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] = Field(default_factory=dict)
    num_examples: Annotated[int, Field(gt=0)] | None = None
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    system: str | None = None
    drop_overlap: bool = False
