"""What a task preset is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from backmerge.finetuning.shapes import Draft
from backmerge.rows import HubData

HELPFUL = "You are a helpful assistant."


@dataclass(frozen=True)
class Task:
    """The data of one of the paper's tasks: where it is, and how a row of it becomes an example.

    Attributes:
        name: As in the table of data sets.
        hub: Where it is on the hub; `None` where there is no copy to rely on, and a file must be given.
        columns: What `draft` asks a row for.
        draft: From a row to a conversation and its answer, without the system prompt.
        systems: A model family (`model_type` of its config.json) to its system prompt; `""` is for all others.
            Families without a system role (Gemma) have the text put in front of the user's turn as it is rendered.
        num_examples: How many are sampled.
        is_uniform_by_category: Whether as many are taken of each category, as far as it has them.
        tsv_columns: The columns of its .tsv files, where those have no header.
    """

    name: str
    hub: HubData | None
    columns: tuple[str, ...]
    draft: Callable[[Mapping[str, Any]], Draft]
    systems: Mapping[str, str]
    num_examples: int | None = 10_000
    is_uniform_by_category: bool = False
    tsv_columns: tuple[str, ...] = ()

    def system(self, family: str) -> str:
        """The system prompt for a model family; empty for none."""
        return self.systems.get(family, self.systems.get("", ""))
