"""Tiny random models of several architectures, and LoRA adapters on them, made once for all tests that ask.

What the factories return is shared: a test that changes a model copies it first.
"""

from __future__ import annotations

import contextlib
import gc
import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings

from quiet_peft import without_peft_warnings

# the same examples everywhere and at every time; a failure is reported as the assertion that it is
settings.register_profile(
    "backmerge",
    deadline=None,
    derandomize=True,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
settings.load_profile("backmerge")

ARCHITECTURES = ("llama", "gemma", "qwen2")
DTYPES = ("float32", "bfloat16")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CORPUS = ["How do I mend a kite?", "Take the tape and work in the hall.", "Sorry, I cannot help with that. 0123456789"]

# the files that take longest, the longest first
LONGEST = (
    "pipeline/test_executors.py",
    "sandbox/test_attacks.py",
    "pipeline/test_sharding.py",
    "pipeline/test_demo_findings.py",
    "finetuning/test_resume.py",
    "generation/test_server_faults.py",
    "finetuning/test_trainer.py",
    "docs/test_code_blocks.py",
    "test_paper_experiments.py",
    "pipeline/test_resume.py",
    "benchmarks/test_humaneval.py",
    "commands/test_finetune.py",
    "pipeline/test_earlier_results.py",
    "sharing/test_pushing.py",
    "reporting/test_browser.py",
    "reporting/test_report.py",
    "docs/test_notebook.py",
    "pipeline/test_comparison.py",
    "execution/test_pool.py",
    "pipeline/test_situations.py",
    "merging/test_engine.py",
)

RAY_SECONDS = 300  # for a test with Ray, and as many for its set-up and its clean-up; the longest takes about 160

ModelFactory = Callable[..., Path]


@contextlib.contextmanager
def limited(item: pytest.Item) -> Iterator[None]:
    """Fail a test with Ray that takes too long: Ray waits without an end for what does not come."""
    if item.get_closest_marker("ray") is None:
        yield
        return

    def late(*_: object) -> None:
        pytest.fail(f"took more than {RAY_SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(RAY_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """Hold the fixtures to the limit."""
    with limited(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Hold the test to the limit."""
    with limited(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Hold the clean-up to the limit."""
    with limited(item):
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files that take longest first, so that of several workers none is left with one at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0].removeprefix("tests/"), len(order)))


def pytest_collection_finish() -> None:
    """Take what is loaded by now out of garbage collection, which libraries ask for after each model."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Answers of other runs, and the user's cache, are not of these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BACKMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of about 300 tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL_TOKENS[0],
        bos_token=SPECIAL_TOKENS[1],
        eos_token=SPECIAL_TOKENS[2],
        extra_special_tokens=SPECIAL_TOKENS[3:],
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> ModelFactory:
    """`make_model(architecture, *, seed, tied, dtype) -> Path`: a random model of 20 to 40 thousand parameters."""
    made: dict[tuple[str, int, bool, str], Path] = {}

    def make(architecture: str, *, seed: int = 0, tied: bool = False, dtype: str = "float32") -> Path:
        key = (architecture, seed, tied, dtype)
        if key not in made:
            name = f"{architecture}-{seed}-{'tied' if tied else 'untied'}-{dtype}"
            made[key] = _made_model(tmp_path_factory.mktemp("models") / name, tiny_tokenizer, *key)
        return made[key]

    return make


def _made_model(directory: Path, tokenizer: Any, architecture: str, seed: int, tied: bool, dtype: str) -> Path:
    import torch
    from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, Qwen2Config

    kinds: dict[str, Any] = {"llama": LlamaConfig, "gemma": GemmaConfig, "qwen2": Qwen2Config}
    extra = {"head_dim": 8} if architecture == "gemma" else {}
    config = kinds[architecture](
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **extra,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # norms and biases start as ones and zeros, which would hide faults; −0.0 is a value of its own
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1) * 0.5)
                parameter.view(-1)[:2] = torch.tensor([-0.0, 0.0])
    model.to(getattr(torch, dtype)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory) -> ModelFactory:
    """`make_adapter(base, *, seed, **lora_kwargs) -> Path`: a LoRA adapter whose factors are all random and not zero.

    Rank 4, alpha 8, on all linear layers, unless the keywords (peft's `LoraConfig`) say otherwise.
    """
    made: dict[tuple[Path, int, str], Path] = {}

    def make(base: Path, *, seed: int = 0, **lora_kwargs: Any) -> Path:
        key = (base, seed, json.dumps(lora_kwargs, sort_keys=True))
        if key not in made:
            made[key] = _made_adapter(tmp_path_factory.mktemp("adapters") / "adapter", base, seed, lora_kwargs)
        return made[key]

    return make


def _made_adapter(directory: Path, base: Path, seed: int, lora_kwargs: dict[str, Any]) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        **lora_kwargs,
    }
    with torch.random.fork_rng(), without_peft_warnings():
        torch.manual_seed(seed)
        adapted = get_peft_model(model, LoraConfig(**settings))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tuned_demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`tuned_demo(seed) -> Path`: the embedded model as the demonstration tunes it; see `tests/tuned/make.py`."""
    from backmerge.demo import model_directory

    folder = tmp_path_factory.mktemp("tuned")

    def tuned(seed: int = 42) -> Path:
        place = folder / f"seed-{seed}"
        if not place.exists():
            shutil.copytree(Path(__file__).parent / "tuned" / place.name, place)
            config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = str(model_directory().absolute())
            (place / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        return place

    return tuned


@pytest.fixture(scope="session")
def peft_merged() -> Callable[[Path, Path], dict[str, Any]]:
    """`peft_merged(base, adapter)`: the tensors that peft's own merge_and_unload makes, by name."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def merge(base: Path, adapter: Path) -> dict[str, Any]:
        with without_peft_warnings():
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
            return dict(model.merge_and_unload().state_dict())

    return merge


@pytest.fixture
def tiny_base(make_model: ModelFactory) -> Path:
    """A Llama in float32 with tied embeddings, for tests that need any model."""
    return make_model("llama", seed=1, tied=True, dtype="float32")


@pytest.fixture
def tiny_tuned(make_model: ModelFactory) -> Path:
    """Another of the same shape."""
    return make_model("llama", seed=2, tied=True, dtype="float32")


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run `backmerge ...` as the installed command does; gives exit code, output and errors."""
    from backmerge import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["backmerge", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return int(exit_.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that end without their plots, which take most of the time of a small run."""
    monkeypatch.setattr("backmerge.reporting.report.write_report", lambda _: None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield place
    if subprocess.run(["umount", place], check=False).returncode:
        subprocess.run(["umount", "--lazy", place], check=True)  # the next run shall not trip over it
        pytest.fail("a file is still open on the disk: it was not closed where writing failed")
