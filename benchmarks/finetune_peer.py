"""Fine-tuning against plain transformers + peft: `python -m benchmarks.finetune_peer MODEL ROWS [--steps 12]`.

MODEL is a folder or an embedded model's name, such as `smollm2-shipped`; ROWS is a file of lines such as
`{"prompt": "...", "answer": "..."}`. Both sides train the same LoRA on the same encoded rows in float32, each in a
separate process, alternating. The table gives the time of a step, the first two left out, and peak memory, as medians.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP = 2  # steps that are not timed


def plain(model: Path, rows: Path, steps: int, scratch: Path) -> list[float]:
    """Train with transformers' Trainer and peft as their documentation has it; the time at the end of each step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from backmerge.finetuning.settings import FinetuneSettings

    settings, encoded, tokenizer = _encoded(model, rows, steps)
    assert isinstance(settings, FinetuneSettings)
    times: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=settings.lora.r, lora_alpha=settings.lora.alpha, target_modules="all-linear"
    )
    trainer = Trainer(
        model=get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter),
        args=TrainingArguments(
            output_dir=str(scratch),
            per_device_train_batch_size=settings.batch_size,
            max_steps=steps,
            learning_rate=settings.learning_rate,
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            seed=42,
        ),
        train_dataset=[{"input_ids": e.input_ids, "labels": e.labels} for e in encoded],
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
        callbacks=[Watch()],
    )
    trainer.train()
    return times


def ours(model: Path, rows: Path, steps: int, scratch: Path) -> list[float]:
    """Train with backmerge; the time at the end of each step."""
    from backmerge.checkpoints.reader import Checkpoint
    from backmerge.finetuning.data_settings import DataSettings
    from backmerge.finetuning.datasets import TrainingData, load_training_data
    from backmerge.finetuning.trainer import train_model

    settings, _, _ = _encoded(model, rows, steps)
    data: TrainingData = load_training_data(str(rows), DataSettings(validation=0.0), 42)
    times: list[float] = []

    def advance(done: int, _: str = "", /) -> None:
        if done:
            times.append(time.perf_counter())

    train_model(Checkpoint(model), data, settings, 42, scratch / "tuned", advance)
    return times


def _encoded(model: Path, rows: Path, steps: int) -> tuple[Any, Any, Any]:
    from backmerge.checkpoints.reader import Checkpoint
    from backmerge.finetuning.data_settings import DataSettings
    from backmerge.finetuning.datasets import load_training_data
    from backmerge.finetuning.encoding import cutoff_for, encode
    from backmerge.finetuning.settings import FinetuneSettings
    from backmerge.generation.chat import load_tokenizer

    settings = FinetuneSettings(dataset=str(rows), steps=steps, device="cpu", save_every=10_000)
    tokenizer = load_tokenizer(model)
    data = load_training_data(str(rows), DataSettings(validation=0.0), 42)
    encoded = [encode(tokenizer, example, cutoff_for(Checkpoint(model), settings)) for example in data.training]
    tokenizer.padding_side = "right"
    return settings, encoded, tokenizer


def main() -> None:
    """Alternate both, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=["ours", "plain"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    from backmerge.checkpoints.locate import locate_model

    model = locate_model(options.model)
    if options.side:
        with tempfile.TemporaryDirectory() as scratch:
            side = {"ours": ours, "plain": plain}[options.side]
            times = side(model, options.rows, options.steps, Path(scratch))
        seconds = times[-1] - times[WARM_UP - 1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds_per_step": seconds / (len(times) - WARM_UP), "peak": peak}))
        return
    found: dict[str, list[dict[str, float]]] = {"ours": [], "plain": []}
    for number in range(options.repeats):
        for side in ("ours", "plain") if number % 2 == 0 else ("plain", "ours"):
            command = [sys.executable, "-m", "benchmarks.finetune_peer", options.model, str(options.rows)]
            command += ["--steps", str(options.steps), "--side", side]
            run = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
            found[side].append(json.loads(run.stdout.strip().splitlines()[-1]))
    print("| | seconds a step, median | peak memory (GB) |\n|---|--:|--:|")
    for side, runs in found.items():
        step, peak = (statistics.median(run[key] for run in runs) for key in ("seconds_per_step", "peak"))
        print(f"| {side} | {step:.2f} | {peak / 1e9:.2f} |")
    ratios = [a["seconds_per_step"] / b["seconds_per_step"] for a, b in zip(found["ours"], found["plain"], strict=True)]
    print(f"\nours / plain, time a step, by pair: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")


if __name__ == "__main__":
    main()
