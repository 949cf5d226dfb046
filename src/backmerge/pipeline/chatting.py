"""One prompt, and the answers of base, tuned and merged model; λ can be changed while the model stays in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from backmerge.checkpoints.locate import locate_model
from backmerge.checkpoints.reader import Checkpoint, Weights
from backmerge.config import Document, validated
from backmerge.errors import ConfigError, RunError
from backmerge.generation.protocol import Generator, Sampling
from backmerge.merging.method import checked, find_method
from backmerge.merging.recipe import Variant, lam_name
from backmerge.merging.served import as_given, in_form
from backmerge.pipeline.guarding import statistics_of_run
from backmerge.planning.points import Point, as_output, guards_of, members_at, points_of
from backmerge.planning.prepare import open_tuned, output_of
from backmerge.planning.settings import Experiment, kind_of_run, settings_left
from backmerge.records import Completion, Example, Message
from backmerge.registry import NOTHING_ALLOWED, Permissions
from backmerge.reporting.report import read_run
from backmerge.results import PointRow, RestoreResults
from backmerge.runs import key_of

DEFAULT_LAM = 0.4  # if nothing was chosen
ROLES = ("base", "tuned", "merged")
Stream = Callable[[Variant, Example, Sampling], Iterator[Completion]]  # yields an answer as it grows


class ModelTriple(NamedTuple):
    """The three models.

    Attributes:
        base: λ=0.
        tuned: λ=1.
        merged: The merge at some λ.
        has_lam: Whether there is a λ to change.
        told: Where the merged model comes from, in words.
    """

    base: Variant
    tuned: Variant
    merged: Variant
    has_lam: bool
    told: str

    @property
    def merged_name(self) -> str:
        """A short name for the merged model."""
        lam = self.merged.lam
        if not self.has_lam:
            return f"merged ({self.merged.method.name})"
        if isinstance(lam, int | float):
            return f"{self.merged.method.name}, λ = {lam_name(float(lam))}"
        return f"{self.merged.method.name}, λ by layer"

    def at(self, lam: float) -> ModelTriple:
        """Return the same models, merged at another λ.

        Raises:
            ConfigError: there is no λ to change, or it is not a share.
        """
        if not self.has_lam:
            raise ConfigError(
                f"{self.merged_name} has no λ to change", remedy="give BASE and TUNED to merge them linearly."
            )
        if not 0 <= lam <= 1:
            raise ConfigError(
                f"λ is {lam:g}, but must be from 0 to 1: it is the share of the tuned model", remedy="for example 0.4."
            )
        return self._replace(merged=self.merged.at(lam))


def triple_of(base: str, tuned: str, method: str = "linear", permissions: Permissions = NOTHING_ALLOWED) -> ModelTriple:
    """Return a base and a tuned model, and their merge at λ = 0.4.

    Raises:
        BackmergeError: one of them cannot be read, they do not fit each other, or the method needs more models.
    """
    weights = Checkpoint(locate_model(base))
    found = checked(find_method(method, permissions))
    other = open_tuned(locate_model(tuned), weights)
    merged = in_form(Variant(weights, other, found, DEFAULT_LAM))
    return ModelTriple(
        Variant(weights), as_given(Variant(weights, other)), merged, found.has_lam, f"of {base} and {tuned}"
    )


def triple_of_run(directory: Path, tuned: str | None = None, permissions: Permissions = NOTHING_ALLOWED) -> ModelTriple:
    """Return the models of a finished run, merged with its chosen recipe; with several tuned models, one of them.

    Args:
        directory: A run of `backmerge restore`, `run` or `demo`.
        tuned: The name of the tuned model's folder; by default the first.
        permissions: What may be run.

    Raises:
        BackmergeError: the run is not finished or of another kind, or its models have changed.
    """
    settings = settings_left(directory)
    kind = kind_of_run(settings)
    if kind != "experiment":
        raise RunError(
            f"{directory} is not a run with a merge",
            remedy="give a run of `backmerge restore`, `run` or `demo`, or BASE and TUNED.",
        )
    results = read_run(directory).results
    experiment = validated(Experiment, Document(str(directory / "experiment.yaml"), settings, {}))
    base = Checkpoint(locate_model(experiment.base))
    _check_same("base", experiment.base, base, results.base.fingerprint)
    models = _tuned_models(directory, experiment, results, base)
    name = next(iter(models)) if tuned is None else tuned
    if name not in models:
        raise ConfigError(f"{directory} has no tuned model '{name}'", remedy=f"it has {', '.join(models)}.")
    merged, has_lam, told = _chosen(directory, results, experiment, base, models, name, permissions)
    return ModelTriple(Variant(base), as_given(Variant(base, models[name])), merged, has_lam, told)


def _check_same(role: str, name: str, weights: Weights, fingerprint: str) -> None:
    if weights.fingerprint != fingerprint:
        raise RunError(
            f"the {role} {name} has changed since the run measured it: the weights or the tokenizer in "
            f"{weights.directory} differ",
            remedy="run again, or give BASE and TUNED.",
        )


def _tuned_models(
    directory: Path, experiment: Experiment, results: RestoreResults, base: Checkpoint
) -> dict[str, Weights]:
    models: dict[str, Weights] = {}
    for place, row in enumerate(results.tuned):
        here = directory / "tuned" / row.name
        path = here if experiment.finetune is not None else locate_model(experiment.tuned[place])
        if not path.is_dir():
            raise RunError(f"the tuned model {path} is missing", remedy="run the run's command again to make it.")
        models[row.name] = open_tuned(path, base, is_cast=experiment.merged_dtype is not None)
        _check_same("tuned model", row.name, models[row.name], row.fingerprint)
    return models


def _chosen(
    directory: Path,
    results: RestoreResults,
    experiment: Experiment,
    base: Checkpoint,
    tuned: Mapping[str, Weights],
    name: str,
    permissions: Permissions,
) -> tuple[Variant, bool, str]:
    """Return the run's merge of one of its tuned models, whether it has a λ, and a description."""
    choice = results.choice
    row = next((row for row in results.points if row.point == choice.point), None)
    if row is None or row.method is None:
        lam = DEFAULT_LAM if row is None else row.lam
        told = "the run chose no recipe, so nothing is confirmed" if row is None else "the run chose the tuned model"
        return as_output(Variant(base, tuned[name], lam=lam), output_of(experiment)), True, told
    if row.method == "path":
        step = row.parameters
        point = Point(row.point, "merged", row.series, None, step=step["step"], ema=step["ema"])
        has_lam = False
    else:
        point = _point_of(experiment, row, permissions)
        has_lam = point.method is not None and point.method.has_lam
        code = results.inputs.get("methods", {}).get(row.method)  # of a user's own method
        if point.method is not None and code not in (None, point.method.code):
            raise RunError(
                f"the code of {row.method} has changed since the run measured it", remedy="run the run's command again."
            )
    extra = {
        model: open_tuned(locate_model(model), base, is_cast=experiment.merged_dtype is not None)
        for model in (point.sweep.models.values() if point.sweep else ())
    }
    asked = {} if point.sweep is None else guards_of(point.sweep)
    inputs = statistics_of_run(results.guards, asked, directory) if asked else {}
    members = members_at(point, base, tuned, output_of(experiment), extra, inputs)
    member = next((one for one in members if one.tuned == name), members[0])
    return member.local_variant, has_lam, f"the run chose {row.point}"


def _point_of(experiment: Experiment, row: PointRow, permissions: Permissions) -> Point:
    """Make the point of a row of the results, from the entry of `merge` that its series came from."""
    planned = [point for point in points_of(experiment.merge, permissions) if point.sweep is not None]
    # a search by layer has its own series, and uses the recipe of the first entry
    like = next((point for point in planned if point.series == row.series), planned[0])
    return like._replace(
        name=row.point,
        series=row.series,
        lam=row.lam,
        setting=row.setting,
        is_joint=row.tuned == "all",
    )


class Reply(NamedTuple):
    """One model's answer.

    Attributes:
        role: `base`, `tuned` or `merged`.
        name: The name of its column.
        text: The answer, as the model wrote it: hostile text.
        is_finished: Whether it ended before the limit.
        thought: Its thought, likewise.
    """

    role: str
    name: str
    text: str
    is_finished: bool
    thought: str = ""


class Chat:
    """Asks three models with one engine; keeps the last prompt's answers in memory, and stores nothing.

    Each prompt is a separate conversation: the models do not see earlier ones.

    Args:
        engine: Switches one model in memory between the three.
        triple: The models.
        sampling: How answers are drawn.

    Attributes:
        system: System prompt; none if empty.
    """

    def __init__(self, engine: Generator, triple: ModelTriple, sampling: Sampling) -> None:
        self.triple = triple
        self.sampling = sampling
        self.system = ""
        self._engine = engine
        self._prompt = ""
        self._kept: dict[str, Reply] = {}

    @property
    def has_asked(self) -> bool:
        """Return whether there is a prompt that can be asked again."""
        return bool(self._prompt)

    def turn(self, lam: float) -> None:
        """Set λ.

        Raises:
            ConfigError: see `ModelTriple.at`.
        """
        self.triple = self.triple.at(lam)

    def ask(self, prompt: str) -> list[Reply]:
        """Return the answers of base, tuned and merged.

        Raises:
            GenerationError: the prompt does not fit, or a model cannot be loaded.
        """
        if prompt != self._prompt:
            self._kept = {}
        self._prompt = prompt
        return self.again()

    def again(self) -> list[Reply]:
        """Return the last prompt's answers; those that λ, system prompt or sampling change are generated again."""
        said = []
        for role, name, variant in self._columns():
            key = self._key(role, variant)
            if key not in self._kept:
                (completion,) = self._engine.generate(variant, [self._example()], self.sampling, lambda _: None)
                self._kept[key] = _reply(role, name, completion)
            said.append(self._kept[key])
        return said

    def stream(self, prompt: str, stream: Stream) -> Iterator[list[Reply]]:
        """Yield the three answers as they grow, one after the other; answers that are known come at once.

        Args:
            prompt: The prompt.
            stream: The engine's streaming function.

        Raises:
            GenerationError: see `ask`.
        """
        if prompt != self._prompt:
            self._kept = {}
        self._prompt = prompt
        columns = self._columns()
        said = [
            self._kept.get(self._key(role, variant), Reply(role, name, "", is_finished=True))
            for role, name, variant in columns
        ]
        yield list(said)
        for place, (role, name, variant) in enumerate(columns):
            key = self._key(role, variant)
            if key in self._kept:
                continue
            for completion in stream(variant, self._example(), self.sampling):
                said[place] = _reply(role, name, completion)
                yield list(said)
            self._kept[key] = said[place]

    def _columns(self) -> list[tuple[str, str, Variant]]:
        names = ("base", "tuned", self.triple.merged_name)
        return list(zip(ROLES, names, (self.triple.base, self.triple.tuned, self.triple.merged), strict=True))

    def _key(self, role: str, variant: Variant) -> str:
        return key_of(role, variant.identity, self.system, self.sampling.model_dump())

    def _example(self) -> Example:
        turns = (Message("user", self._prompt),)
        return Example("prompt", (Message("system", self.system), *turns) if self.system else turns)


def _reply(role: str, name: str, completion: Completion) -> Reply:
    return Reply(role, name, completion.text, completion.finished, completion.thought)
