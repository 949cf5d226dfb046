"""Print perplexities on ordinary text: `python experiments/smollm2/perplexity.py --data DATA MODEL...`.

The text is rationales of GSM8K and ECQA out of DATA/flan_cot, which no model here was trained on, each as the answer to
its question in the model's chat template. MODEL is a folder, `smollm2`, `smollm2-shipped`, or BASE+ADAPTER[@LAM].
"""

from __future__ import annotations

import argparse
import math
import random
from pathlib import Path

from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.reader import Checkpoint
from backmerge.generation.chat import load_tokenizer, prompt_text
from backmerge.generation.protocol import EngineSettings
from backmerge.generation.transformers_engine import TransformersEngine
from backmerge.merging.recipe import Variant
from backmerge.records import Example, Message

NUM_ROWS = 100  # of each set
SETS = ("gsm8k", "ecqa")


def ordinary_answers(folder: Path) -> list[tuple[str, str]]:
    """Return questions and rationales."""
    draw = random.Random(0)  # noqa: S311 - texts, not secrets
    pairs = []
    for name in SETS:
        lines = (folder / f"{name}_train.tsv").read_text(encoding="utf-8").splitlines()
        for line in draw.sample(lines, NUM_ROWS):
            question, _, rationale = (text.replace("\\n", "\n").strip() for text in line.split("\t"))
            pairs.append((question, rationale))
    return pairs


def variant_of(name: str) -> Variant:
    """Return the model that a name stands for."""
    base, _, rest = name.partition("+")
    checkpoint = Checkpoint(locate_model(base))
    if not rest:
        return Variant(checkpoint)
    adapter, _, lam = rest.partition("@")
    return Variant(checkpoint, AdapterOnBase(Path(adapter), checkpoint), lam=float(lam or 1), served_as="adapter")


def perplexity(variant: Variant, pairs: list[tuple[str, str]]) -> float:
    """Return exp of the mean negative log-likelihood of a token of the answers."""
    engine = TransformersEngine(EngineSettings(batch_size=16, device="cpu"))
    tokenizer = load_tokenizer(variant.base.directory)
    rendered = [
        (prompt_text(tokenizer, Example("", (Message("user", question),))), rationale) for question, rationale in pairs
    ]
    found = engine.log_likelihoods(variant, rendered, lambda _: None)
    return math.exp(-sum(one.total for one in found) / sum(one.num_tokens for one in found))


def main() -> None:
    """Print one line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    pairs = ordinary_answers(given.data / "flan_cot")
    for name in given.models:
        print(f"{name}: {perplexity(variant_of(name), pairs):.3f}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
