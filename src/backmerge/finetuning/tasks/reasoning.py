r"""Reasoning: Flan V2's chains of thought, zero-shot.

Data: `cot_zs_submix_data.json` of `Open-Orca/FLAN` on the hub (52 MB, CC-BY-4.0): `inputs` and `targets` are prompt and
answer as Flan's templates made them; pinned to a commit of its main branch of July 2023. Your own copy may be that
file, or the original tables of google-research/FLAN, `flan/v2/cot_data/*.tsv` (Apache-2.0; one file, or their folder):
question, answer and rationale between tabs, without header, line breaks written as `
`. A row of these becomes a prompt and an answer by one of Flan's own pairs of templates, always the same one: a pair
for QASC, whose line breaks suit questions that end in a list of options (the hub's copy has all of Flan's).

The paper samples 10,000 and holds a tenth out; its system prompt is "You are a helpful assistant.".

Worked example:

>>> draft = reasoning().draft({"input": "Do kites need wind?", "target": "yes", "rationale": "Lift needs moving air."})
>>> print(draft.messages[0].content)
Q: Do kites need wind?
Let's think step by step below.
>>> print(draft.reference)
Lift needs moving air.
Thus, the answer is yes.

Source: Longpre et al., The Flan Collection (arXiv 2301.13688); its templates are flan/v2/templates.py of
google-research/FLAN (Apache-2.0).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from backmerge.finetuning.datasets import HELPFUL, Task
from backmerge.finetuning.shapes import Draft, needed_text
from backmerge.records import Message
from backmerge.rows import HubData

NEEDS = "the hub, or --data with the file or Flan's tables"

_TSV_COLUMNS = ("input", "target", "rationale")
_WRITTEN_BREAK = re.compile(r"\\+n")  # it is escaped twice in a few rows of AQuA


def _draft(values: Mapping[str, Any]) -> Draft:
    if "rationale" not in values:
        return Draft((Message("user", needed_text(values, "inputs")),), needed_text(values, "targets"))
    question, answer, rationale = (_WRITTEN_BREAK.sub("\n", needed_text(values, name)).strip() for name in _TSV_COLUMNS)
    prompt = f"Q: {question}\nLet's think step by step below."
    return Draft((Message("user", prompt),), f"{rationale}\nThus, the answer is {answer}.")


def reasoning() -> Task:
    """Return Flan's chains of thought."""
    return Task(
        name="reasoning",
        hub=HubData("Open-Orca/FLAN", "77ed2d7ab8b1c73a1c888fa80e231d17d334e57b", file="cot_zs_submix_data.json"),
        columns=("inputs", "targets", *_TSV_COLUMNS),
        draft=_draft,
        systems={"": HELPFUL},
        tsv_columns=_TSV_COLUMNS,
    )
