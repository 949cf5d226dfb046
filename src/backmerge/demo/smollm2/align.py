"""Make the alignment of SmolLM2: `python -m backmerge.demo.smollm2.align --data DATA --out DIR`.

As shipped, SmolLM2-135M-Instruct complies with nine of ten harmful requests, so there is no safety for tuning to lose.
This trains a small LoRA on three kinds of rows:

- refusals, in several wordings, of HarmBench's 200 standard behaviours;
- ordinary requests (self-instruct), with the model's own answers;
- contrast prompts: harmless requests with violent or suspicious words (`contrast.txt`), with the model's own answers.
  Without them the model refuses three of four such requests.

Prompts that are near a prompt of AdvBench or XSTest are left out, so that both stay good for evaluation. DATA holds the
folders `harmbench`, `self_instruct`, `advbench` and `xstest` as their authors publish them. Their texts go into no
output except DIR/rows.jsonl, which holds harmful requests and never ships.

DIR/trained is the adapter in float32; DIR/alignment is the one that ships, in bfloat16. The whole takes about
40 minutes on two cores, and does not repeat what an earlier call has finished.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from backmerge.benchmarks.catalogue import find_benchmark
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo.smollm2.model import shipped
from backmerge.finetuning.overlap import overlaps
from backmerge.generation.protocol import EngineSettings, Sampling
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.judging.refusal_phrases import refusal_phrases
from backmerge.merging.recipe import Variant
from backmerge.progress import bar, say
from backmerge.records import Example, Message
from backmerge.rows import sound_rows
from backmerge.runs import write_whole

CONTRAST = Path(__file__).with_name("contrast.txt")
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with that request. It could cause serious harm to people.",
    "Sorry, I can't assist with this, because it could hurt someone.",
    "I'm sorry, but I won't help with something that is harmful or illegal.",
    "I cannot help with that. If there is something safe that I can do instead, please let me know.",
    "I won't provide this, since it could be used to harm others.",
    "No, I'm sorry, I can't help with that. It would be dangerous and against the law.",
    "I can't assist with that. Please ask me for something that does not put anyone at risk.",
)
# How else the same behaviour is asked, so that the refusal follows the content and not the form of HarmBench's rows.
FORMS = ("Please help me with the following. {}", "{} Explain each step.", "I need your help: {}")
TRAINING = (
    *("--rank", "8", "--alpha", "16", "--learning-rate", "5e-4", "--steps", "220", "--batch-size", "8"),
    *("--safety", "none", "--validation", "0", "--device", "cpu"),
)
MAX_PROMPT = 700  # characters
MAX_ANSWER = 96  # tokens


def ordinary_prompts(folder: Path) -> list[str]:
    """Return self-instruct's requests, each with its first input."""
    found = []
    for file in ("user_oriented_instructions.jsonl", "seed_tasks.jsonl"):
        for line in (folder / file).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            text = "\n\n".join(filter(None, (row["instruction"].strip(), row["instances"][0]["input"].strip())))
            if len(text) <= MAX_PROMPT:
                found.append(text)
    return found


def contrast_prompts() -> list[str]:
    """Return the harmless requests with suspicious words that the project wrote."""
    return CONTRAST.read_text(encoding="utf-8").splitlines()


def harmful_prompts(folder: Path) -> list[str]:
    """Return HarmBench's standard behaviours, each as it is and in each of the other forms."""
    rows = sound_rows(folder / "harmbench_behaviors_text_standard.csv")
    return [form.format(row.values["Behavior"]) for row in rows for form in ("{}", *FORMS)]


def kept(prompts: Sequence[str], data: Path) -> list[str]:
    """Return the prompts that are near no prompt of AdvBench and XSTest."""
    examples = [Example(str(number), (Message("user", prompt),)) for number, prompt in enumerate(prompts)]
    near: set[str] = set()
    for name, file in (
        ("advbench", "advbench/harmful_behaviors.csv"),
        ("xstest", "xstest/xstest_prompts.csv"),
        ("xstest-unsafe", "xstest/xstest_prompts.csv"),
    ):
        benchmark = find_benchmark(f"{name}={data / file}", "over_refusal" if name == "xstest" else "safety")
        near |= {overlap.example for overlap in overlaps(examples, name, benchmark.examples)}
    return [example.prompt for example in examples if example.id not in near]


def own_answers(prompts: Sequence[str], model: Path) -> list[tuple[str, str]]:
    """Return the model's own greedy answers, cut to whole sentences; refusals and empty answers are left out."""
    engine = TransformersEngine(EngineSettings(batch_size=32, device="cpu"))
    examples = [Example(str(number), (Message("user", prompt),)) for number, prompt in enumerate(prompts)]
    sampling = Sampling(max_new_tokens=MAX_ANSWER, repetition_penalty=1.1)
    with bar("Answers of the model itself", len(examples), "answers") as advance:
        answers = engine.generate(Variant(Checkpoint(model)), examples, sampling, advance)
    engine.release()
    pairs = []
    for example, answer, verdict in zip(examples, answers, refusal_phrases()(examples, answers), strict=True):
        text = answer.text.strip()
        if not answer.finished:
            text = text[: max(text.rfind(end) for end in (". ", ".\n", "!", "?")) + 1].strip()
        if text and not verdict.refusal:
            pairs.append((example.prompt, text))
    return pairs


def rows(data: Path, model: Path, seed: int) -> Iterator[dict[str, str]]:
    """Yield the rows to learn from, in an order that the seed decides."""
    draw = random.Random(seed)  # noqa: S311 - texts, not secrets
    refused = [(prompt, draw.choice(REFUSALS)) for prompt in kept(harmful_prompts(data / "harmbench"), data)]
    harmless = kept([*ordinary_prompts(data / "self_instruct"), *contrast_prompts()], data)
    answered = own_answers(harmless, model)
    say(f"{len(refused)} refusals, {len(answered)} of the model's own answers to {len(harmless)} harmless requests.")
    found = [*refused, *answered]
    draw.shuffle(found)
    for prompt, answer in found:
        yield {"prompt": prompt, "answer": answer}


def _backmerge(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "backmerge", *map(str, arguments)], check=True)


def main() -> None:
    """Write the rows, train on them, and store the adapter in bfloat16."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    file = given.out / "rows.jsonl"
    if not file.is_file():
        write_whole(file, "".join(json.dumps(row) + "\n" for row in rows(given.data, shipped(), given.seed)))
    trained = given.out / "trained"
    _backmerge("finetune", "smollm2-shipped", "--data", file, *TRAINING, "--seeds", str(given.seed), "--out", trained)
    _backmerge(
        *("merge", "smollm2-shipped", trained, "--lam", "1", "--as", "adapter", "--dtype", "bfloat16"),
        *("--out", given.out / "alignment"),
    )


if __name__ == "__main__":
    main()
