"""Task files of every kind that lm-evaluation-harness has, over ten rows that the embedded model can answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from backmerge.benchmarks.lm_eval_bridge import LmEvalTask, load_lm_eval_task
from backmerge.demo import language, lexicon
from backmerge.registry import Permissions

# what the embedded model is asked about, and the tool that it names or another
PAIRS = lexicon.harmless().plans[:10]
TOOLS = [language.plan(pair).partition("take(")[2].partition(")")[0] for pair in PAIRS]
ROWS = [
    {
        "q": language.ask(pair, language.SEEN_PHRASINGS[0]),
        "a": f"take the {tool if i % 3 else 'moon'}",
        "choices": [f"take the {tool}", "take the moon", "stay"],
        "gold": i % 3,
    }
    for i, (pair, tool) in enumerate(zip(PAIRS, TOOLS, strict=True))
]

GENERATING = """
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
num_fewshot: 2
fewshot_config: {sampler: first_n}
generation_kwargs: {until: [" and", "Sorry"], max_gen_toks: 12, do_sample: false}
filter_list:
  - name: tool
    filter: [{function: regex, regex_pattern: "(take the [a-z]+)"}, {function: take_first}]
  - name: whole
    filter: [{function: remove_whitespace}, {function: take_first}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSING = """
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
num_fewshot: 1
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: acc_mutual_info, aggregation: mean, higher_is_better: true}
  - {metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
"""
TASKS = {
    "generating": GENERATING,
    "described": GENERATING + 'description: "Name a tool.\\n\\n"\n',
    "begun": GENERATING + 'gen_prefix: "To do it, take"\n',
    "random_shots": GENERATING.replace("{sampler: first_n}", "{sampler: default}") + "fewshot_split: test\n",
    "choosing": CHOOSING,
    "begun_choosing": CHOOSING + 'gen_prefix: "To do it, take"\n',
    "last_word": """
output_type: loglikelihood
doc_to_text: "{{q}}"
doc_to_target: " {{a}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
""",
    "whole_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}
GENERATED = ("generating", "described", "begun", "random_shots", "several")
COMPARED = ("choosing", "begun_choosing", "last_word", "whole_text")
TEXT = {"is_chat": False, "as_turns": False}
ONE_TURN = {"is_chat": True, "as_turns": False}
TURNS = {"is_chat": True, "as_turns": True}
WAYS = {"text": TEXT, "one turn": ONE_TURN, "turns": TURNS}


def filled(folder: Path) -> Path:
    """Task files over a local file of ten rows, and a group of two of them with unlike sizes."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (folder / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:3]), encoding="utf-8")
    for name, text in TASKS.items():
        write_task(folder, name, text)
    write_task(folder, "short", GENERATING, "three.jsonl")
    (folder / "several.yaml").write_text(
        "group: several\ntask: [generating, short]\n"
        "aggregate_metric_list: [{metric: exact_match, filter_list: [tool, whole], weight_by_size: true}]\n",
        encoding="utf-8",
    )
    return folder


def write_task(folder: Path, name: str, text: str, data: str = "rows.jsonl") -> Path:
    """A task file whose documents are a local file's rows."""
    where = json.dumps({"data_files": {"test": str(folder / data)}, "cache_dir": str(folder / "cache")})
    path = folder / f"{name}.yaml"
    path.write_text(f"task: {name}\ndataset_path: json\ndataset_kwargs: {where}\ntest_split: test\n{text}", "utf-8")
    return path


def load(folder: Path, name: str, **options: Any) -> LmEvalTask:
    """A task of the folder's."""
    return load_lm_eval_task(name, task_path=folder, permissions=Permissions(plugins=True), **{**TURNS, **options})


def harness(model: Any, folder: Path, name: str, *, is_chat: bool, as_turns: bool, **options: Any) -> Any:
    """What the harness's own runner finds with a model of its own or of ours."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    return lm_eval.simple_evaluate(
        model,
        tasks=[name],
        task_manager=TaskManager(include_defaults=False, include_path=str(folder)),
        apply_chat_template=is_chat,
        fewshot_as_multiturn=is_chat and as_turns,
        bootstrap_iters=0,
        **options,
    )
