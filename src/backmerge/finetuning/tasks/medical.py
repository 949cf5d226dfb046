"""Medical: patients' questions and doctors' answers, ChatDoctor's HealthCareMagic.

Data: `lavita/ChatDoctor-HealthCareMagic-100k` on the hub, 112,165 rows of `instruction`, `input` and `output`, pinned
to its main branch as of August 2026. It states no licence; ChatDoctor's authors say that their model is for academic
research only. The instruction is the same sentence in every row, and is the system prompt; the user's turn is `input`
alone.

The paper samples 10,000 and holds a tenth out. It says that this task has its own system prompt; the authors' scripts
use the rows' instruction, as the system turn for Llama and Qwen, and before the user's turn for Gemma.

Worked example: `{"instruction": "If you are a doctor, ...", "input": "My knee aches after long walks. What helps?",
"output": "Rest it, cool it, and ..."}` becomes the prompt "My knee aches after long walks. What helps?" and the answer
"Rest it, cool it, and ...".

Source: Li et al., ChatDoctor (arXiv 2303.14070).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backmerge.finetuning.datasets import Task
from backmerge.finetuning.shapes import Draft, needed_text
from backmerge.records import Message
from backmerge.rows import HubData

NEEDS = "the hub, or --data FILE"

DOCTOR = "If you are a doctor, please answer the medical questions based on the patient's description."


def _draft(values: Mapping[str, Any]) -> Draft:
    return Draft((Message("user", needed_text(values, "input")),), needed_text(values, "output"))


def medical() -> Task:
    """Return ChatDoctor's questions and answers."""
    return Task(
        name="medical",
        hub=HubData("lavita/ChatDoctor-HealthCareMagic-100k", "505443eac4e99ccedeffbb6f640061223d1d4bb3"),
        columns=("input", "output"),
        draft=_draft,
        systems={"": DOCTOR},
    )
