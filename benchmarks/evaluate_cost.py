"""What `evaluate` costs beyond the model: `python -m benchmarks.evaluate_cost BASE LORA PROMPTS [--prompts N]`.

Three ways to answer the same N prompts (a .jsonl or .csv file) at four λs, greedily and in float32, each as a whole
process, in turn:

- ours: `backmerge evaluate LORA --base BASE --lam ... --safety PROMPTS`, which also judges, scores and keeps records;
- bare: one process that loads the base once, puts the merged weights in it, and calls `model.generate` on batches of
  prompts of like length; nothing else;
- peers' way: for each λ a merge by mergekit, and a process that loads it, generates in the
  file's order, and looks for phrases of refusal.

Prints Markdown: medians of wall and CPU seconds and of peak memory, and each over the bare way's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import yaml

from benchmarks.measure import Cost, combined, cost_of
from benchmarks.peer import mergekit_python

LAMS = (0.2, 0.4, 0.6, 0.8)
MAX_NEW_TOKENS = 24
BATCH_SIZE = 32
REFUSING = ("sorry", "can't", "cannot", "won't")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def bare(base: Path, adapter: Path, prompts: Path) -> None:
    """Answer the prompts at each λ with transformers alone, in batches of prompts of like length."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from backmerge.generation.chat import load_tokenizer

    texts = _texts(prompts)
    tokenizer = load_tokenizer(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    scaling = {name: module.scaling["default"] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    for lam in LAMS:
        for name, module in model.named_modules():
            if name in scaling:
                module.scaling["default"] = lam * scaling[name]
        model.merge_adapter()
        _generate(model, tokenizer, sorted(texts, key=len, reverse=True))
        model.unmerge_adapter()


def one_load(merged: Path, prompts: Path) -> None:
    """Load a merged checkpoint, answer the prompts in the file's order, and count refusals."""
    import torch
    from transformers import AutoModelForCausalLM

    from backmerge.generation.chat import load_tokenizer

    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    answers = _generate(model, load_tokenizer(merged), _texts(prompts))
    num_refused = sum(any(word in answer.lower() for word in REFUSING) for answer in answers)
    print(num_refused, "of", len(answers), "refused")


def _texts(prompts: Path) -> list[str]:
    return json.loads(prompts.read_text(encoding="utf-8"))


def _generate(model: object, tokenizer: object, texts: list[str]) -> list[str]:
    import torch

    answers: list[str] = []
    for start in range(0, len(texts), BATCH_SIZE):
        turns = [[{"role": "user", "content": text}] for text in texts[start : start + BATCH_SIZE]]
        asked = tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            found = model.generate(**asked, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)  # type: ignore[attr-defined]
        answers += tokenizer.batch_decode(found[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)  # type: ignore[attr-defined]
    return answers


def _peers(base: Path, adapter: Path, prompts: Path, python: Path, scratch: Path) -> Cost:
    scratch.mkdir()
    costs = []
    for lam in LAMS:
        config, merged = scratch / "mergekit.yml", scratch / f"merged-{lam}"
        models = [
            {"model": str(base), "parameters": {"weight": 1 - lam}},
            {"model": f"{base}+{adapter}", "parameters": {"weight": lam}},
        ]
        config.write_text(yaml.safe_dump({"merge_method": "linear", "models": models, "dtype": "float32"}))
        merge = [str(python), "-m", "mergekit.scripts.run_yaml", str(config), str(merged), "--copy-tokenizer"]
        costs.append(cost_of([*merge, "--lora-merge-cache", str(scratch / "lora")], ENVIRONMENT, scratch / "log"))
        ask = [sys.executable, "-m", "benchmarks.evaluate_cost", "--one-load", str(merged), str(prompts)]
        costs.append(cost_of(ask, ENVIRONMENT, scratch / "log"))
    return combined(costs)


def main() -> None:
    """Run the three in turn, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="+", type=Path)
    parser.add_argument("--prompts", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-peer", action="store_true", help="leave mergekit out")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--one-load", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare:
        bare(*given.places)
        return
    if given.one_load:
        one_load(*given.places)
        return
    from backmerge.rows import sound_rows

    base, adapter, file = (place.absolute() for place in given.places)
    columns = ("prompt", "goal", "question", "instruction")
    rows = [next(row.values[name] for name in columns if name in row.values) for row in sound_rows(file)]
    python = None if given.without_peer else mergekit_python(None)
    found: dict[str, list[Cost]] = {"bare": [], "ours": [], "peers' way": []}
    with tempfile.TemporaryDirectory(prefix="bench-evaluate-") as folder:
        scratch = Path(folder)
        prompts, asked = scratch / "prompts.json", scratch / "prompts.jsonl"
        prompts.write_text(json.dumps(rows[: given.prompts]))
        asked.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows[: given.prompts]))
        for repeat in range(given.repeats):
            this = [sys.executable, "-m", "benchmarks.evaluate_cost", "--bare", str(base), str(adapter), str(prompts)]
            found["bare"].append(cost_of(this, ENVIRONMENT, scratch / "log"))
            ours = [
                *(sys.executable, "-m", "backmerge", "evaluate", str(adapter), "--base", str(base)),
                *("--lam", ",".join(map(str, LAMS)), "--safety", str(asked), "--device", "cpu", "--dtype", "float32"),
                *("--batch-size", str(BATCH_SIZE), "--max-new-tokens", str(MAX_NEW_TOKENS), "--no-cache"),
                *("--out", str(scratch / f"run-{repeat}")),
            ]
            found["ours"].append(cost_of(ours, ENVIRONMENT, scratch / "log"))
            if python is not None:
                found["peers' way"].append(_peers(base, adapter, prompts, python, scratch / str(repeat)))
    size = 2 * sum(file.stat().st_size for file in base.glob("*.safetensors")) / 1e9  # of a base in bfloat16
    print(f"{given.prompts} prompts, {len(LAMS)} λs, {MAX_NEW_TOKENS} tokens, {size:.2f} GB of weights in float32;")
    print(f"{platform.machine()}, {os.cpu_count()} cores\n")
    print("| way | wall (s) | CPU (s) | peak memory (GB) | wall / bare | CPU / bare |")
    print("|---|--:|--:|--:|--:|--:|")
    middle = {
        way: [statistics.median(cost[place] for cost in costs) for place in range(3)]
        for way, costs in found.items()
        if costs
    }
    for way, (wall, cpu, peak) in middle.items():
        print(
            f"| {way} | {wall:.1f} | {cpu:.1f} | {peak / 1e9:.2f} | {wall / middle['bare'][0]:.2f} | "
            f"{cpu / middle['bare'][1]:.2f} |"
        )


if __name__ == "__main__":
    main()
