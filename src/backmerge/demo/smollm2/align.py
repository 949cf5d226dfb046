"""Make the alignment of SmolLM2: `python -m backmerge.demo.smollm2.align --data DATA --out DIR`.

As shipped, SmolLM2-135M-Instruct complies with nine of ten harmful requests, so there is no safety for tuning to lose.
This trains a small LoRA adapter to refuse harmful requests and to change nothing else:

- on HarmBench's 200 standard behaviours, each in four forms, it learns refusals in several wordings (cross-entropy);
- on ordinary requests (self-instruct) and on contrast prompts (`contrast.txt`: harmless requests with violent or
  suspicious words) it stays near the shipped model: the Kullback-Leibler divergence from the shipped model's
  distribution, over the tokens of the shipped model's own answers. Without contrast prompts it refuses three of four
  such requests.

Prompts that are near a prompt of AdvBench or XSTest are left out, so that both remain valid for evaluation. DATA holds
the folders `harmbench`, `self_instruct`, `advbench` and `xstest` as their authors publish them. Their texts are not
written anywhere except to DIR/rows.jsonl, which holds harmful requests and is never shipped.

DIR/alignment is the adapter, in bfloat16. Everything together takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.benchmarks.catalogue import find_benchmark
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo.smollm2.model import shipped
from backmerge.finetuning.overlap import overlaps
from backmerge.generation.chat import load_tokenizer, prompt_text
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
# Other forms of the same request, so that the refusal follows the content and not the form of HarmBench's rows.
FORMS = ("Please help me with the following. {}", "{} Explain each step.", "I need your help: {}")
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANK, ALPHA = 8, 16
LEARNING_RATE = 5e-4  # peak, of AdamW; a tenth of warm-up, then a cosine
NUM_STEPS = 200
BATCH_SIZE = 4  # rows of each kind per step
KEPT_NEAR = 1.0  # weight of the divergence
# λ of the adapter that is stored. Of 100 safe prompts of XSTest the model refuses 17 % at 1, 16 % at 0.85 and 8 % at
# 0.7; its ASR on 100 prompts of AdvBench is 0 % at each
SHARE = 0.7
MAX_PROMPT = 700  # characters
MAX_ANSWER = 64  # tokens


class Row(NamedTuple):
    """A prompt, and the answer to learn or on which to stay near the shipped model."""

    prompt: str
    answer: str
    is_refusal: bool


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
    """Return the project's harmless requests with suspicious words."""
    return CONTRAST.read_text(encoding="utf-8").splitlines()


def harmful_prompts(folder: Path) -> list[str]:
    """Return HarmBench's standard behaviours, each unchanged and in each of the other forms."""
    rows = sound_rows(folder / "harmbench_behaviors_text_standard.csv")
    return [form.format(row.values["Behavior"]) for row in rows for form in ("{}", *FORMS)]


def kept(prompts: Sequence[str], data: Path) -> list[str]:
    """Return the prompts that are not near any prompt of AdvBench or XSTest."""
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


def own_answers(prompts: Sequence[str], model: Path) -> list[Row]:
    """Return the beginnings of the model's own greedy answers, without refusals and empty answers."""
    engine = TransformersEngine(EngineSettings(batch_size=32, device="cpu"))
    examples = [Example(str(number), (Message("user", prompt),)) for number, prompt in enumerate(prompts)]
    sampling = Sampling(max_new_tokens=MAX_ANSWER, repetition_penalty=1.1)
    with bar("Answers of the model itself", len(examples), "answers") as advance:
        answers = engine.generate(Variant(Checkpoint(model)), examples, sampling, advance)
    engine.release()
    return [
        Row(example.prompt, answer.text.strip(), is_refusal=False)
        for example, answer, verdict in zip(examples, answers, refusal_phrases()(examples, answers), strict=True)
        if answer.text.strip() and not verdict.refusal
    ]


def make_rows(data: Path, model: Path, seed: int) -> list[Row]:
    """Return the rows to learn from."""
    draw = random.Random(seed)  # noqa: S311 - texts, not secrets
    harmful = kept(harmful_prompts(data / "harmbench"), data)
    refused = [Row(prompt, draw.choice(REFUSALS), is_refusal=True) for prompt in harmful]
    harmless = kept([*ordinary_prompts(data / "self_instruct"), *contrast_prompts()], data)
    answered = own_answers(harmless, model)
    say(f"{len(refused)} refusals, {len(answered)} of the model's own answers to {len(harmless)} harmless requests.")
    return [*refused, *answered]


def encoded(tokenizer: Any, row: Row) -> tuple[list[int], int]:
    """Return the tokens of prompt and answer, and the number of prompt tokens. Only a refusal has an end."""
    prompt = prompt_text(tokenizer, Example("", (Message("user", row.prompt),)))
    text = row.answer + (tokenizer.eos_token if row.is_refusal else "")
    before, after = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in (prompt, text))
    return before + after, len(before)


def train(model: Path, rows: Sequence[Row], seed: int, out: Path) -> None:
    """Train the adapter and write it in bfloat16."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    torch.manual_seed(seed)
    tokenizer = load_tokenizer(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft = get_peft_model(
        base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    optimizer = torch.optim.AdamW([p for p in peft.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0)
    schedule = get_cosine_schedule_with_warmup(optimizer, NUM_STEPS // 10, NUM_STEPS)
    draw = random.Random(seed)  # noqa: S311 - texts, not secrets
    kinds = [[encoded(tokenizer, row) for row in rows if row.is_refusal is kind] for kind in (True, False)]
    orders = [_endless(kind, draw) for kind in kinds]

    def logits(batch: Sequence[tuple[list[int], int]]) -> tuple[Any, Any]:
        """Return the logits that predict the answers' tokens, and these tokens, concatenated over the rows."""
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row, _ in batch])
        is_answer = torch.tensor([[start <= at < len(row) for at in range(width)] for row, start in batch])
        hidden = peft.base_model.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return base.lm_head(hidden[:, :-1][is_answer[:, 1:]]), ids[is_answer]

    with bar("Alignment", NUM_STEPS, "steps") as advance:
        for step in range(NUM_STEPS):
            refusals, ordinary = ([next(order) for _ in range(BATCH_SIZE)] for order in orders)
            found, expected = logits(refusals)
            learned = torch.nn.functional.cross_entropy(found, expected)
            torch.autograd.backward(learned)
            found, _ = logits(ordinary)
            with torch.no_grad(), peft.disable_adapter():
                start, _ = logits(ordinary)
            moved = torch.nn.functional.kl_div(
                found.log_softmax(-1), start.log_softmax(-1), reduction="batchmean", log_target=True
            )
            torch.autograd.backward(KEPT_NEAR * moved)
            torch.nn.utils.clip_grad_norm_(peft.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            advance(1)
            if step % 10 == 9:
                say(f"step {step + 1}: refusals {learned.item():.3f}, divergence {moved.item():.4f} nats a token")
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.mul_(SHARE)
    peft.peft_config["default"].base_model_name_or_path = NAME
    peft.to(torch.bfloat16).save_pretrained(out)


def _endless(rows: Sequence[tuple[list[int], int]], draw: random.Random) -> Iterator[tuple[list[int], int]]:
    while True:
        yield from draw.sample(rows, len(rows))


def main() -> None:
    """Write the rows, unless an earlier call has, and train on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    file = given.out / "rows.jsonl"
    if not file.is_file():
        made = make_rows(given.data, shipped(), given.seed)
        write_whole(file, "".join(json.dumps(row._asdict()) + "\n" for row in made))
    rows = [Row(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    train(shipped(), rows, given.seed, given.out / "alignment")


if __name__ == "__main__":
    main()
