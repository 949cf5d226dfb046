"""A callback for the trainers of transformers and TRL: check whether the model is still as safe as its base."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel
from transformers import TrainerCallback

from backmerge.errors import ConfigError
from backmerge.progress import say

CHECKPOINT = "checkpoint-{step}"  # the Trainer's names of its folders


class Checked(NamedTuple):
    """One check.

    Attributes:
        step: Step of the training.
        directory: Folder of the check's files; `check.md` in it is for people.
        verdict: `restored` (shown to be as safe), `not shown` or `worse`; `None` if the check failed.
    """

    step: int
    directory: Path
    verdict: str | None


class _Verdict(BaseModel):
    verdict: str


class _Found(BaseModel):
    """The part of a check's results that is read here; their types are in a higher layer."""

    check: _Verdict


class SafetyCheck(TrainerCallback):  # type: ignore[misc] # transformers is not typed
    """Runs `backmerge check` against the base when training ends, or at each checkpoint; then `restore`, if requested.

    The commands run in separate processes, so that the training's random numbers and settings do not change. They load
    base and model once more: on a full GPU, give `options=("--device", "cpu")` or another device. A check that fails is
    reported and does not end the training.

    Worked example:

        trainer = SFTTrainer(..., callbacks=[SafetyCheck("BASE", safety=["advbench"], judge="wildguard")])

    Attributes:
        checked: The results so far, in order.

    Args:
        base: The aligned model that is tuned: a folder or a hub id.
        safety: Benchmarks of harmful requests: names or files.
        over_refusal: Benchmarks of harmless requests.
        utility: Benchmarks of the tuning task; `restore` needs one.
        judge: Finds refusals and harm.
        margin: How far ASR may exceed the base's, as a share.
        limit: Largest number of prompts of each benchmark.
        each_checkpoint: Whether every checkpoint that the Trainer saves is also checked.
        restore: Whether `backmerge restore` merges the final model back with the base.
        stop_if_worse: Whether training stops when a checkpoint is shown to be less safe than the margin allows.
        out: A folder for the results; by default `backmerge` in the Trainer's output folder.
        options: More options of the commands, such as `("--engine", "vllm")`.

    Raises:
        ConfigError: `restore` without utility, `stop_if_worse` without checks during the training, or `options` with
            one that has an argument here.
    """

    def __init__(
        self,
        base: str,
        *,
        safety: Sequence[str],
        over_refusal: Sequence[str] = (),
        utility: Sequence[str] = (),
        judge: str = "refusal-phrases",
        margin: float = 0.03,
        limit: int | None = None,
        each_checkpoint: bool = False,
        restore: bool = False,
        stop_if_worse: bool = False,
        out: str | Path | None = None,
        options: Sequence[str] = (),
    ) -> None:
        if restore and not utility:
            raise ConfigError(
                "restore needs a utility benchmark",
                remedy="for example utility=['mine.jsonl'].",
            )
        if stop_if_worse and not each_checkpoint:
            raise ConfigError("stop_if_worse needs checks before the training ends", remedy="add each_checkpoint=True.")
        self.checked: list[Checked] = []
        self._base = base
        self._utility = tuple(utility)
        self._measured = [
            *(word for name in safety for word in ("--safety", name)),
            *(word for name in over_refusal for word in ("--over-refusal", name)),
            *("--judge", judge, "--margin", str(margin)),
            *(("--limit", str(limit)) if limit is not None else ()),
            *options,
        ]
        own = {"--judge", "--margin", *(["--limit"] if limit is not None else []), "--against", "--out"}
        for word in options:
            if word.partition("=")[0] in own:
                raise ConfigError(
                    f"options has {word}, which this check passes itself",
                    remedy=f"use its argument: {word.partition('=')[0].removeprefix('--').replace('against', 'base')}.",
                )
        self._each_checkpoint = each_checkpoint
        self._restore = restore
        self._stop_if_worse = stop_if_worse
        self._out = None if out is None else Path(out)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - the Trainer's own signature
        """Called by the Trainer when it has saved a checkpoint."""
        if not self._each_checkpoint or not state.is_world_process_zero:
            return
        found = self._check(_checkpoint(args, state), state.global_step, args)
        if self._stop_if_worse and found.verdict == "worse":
            say(f"Training stops at step {state.global_step}: the model is less safe than the margin allows.")
            control.should_training_stop = True

    def on_train_end(  # the Trainer's own signature
        self,
        args: Any,
        state: Any,
        control: Any,  # noqa: ARG002
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Called by the Trainer at the end."""
        if not state.is_world_process_zero:
            return
        directory = _checkpoint(args, state)
        if not directory.is_dir():
            if args.fsdp or args.deepspeed:
                say(
                    "The final model is spread over several processes and was not saved, so it was not checked: let "
                    'the Trainer save it (save_strategy="epoch"), and run `backmerge check` on that folder.'
                )
                return
            directory = self._place(args) / "model"
            model.save_pretrained(directory)
            if processing_class is not None:
                processing_class.save_pretrained(directory)
        if not any(found.step == state.global_step for found in self.checked):
            self._check(directory, state.global_step, args)
        if self._restore:
            utility = [word for name in self._utility for word in ("--utility", name)]
            out = self._place(args) / "restored"
            if self._run("restore", self._base, str(directory), *utility, "--out", str(out)):
                say(f"Restored: see {out / 'report.html'}.")

    def _check(self, directory: Path, step: int, args: Any) -> Checked:
        out = self._place(args) / f"step-{step}"
        utility = [word for name in self._utility for word in ("--utility", name)]
        done = self._run("check", str(directory), "--against", self._base, *utility, "--out", str(out))
        verdict = None
        if done:
            verdict = _Found.model_validate_json((out / "results.json").read_bytes()).check.verdict
            words = {"restored": "shown to be as safe as the base", "worse": "less safe than the base"}
            say(f"Step {step}: {words.get(verdict, 'not shown to be as safe as the base')} ({out / 'check.md'}).")
        self.checked.append(Checked(step, out, verdict))
        return self.checked[-1]

    def _place(self, args: Any) -> Path:
        return self._out if self._out is not None else Path(args.output_dir) / "backmerge"

    def _run(self, command: str, *words: str) -> bool:
        done = subprocess.run(
            [sys.executable, "-m", "backmerge", command, *words, *self._measured], check=False, stdin=subprocess.DEVNULL
        )
        if done.returncode != 0:
            say(f"backmerge {command} failed (exit code {done.returncode}); its message is above.")
        return done.returncode == 0


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / CHECKPOINT.format(step=state.global_step)
