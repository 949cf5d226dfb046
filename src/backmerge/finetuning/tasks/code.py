"""Code: problems inspired by open-source snippets, with their solutions, MagiCoder's OSS-Instruct.

Data: `ise-uiuc/Magicoder-OSS-Instruct-75K` on the hub (MIT), 75,197 rows of `lang`, `problem` and `solution` among
others; pinned to its main branch, which has not changed since December 2023.

The paper samples 10,000 uniformly by language: an equal number of each, if a language has enough; the other languages
make up for the rest. The system prompt is "You are a helpful assistant.".

Worked example: `{"lang": "Python", "problem": "Write a function that doubles a number.", "solution": "def double(x):
..."}` becomes prompt and answer, unchanged, in the category "python".

Source: Wei et al., Magicoder (arXiv 2312.02120).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backmerge.finetuning.datasets import HELPFUL, Task
from backmerge.finetuning.shapes import Draft, needed_text
from backmerge.records import Message
from backmerge.rows import HubData

NEEDS = "the hub, or --data FILE"


def _draft(values: Mapping[str, Any]) -> Draft:
    language = needed_text(values, "lang").strip().lower()
    return Draft((Message("user", needed_text(values, "problem")),), needed_text(values, "solution"), category=language)


def code() -> Task:
    """Return MagiCoder's problems and solutions."""
    return Task(
        name="code",
        hub=HubData("ise-uiuc/Magicoder-OSS-Instruct-75K", "5f839b1f368a76b161028bb9edff055db34022b2"),
        columns=("lang", "problem", "solution"),
        draft=_draft,
        systems={"": HELPFUL},
        is_uniform_by_category=True,
    )
