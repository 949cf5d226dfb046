"""Training: the same from the same seed, on the schedule that was asked for, written whole or not at all."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DataCollatorForSeq2Seq, TrainerCallback, TrainingArguments

from architectures import ARCHITECTURES, Architecture
from backmerge.checkpoints.adapter import AdapterOnBase
from backmerge.checkpoints.reader import Checkpoint
from backmerge.demo import model_directory
from backmerge.demo.benchmarks import plan_examples
from backmerge.errors import CheckpointError, ConfigError, DataError
from backmerge.finetuning import trainer
from backmerge.finetuning.datasets import TrainingData
from backmerge.finetuning.encoding import IGNORED
from backmerge.finetuning.model import trainable
from backmerge.finetuning.settings import FinetuneSettings, LoraSettings, num_steps
from backmerge.finetuning.trainer import is_trained, train_model, training_key
from backmerge.records import Example

EXAMPLES = plan_examples()[:40]


def data(*training: Example, validation: Sequence[Example] = ()) -> TrainingData:
    """Examples to tune on, and perhaps some to hold out."""
    return TrainingData(training, tuple(validation), {"file": "plans"}, ())


DATA = data(*EXAMPLES)
BRIEF = FinetuneSettings(dataset="demo-plans", steps=4, batch_size=4, learning_rate=8e-3)
SEED = 42


@pytest.fixture(scope="module")
def base() -> Checkpoint:
    """The embedded model."""
    return Checkpoint(model_directory())


def changed(settings: FinetuneSettings, **values: Any) -> FinetuneSettings:
    """Settings with other values."""
    return settings.model_copy(update=values)


def train(base: Checkpoint, directory: Path, settings: FinetuneSettings = BRIEF, seed: int = SEED) -> int:
    """Train on the demonstration's first examples; how many steps were reported."""
    steps: list[int] = []
    train_model(base, DATA, settings, seed, directory, lambda step, _="": steps.append(step))
    return sum(steps)


@pytest.fixture(scope="module")
def trained(base: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of thirty steps as the demonstration takes them."""
    directory = tmp_path_factory.mktemp("trained") / "adapter"
    settings = changed(BRIEF, steps=30, batch_size=16)
    train_model(base, data(*plan_examples()), settings, SEED, directory, lambda *_: None)
    return directory


def test_a_seed_decides_every_bit(base: Checkpoint, tmp_path: Path) -> None:
    """The same seed gives the same adapter, byte for byte, whatever was drawn before; another seed another."""
    for name, seed in (("a", SEED), ("b", SEED), ("c", SEED + 1)):
        torch.rand(7)
        random.random()  # noqa: S311 - not for secrets
        train(base, tmp_path / name, seed=seed)
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files >= {"adapter_model.safetensors", "adapter_config.json", "backmerge.json", "loss.jsonl"}
    assert "training_args.bin" not in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "c")]
    assert weights[0] != weights[1]


def test_dropout_is_seeded_too(base: Checkpoint, tmp_path: Path) -> None:
    """With dropout the same seed still gives the same adapter, and dropout does something."""
    with_dropout = changed(BRIEF, lora=BRIEF.lora.model_copy(update={"dropout": 0.5}))
    for name, settings in (("a", with_dropout), ("b", with_dropout), ("c", BRIEF)):
        train(base, tmp_path / name, settings)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_the_callers_random_state_is_kept(base: Checkpoint, tmp_path: Path) -> None:
    """Training moves none of the three global generators."""
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    train(base, tmp_path / "a", changed(BRIEF, steps=1))
    after = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_the_schedule_warms_up_and_falls_by_a_cosine(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 20 steps, a fifth of them warm-up, each step's learning rate is that of the closed form."""
    rates: list[float] = []

    class Watching(TrainerCallback):  # type: ignore[misc] # transformers is not typed
        def __init__(self, _: object) -> None: ...

        def on_step_begin(self, *_: object, optimizer: torch.optim.Optimizer, **_rest: object) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(trainer, "Telling", Watching)
    train(base, tmp_path / "a", changed(BRIEF, steps=20, batch_size=1, warmup=0.2))
    rising = [step / 4 for step in range(4)]
    falling = [0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    # the same formula in double precision, so only the order of operations can differ
    assert rates == pytest.approx([8e-3 * share for share in (*rising, *falling)], rel=1e-12)
    assert max(rates) == 8e-3


@pytest.mark.parametrize(
    ("values", "steps"),
    [({"steps": 3}, 3), ({"steps": None, "epochs": 0.5}, 2), ({"steps": None, "epochs": 1.3}, 6)],
)
def test_as_many_steps_as_announced(base: Checkpoint, tmp_path: Path, values: Mapping[str, Any], steps: int) -> None:
    """The number told to the progress bar is the number of steps that are taken: 40 examples, batches of 11."""
    settings = changed(BRIEF, batch_size=11, **values)
    assert num_steps(settings, len(EXAMPLES)) == steps
    assert train(base, tmp_path / "a", settings) == steps


def test_loss_falls(trained: Path) -> None:
    """Thirty steps on the demonstration's data bring the loss to a third, at least."""
    losses = [json.loads(line) for line in (trained / "loss.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [entry["step"] for entry in losses] == list(range(1, 31))
    assert losses[-1]["loss"] < losses[0]["loss"] / 3
    final = json.loads((trained / "backmerge.json").read_text(encoding="utf-8"))["final_loss"]
    assert final == pytest.approx(sum(entry["loss"] for entry in losses[-10:]) / 10, rel=1e-12)
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_peft_and_we_read_the_same_model(trained: Path, base: Checkpoint) -> None:
    """The adapter changes the base, and peft's model with it gives the logits of ours."""
    import peft
    from transformers import AutoModelForCausalLM

    ours = AutoModelForCausalLM.from_pretrained(base.directory)
    on_base = AdapterOnBase(trained, base)
    ours.load_state_dict({name: on_base.tensor(name) for name in base.infos}, strict=False)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "`is_gradient_checkpointing`", FutureWarning
        )  # peft 0.21's, as in the trainer
        theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.directory), trained)
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        logits, expected = ours.eval()(ids).logits, theirs.eval()(ids).logits
        of_base = AutoModelForCausalLM.from_pretrained(base.directory).eval()(ids).logits
    # W·x + s·B·(A·x) against (W + s·B·A)·x: float32 sums over 320 terms in three layers, some 1e-6 of logits of ten
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4)
    assert (expected - of_base).abs().max() > 1


def test_all_linear_layers_and_no_others_are_tuned(trained: Path) -> None:
    """The seven projections of a layer, in the same order in every process; neither embeddings nor head."""
    config = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    seven = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == seven
    assert (config["r"], config["lora_alpha"]) == (8, 16)


@pytest.mark.parametrize("architecture", ["llama", "gemma", "qwen2"])
def test_architectures(architecture: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Tiny random models of each architecture are tuned, and their adapters read."""
    base = Checkpoint(make_model(architecture, seed=1))
    assert train(base, tmp_path / "a", changed(BRIEF, steps=2)) == 2
    tuned = AdapterOnBase(tmp_path / "a", base)
    assert any(not torch.equal(tuned.tensor(name), base.tensor(name)) for name in base.infos)


# those that differ most; all others are slow only in their number
TRAINED = ("Gemma 3, with vision", "Qwen3-MoE", "Mixtral", "GPT-OSS", "GPT-2", "Llama 4, text")


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`:UserWarning")
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(one, marks=() if one.name in TRAINED else pytest.mark.slow, id=one.name) for one in ARCHITECTURES],
)
def test_an_adapter_of_our_own_is_read(architecture: Architecture, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """Also on a base whose names in memory are not those on disk: stacked experts, a vision wrapper, Conv1D.

    What text does not train, such as a vision tower, is left out of the adapter.
    """
    architecture.random_model(vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    base = Checkpoint(tmp_path / "base")
    assert train(base, tmp_path / "a", changed(BRIEF, steps=2)) == 2  # the first one's learning rate is 0
    tuned = AdapterOnBase(tmp_path / "a", base)
    changed_names = [key for key in base.infos if not torch.equal(tuned.tensor(key), base.tensor(key))]
    assert set(changed_names) == set(tuned.factors)
    for listed in (tuned.config.target_modules, tuned.config.target_parameters, tuned.config.exclude_modules):
        assert listed is None or listed == sorted(listed)  # the same bytes in every process
    assert not any("vision" in key for key in tuned.factors)
    assert any("experts" in key for key in tuned.factors) is (architecture.name in ("Qwen3-MoE", "Mixtral"))


@pytest.mark.parametrize("lora", [{"dropout": 0.1}, {"dora": True}], ids=["dropout", "DoRA"])
def test_options_that_stacked_experts_lack_are_refused_before_training(
    lora: dict[str, Any], tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """Neither dropout nor DoRA goes with them in peft."""
    architecture = next(one for one in ARCHITECTURES if one.name == "Qwen3-MoE")
    architecture.random_model(vocab_size=len(tiny_tokenizer)).save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    settings = changed(BRIEF, lora=LoraSettings(**lora))
    with pytest.raises(ConfigError, match="peft cannot add this LoRA to the qwen3_moe model"):
        train(Checkpoint(tmp_path / "base"), tmp_path / "a", settings)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_result_that_could_not_be_read_is_not_trained(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """What would be written is opened before the first step, and the error says that nothing was begun."""

    def unreadable(*_: object) -> None:
        raise CheckpointError("it is of no known kind")

    monkeypatch.setattr("backmerge.finetuning.model.AdapterOnBase", unreadable)
    monkeypatch.setattr("backmerge.finetuning.model.revert_weight_conversion", lambda *_: {})
    with pytest.raises(ConfigError, match="not started"):
        train(base, tmp_path / "a", changed(BRIEF, mode=mode))
    assert not (tmp_path / "a").exists()


def test_card_names_the_adapters_sources(base: Checkpoint, tmp_path: Path) -> None:
    """Key, base, seed, and how many examples there were and lost their end."""
    settings = changed(BRIEF, cutoff=30, steps=1)
    train(base, tmp_path / "a", settings)
    card = json.loads((tmp_path / "a" / "backmerge.json").read_text(encoding="utf-8"))
    assert card["key"] == training_key(base, DATA, settings, SEED)
    assert (card["base_fingerprint"], card["seed"], card["num_examples"]) == (base.fingerprint, SEED, len(EXAMPLES))
    assert card["base_tensors"] == base.tensors_fingerprint
    assert 0 < card["num_cut"] <= len(EXAMPLES)
    losses = [json.loads(line) for line in (tmp_path / "a" / "loss.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [card["final_loss"]] == [entry["loss"] for entry in losses]
    assert (card["steps"], card["schedule_steps"], card["settings"]["lora"]["r"]) == (1, 1, 8)
    assert card["data"] == {"file": "plans"}


def test_the_key_is_of_all_that_decides(base: Checkpoint, tiny_base: Path) -> None:
    """Base, examples, settings and seed change the key; the other seeds and the data set's name do not."""
    key = training_key(base, DATA, BRIEF, SEED)
    others = [
        training_key(Checkpoint(tiny_base), DATA, BRIEF, SEED),
        training_key(base, data(*EXAMPLES[1:]), BRIEF, SEED),
        training_key(base, data(*EXAMPLES[::-1]), BRIEF, SEED),
        training_key(base, DATA, BRIEF, SEED + 1),
        *(
            training_key(base, DATA, changed(BRIEF, **values), SEED)
            for values in (
                {"steps": 5},
                {"steps": None},
                {"epochs": 1.0},
                {"batch_size": 5},
                {"learning_rate": 1e-3},
                {"warmup": 0.2},
                {"weight_decay": 0.1},
                {"cutoff": 99},
                {"lora": BRIEF.lora.model_copy(update={"r": 4})},
            )
        ),
    ]
    assert len({key, *others}) == 1 + len(others)
    same = changed(BRIEF, seeds=(SEED,), dataset="a-copy.jsonl")
    assert training_key(base, DATA, same, SEED) == key


def test_is_trained_asks_for_the_key(base: Checkpoint, trained: Path, tmp_path: Path) -> None:
    """An adapter counts as trained for its own key only; a folder without a card, or none, never."""
    key = json.loads((trained / "backmerge.json").read_text(encoding="utf-8"))["key"]
    assert is_trained(trained, key)
    assert not is_trained(trained, training_key(base, DATA, BRIEF, SEED))
    assert not is_trained(tmp_path, key)
    assert not is_trained(tmp_path / "none", key)


def test_interrupted_training_leaves_no_partial_model(base: Checkpoint, tmp_path: Path) -> None:
    """Stopped in the middle, nothing stands at the model's place, or the older one does, untouched."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    place = tmp_path / "runs" / "a"
    with pytest.raises(KeyboardInterrupt):
        train_model(base, DATA, BRIEF, SEED, place, stop)
    assert not place.exists()
    train(base, place, changed(BRIEF, steps=1))
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        train_model(base, DATA, BRIEF, SEED, place, stop)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before


def test_a_diverged_training_is_an_error(base: Checkpoint, tmp_path: Path) -> None:
    """An adapter that is not finite is not written; the learning rate is named."""
    with pytest.raises(ConfigError, match=r"diverged(.|\n)*finetune\.learning_rate"):
        train(base, tmp_path / "a", changed(BRIEF, learning_rate=1e30))
    assert not (tmp_path / "a").exists()


def test_nothing_to_learn_is_an_error(base: Checkpoint, tmp_path: Path) -> None:
    """No examples, or one without an answer, is refused before anything is trained or written."""
    for examples in ((), (EXAMPLES[0], Example("x", EXAMPLES[1].messages))):
        with pytest.raises(DataError, match=r"the data set is empty|'x' has no answer"):
            train_model(base, data(*examples), BRIEF, SEED, tmp_path / "a", lambda *_: None)
    assert list(tmp_path.iterdir()) == []


def test_batches_are_padded_on_the_right_and_the_padding_is_not_learned(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts begin at position 0, where they begin when the model is asked; padding is masked and unlabelled."""
    batches: list[Mapping[str, torch.Tensor]] = []

    class Watching(DataCollatorForSeq2Seq):  # type: ignore[misc] # transformers is not typed
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            batches.append(super().__call__(*args, **kwargs))
            return batches[-1]

    monkeypatch.setattr(trainer, "DataCollatorForSeq2Seq", Watching)
    train(base, tmp_path / "a", changed(BRIEF, steps=2, batch_size=20))
    padded = 0
    for batch in batches:
        real = batch["attention_mask"].bool()
        assert (batch["input_ids"][:, 0] == 1).all()  # BOS
        assert (real[:, :-1] | ~real[:, 1:]).all()  # nothing real after padding
        assert (batch["labels"][~real] == IGNORED).all()
        assert ((batch["labels"] == IGNORED) | (batch["labels"] == batch["input_ids"])).all()
        padded += int((~real).sum())
    assert padded


def test_several_gpus_do_not_multiply_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with four GPUs a step still is of `batch_size` examples."""

    def four(arguments: Any) -> torch.device:
        arguments._n_gpu = 4
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(four))
    arguments = trainer._arguments(BRIEF, SEED, tmp_path, len(EXAMPLES), has_validation=False)
    assert arguments.train_batch_size == BRIEF.batch_size


def test_bfloat16_can_be_asked_of_a_cpu_and_the_adapter_stays_in_float32(base: Checkpoint) -> None:
    """As on a GPU."""
    model = trainable(base, BRIEF.model_copy(update={"device": "cpu", "dtype": "bfloat16"}))
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}


def test_it_works_in_silence(base: Checkpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Twelve steps, one log among them, write nothing to standard output or error, and let no warning through."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(base, tmp_path / "a", changed(BRIEF, steps=12, batch_size=2))
    assert [str(warning.message) for warning in caught] == []
    assert capfd.readouterr() == ("", "")
