"""Fine-tuning with transformers' Trainer; writes an ordinary peft adapter or checkpoint, whole or not at all.

It uses the Trainer rather than trl's SFTTrainer: the parts that SFTTrainer adds (masks, packing, templates patched with
marks for the answers) must here follow the paper and law 9 exactly, and are in `encoding`; everything else is the
Trainer's own.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import DataCollatorForSeq2Seq, TrainingArguments, set_seed

from backmerge import __version__
from backmerge.checkpoints.adapter import TrainedOn
from backmerge.checkpoints.adapter_config import CONFIG
from backmerge.checkpoints.companions import copy_companions
from backmerge.checkpoints.files import torch_dtype
from backmerge.checkpoints.reader import CARD, Checkpoint, read_json
from backmerge.errors import CheckpointError, ConfigError, DataError
from backmerge.finetuning.answer_loss import AnswerLossTrainer
from backmerge.finetuning.callbacks import (
    KeepEvery,
    MarkComplete,
    MovingAverage,
    SaveWhenAsked,
    StopAt,
    Telling,
    draw_losses,
    left_by_others,
    newest_complete,
    state_directory,
)
from backmerge.finetuning.datasets import TrainingData
from backmerge.finetuning.encoding import Encoded, cutoff_for, encode
from backmerge.finetuning.model import check_readable, has_bf16, trainable
from backmerge.finetuning.settings import FinetuneSettings, batches, num_steps, schedule_steps
from backmerge.generation.chat import load_tokenizer
from backmerge.generation.loading import without_bars
from backmerge.outputs import damage_of, listed_files
from backmerge.progress import Advance, say
from backmerge.records import to_json
from backmerge.runs import key_of, whole_directory

SNAPSHOTS = "snapshots"
RESULT = "result"  # folder in the training's state, until it is complete
LAST = 10  # steps whose mean loss the card reports
# settings that affect neither the weights nor the files
WITHOUT_EFFECT = {"seeds", "dataset", "data", "save_every", "report_to"}


def training_key(base: Checkpoint, data: TrainingData, settings: FinetuneSettings, seed: int) -> str:
    """Return a hash of everything that a tuned model depends on."""
    versions = {
        "backmerge": __version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "torch": torch.__version__.partition("+")[0],
    }
    examples = [[to_json(example) for example in part] for part in (data.training, data.validation)]
    kept = settings.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    return key_of(base.fingerprint, key_of(examples), kept, seed, versions)


def is_trained(directory: Path, key: str) -> bool:
    """Return whether `directory` has the tuned model with that key, with its files unchanged."""
    return is_of_key(directory, key) and damage_of(directory) is None


def is_of_key(directory: Path, key: str) -> bool:
    """Return whether a manifest says that `directory` has the tuned model with that key."""
    card = directory / CARD
    try:
        return card.is_file() and read_json(card).get("key") == key
    except CheckpointError:
        return False


def train_model(
    base: Checkpoint,
    data: TrainingData,
    settings: FinetuneSettings,
    seed: int,
    directory: Path,
    advance: Advance,
    *,
    base_name: str | None = None,
    replace: bool = False,
) -> None:
    """Fine-tune the base, or continue a killed training; write the model, its losses, and its origin.

    With `accelerate launch` or `torchrun` all processes call this, and the first writes.

    Args:
        base: The model to tune.
        data: Prompts with references.
        settings: Hyper-parameters.
        seed: Seed of the initialisation and of the order of the data.
        directory: Made when everything is written.
        advance: Progress callback for each optimiser step.
        base_name: The base's name in the adapter; by default its folder.
        replace: Whether to replace a model that backmerge wrote in the directory.

    Raises:
        RunError: something else is at the directory.
        DataError: there are no examples, or one cannot be encoded.
        GenerationError: the base cannot be loaded.
        ConfigError: the training diverged, or settings do not fit the data or the machine.
        KeyboardInterrupt: stopped on request; the state is saved, and the same call continues from there.
    """
    if not data.training:
        raise DataError(
            "no data to tune on: the data set is empty, or all of its examples were dropped",
            remedy="give other data, or raise the cut-off (--cutoff) if prompts were too long.",
        )
    last_step = num_steps(settings, len(data.training))
    tokenizer = load_tokenizer(base.directory)
    cutoff = cutoff_for(base, settings)
    encoded = [encode(tokenizer, example, cutoff) for example in data.training]
    held_out = [encode(tokenizer, example, cutoff) for example in data.validation]
    # padded on the right: the forward pass of training counts positions from the first column, padding included
    tokenizer.padding_side = "right"
    key = training_key(base, data, settings, seed)
    states = state_directory(directory, key)
    arguments = _arguments(settings, seed, states, len(encoded), has_validation=bool(held_out))
    resumed = _resumed(states, last_step)
    with _randomness_from(seed), without_bars():
        model = trainable(base, settings)
        check_readable(model, base, settings)
        stopping, average = SaveWhenAsked(), None
        callbacks: list[Any] = [Telling(advance), StopAt(last_step), stopping]
        if settings.keep_every is not None:
            callbacks.append(KeepEvery(settings.keep_every, states / SNAPSHOTS))
        if settings.ema is not None:
            callbacks.append(average := MovingAverage(model, settings.ema, resumed))
        trainer = AnswerLossTrainer(
            model=model,
            args=arguments,
            train_dataset=_rows(encoded),
            eval_dataset=_rows(held_out) if held_out else None,
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[*callbacks, MarkComplete()],
        )
        # the progress printer writes each log entry to standard output
        trainer.remove_callback(transformers.PrinterCallback)

        def save(place: Path) -> None:
            _save(trainer, base, settings, place, base_name)

        for callback in callbacks:
            if isinstance(callback, KeepEvery):
                callback.save = save
        with stopping.listening():
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        if stopping.is_asked and trainer.state.global_step < last_step:
            raise KeyboardInterrupt
        _check_finite(trainer.model, settings)
        if average is not None:
            save(states / SNAPSHOTS / f"step-{trainer.state.global_step}")
            average.put_in_place()
        save(states / RESULT)
    if PartialState().is_main_process:
        card = {
            "backmerge": __version__,
            "key": key,
            "base": base_name,
            **TrainedOn(base.fingerprint, base.tensors_fingerprint).as_card(),
            "dataset": settings.dataset,
            "data": dict(data.source),
            "num_examples": len(encoded),
            "num_cut": sum(e.was_cut for e in encoded),
            "num_held_out": len(held_out),
            "seed": seed,
            "steps": trainer.state.global_step,
            "schedule_steps": schedule_steps(settings, len(encoded)),
            "settings": settings.model_dump(mode="json", exclude={"seeds", "report_to"}),
        }
        _write(directory, states, card, trainer.state.log_history, replace=replace)
        shutil.rmtree(states)
    PartialState().wait_for_everyone()
    if stopping.is_asked:  # in the last step: this model is done, and nothing more is started
        raise KeyboardInterrupt


def _resumed(states: Path, last_step: int) -> Path | None:
    """Return the state to continue from, as the first process finds it; all processes get it.

    A state at the last step itself is skipped: the Trainer takes a step before it checks whether to stop.
    """
    found: list[str | None] = [None]
    if PartialState().is_main_process:
        for others in left_by_others(states):
            say(f"There is an unfinished training with other settings or data in {others}; you can delete it.")
        states.mkdir(parents=True, exist_ok=True, mode=0o700)
        shutil.rmtree(states / RESULT, ignore_errors=True)
        newest = newest_complete(states, before=last_step)
        if newest is not None:
            say(f"Continuing from step {newest.name.rpartition('-')[2]}.")
            found = [str(newest)]
    if PartialState().num_processes > 1:
        broadcast_object_list(found)
    return None if found[0] is None else Path(found[0])


def _rows(encoded: list[Encoded]) -> list[dict[str, list[int]]]:
    return [{"input_ids": e.input_ids, "labels": e.labels} for e in encoded]


def _save(trainer: Any, base: Checkpoint, settings: FinetuneSettings, place: Path, base_name: str | None) -> None:
    """Write the current weights as an ordinary adapter or checkpoint; all processes call it, the first writes."""
    if settings.mode == "full":
        # each weight is rounded once, to the dtype in which the base is stored, so that the two can be merged directly
        dtype = torch_dtype(next(iter(base.infos.values())).dtype)
        weights = {n: w.to(dtype) for n, w in trainer.accelerator.get_state_dict(trainer.model_wrapped).items()}
        if PartialState().is_main_process:
            model = trainer.accelerator.unwrap_model(trainer.model)
            before = model.config.dtype
            model.config.dtype = dtype
            model.save_pretrained(place, state_dict=weights)
            model.config.dtype = before
            copy_companions(base.directory, place)
        return
    trainer.save_model(str(place))
    if PartialState().is_main_process:
        for file in place.iterdir():
            if file.name not in (CONFIG, "adapter_model.safetensors"):  # also a pickle of the Trainer's arguments
                file.unlink()
        _mend_config(place / CONFIG, base_name or str(base.directory))


def _write(
    directory: Path, states: Path, card: Mapping[str, Any], history: list[dict[str, Any]], *, replace: bool
) -> None:
    """Collect the files of the result, and move them into place at once."""
    losses = [{key: e[key] for key in ("step", "loss", "learning_rate")} for e in history if "loss" in e]
    validation = [{"step": e["step"], "loss": e["eval_loss"]} for e in history if "eval_loss" in e]
    last = [entry["loss"] for entry in losses[-LAST:]]
    findings = {
        "final_loss": sum(last) / len(last),
        "final_validation_loss": validation[-1]["loss"] if validation else None,
    }
    with whole_directory(directory, replace=replace) as temporary:
        for file in (states / RESULT).iterdir():
            shutil.move(file, temporary / file.name)
        if (states / SNAPSHOTS).is_dir():
            shutil.move(states / SNAPSHOTS, temporary / SNAPSHOTS)
        for name, entries in (("loss.jsonl", losses), ("validation_loss.jsonl", validation)):
            if entries:
                (temporary / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        draw_losses(losses, validation, temporary / "loss.png")
        whole = {**card, **findings, "files": listed_files(temporary)}
        (temporary / CARD).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _randomness_from(seed: int) -> Iterator[None]:
    """Seed the global generators that the Trainer uses, and restore them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            set_seed(seed)
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _mend_config(config: Path, base_name: str) -> None:
    """Name the base as the user does, and sort the target modules: peft lists them in the order of a set."""
    values = read_json(config)
    values["base_model_name_or_path"] = base_name
    for key in ("target_modules", "target_parameters", "exclude_modules"):
        values[key] = sorted(values[key]) if values.get(key) else values.get(key)
    config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_finite(tuned: Any, settings: FinetuneSettings) -> None:
    if not all(bool(torch.isfinite(p).all()) for p in tuned.parameters() if p.requires_grad):
        raise ConfigError(
            f"the training diverged: with a learning rate of {settings.learning_rate:g} the weights became NaN or "
            "infinite, so nothing was written",
            remedy="lower finetune.learning_rate, or raise finetune.warmup.",
        )


def _arguments(
    settings: FinetuneSettings, seed: int, states: Path, num_examples: int, *, has_validation: bool
) -> TrainingArguments:
    spread = batches(settings)
    total = schedule_steps(settings, num_examples)
    arguments = TrainingArguments(
        output_dir=str(states),
        per_device_train_batch_size=spread.per_device,
        per_device_eval_batch_size=spread.per_device,
        gradient_accumulation_steps=spread.num_accumulated,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,  # below 1 it is a share of all steps
        weight_decay=settings.weight_decay,
        optim="adamw_torch",
        bf16=has_bf16(settings),
        use_cpu=settings.device == "cpu",
        seed=seed,
        data_seed=seed,
        # every step's loss: a resumed training then reports the same losses, wherever it was stopped
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=(settings.validate_every or max(1, total // 10)) if has_validation else None,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=settings.save_every,
        save_total_limit=2,  # the newest may not be complete yet
        ddp_find_unused_parameters=False,  # each forward pass uses all trained parameters
        report_to=list(settings.report_to) or "none",
        disable_tqdm=True,
        dataloader_pin_memory=settings.device == "auto" and torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # on several GPUs the Trainer would multiply the batch by their number
    return arguments
