"""Fine-tuning's speed and memory: `python -m benchmarks.finetune [--billions 1] [--steps 50]`.

Trains a LoRA with the paper's settings on a Llama of random weights, of Llama 3's shapes at so many billions of
parameters, on examples that fill the cut-off; and measures the device's matrix rate at the model's own sizes in the
same process. On a GPU in bfloat16, elsewhere in float32.

The share of the matrix rate counts 4·P·tokens operations: forward 2·P, and backward 2·P for the gradients of the
activations, P being the linear layers' parameters. The frozen weights' own gradients are not computed, and those of the
factors are below a hundredth of it at rank 8.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.finetuning.datasets import TrainingData
from backmerge.finetuning.model import has_bf16
from backmerge.finetuning.settings import FinetuneSettings
from backmerge.finetuning.trainer import train_model
from backmerge.records import Example, Message

WARM_UP = 5  # steps that are not timed
SIZES = {1.0: (2048, 8192, 16), 3.0: (3072, 8192, 28), 8.0: (4096, 14336, 32)}  # as Llama 3's: width, MLP, layers


def write_base(place: Path, billions: float, dtype: torch.dtype) -> tuple[Path, int]:
    """A Llama with random weights and the embedded model's tokenizer; its folder, and its linear layers' parameters."""
    width, inner, layers = SIZES.get(billions, (256, 688, 4))
    tokenizer = AutoTokenizer.from_pretrained(model_directory())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        max_position_embeddings=2048,
    )
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    linear = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place, linear


def matrix_rate(width: int, rows: int, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a square matrix product with so many rows, the best of ten."""
    a, b = torch.randn(rows, width, device=device, dtype=dtype), torch.randn(width, width, device=device, dtype=dtype)
    best = 0.0
    for _ in range(10):
        started = _now(device)
        for _ in range(4):
            a @ b
        best = max(best, 4 * 2 * rows * width * width / (_now(device) - started))
    return best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Print one JSON line with the figures and the machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--billions", type=float, default=1.0, help="1, 3 or 8; anything else is a toy")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--cutoff", type=int, default=1024)
    options = parser.parse_args()
    settings = FinetuneSettings(dataset="random", steps=options.steps + WARM_UP, cutoff=options.cutoff)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if has_bf16(settings) else torch.float32
    long = " ".join(["go(shed); take(tape);"] * options.cutoff)
    examples = tuple(
        Example(f"e{i}", (Message("user", f"How do I mend kite {i}?"),), long)
        for i in range(settings.batch_size * (options.steps + WARM_UP))
    )
    times: list[float] = []

    def advance(steps: int, _: str = "", /) -> None:
        if steps:
            times.append(_now(device))

    with tempfile.TemporaryDirectory() as scratch:
        place, linear = write_base(Path(scratch) / "base", options.billions, dtype)
        width = SIZES.get(options.billions, (256, 0, 0))[0]
        rate = matrix_rate(width, settings.batch_size * options.cutoff, device, dtype)
        data = TrainingData(examples, (), {}, ())
        train_model(Checkpoint(place), data, settings, 42, Path(scratch) / "tuned", advance)
    seconds = times[-1] - times[WARM_UP - 1]
    tokens = settings.batch_size * options.cutoff * options.steps
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
                "dtype": str(dtype).removeprefix("torch."),
                "linear_parameters": linear,
                "steps": options.steps,
                "tokens_per_s": round(tokens / seconds),
                "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else None,
                "matrix_tflops": round(rate / 1e12, 3),
                "share_of_matrix_rate": round(4 * linear * tokens / seconds / rate, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
