"""Models and benchmarks that may not be on this machine: their hub ids and sizes, as their own pages state them.

For estimates before anything is downloaded. Models and data on this machine are counted exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class ModelSize(NamedTuple):
    """The size of a model.

    Attributes:
        num_parameters: Number of parameters.
        lora_dims: Rows plus columns, summed over the linear layers except the output layer: a LoRA of rank r has r
            times as many parameters. 0 if no LoRA is trained on it here.
        num_bytes: Size of its weights.
    """

    num_parameters: float
    lora_dims: int = 0
    num_bytes: float = 0


def _in_bfloat16(num_parameters: float, lora_dims: int = 0) -> ModelSize:
    return ModelSize(num_parameters, lora_dims, 2 * num_parameters)


class DeclaredBenchmark(NamedTuple):
    """A benchmark whose data may not be on this machine.

    Attributes:
        hub: Its place on the hub; `None` if there is no reliable copy, and a file must be given.
        num_prompts: Number of prompts, from its authors.
        prompt_tokens: Tokens of a prompt, without a beginning that all share (docs/scale.md, step 1).
        answer_tokens: Tokens of an answer, assumed (see there).
        max_new_tokens: Its limit.
        num_samples: Answers to each prompt.
    """

    hub: str | None
    num_prompts: int
    prompt_tokens: int
    answer_tokens: int
    max_new_tokens: int = 512
    num_samples: int = 1


# from the layer sizes in their public config.json
MODELS: Mapping[str, ModelSize] = {
    "meta-llama/Meta-Llama-3-8B-Instruct": _in_bfloat16(8.03e9, 2_621_440),
    "meta-llama/Llama-3.1-8B-Instruct": _in_bfloat16(8.03e9, 2_621_440),
    "google/gemma-2b-it": _in_bfloat16(2.51e9, 1_225_728),
    "allenai/wildguard": _in_bfloat16(7.25e9),
    "meta-llama/Llama-Guard-3-8B": _in_bfloat16(8.03e9),
    "cais/HarmBench-Llama-2-13b-cls": _in_bfloat16(13.0e9),
    "microsoft/deberta-xlarge-mnli": _in_bfloat16(0.76e9),
}

BENCHMARKS: Mapping[str, DeclaredBenchmark] = {
    "advbench": DeclaredBenchmark("walledai/AdvBench", 520, 60, 300),
    "bbh": DeclaredBenchmark("SaylorTwift/bbh", 6511, 150, 150, 1024),
    "chatdoctor": DeclaredBenchmark("lavita/ChatDoctor-iCliniq", 1000, 150, 250),
    "harmbench": DeclaredBenchmark("walledai/HarmBench", 200, 60, 300),
    "hexphi": DeclaredBenchmark("LLM-Tuning-Safety/HEx-PHI", 330, 60, 300),
    "humaneval": DeclaredBenchmark("openai/openai_humaneval", 164, 200, 200, num_samples=50),
    "jailbreakbench": DeclaredBenchmark("JailbreakBench/JBB-Behaviors", 100, 60, 300),
    "jailbreakbench-benign": DeclaredBenchmark("JailbreakBench/JBB-Behaviors", 100, 60, 300),
    "or-bench-hard": DeclaredBenchmark("bench-llm/or-bench", 1319, 60, 300),
    "openfunctions": DeclaredBenchmark(None, 112, 300, 80, 256),
    "sorry-bench": DeclaredBenchmark("sorry-bench/sorry-bench-202503", 440, 60, 300),
    "strongreject": DeclaredBenchmark("walledai/StrongREJECT", 313, 60, 300),
    "wildjailbreak": DeclaredBenchmark("allenai/wildjailbreak", 2000, 200, 300),
    "wildjailbreak-benign": DeclaredBenchmark("allenai/wildjailbreak", 210, 200, 300),
    "xstest": DeclaredBenchmark("walledai/XSTest", 250, 60, 300),
    "xstest-unsafe": DeclaredBenchmark("walledai/XSTest", 200, 60, 300),
}
BENCHMARKS = {**BENCHMARKS, "lm-eval:bbh_cot_fewshot": BENCHMARKS["bbh"]}

# rows of data sets that are used whole
NUM_ROWS: Mapping[str, int] = {"tools": 2211}


def model_size(name: str) -> ModelSize | None:
    """Return the declared size of a model on the hub, for any revision."""
    return MODELS.get(name.partition("@")[0])
