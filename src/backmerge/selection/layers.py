"""A λ for each part of the model: Optuna proposes recipes to measure, with utility and safety as objectives.

The study is stored in a journal next to the run. Each proposal is drawn from (seed, number of recipes measured), so a
search that continues after a kill makes the same proposals.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backmerge.errors import ConfigError
from backmerge.runs import cut_torn_line
from backmerge.selection.settings import LayersSettings

FIRST_AT_RANDOM = 6  # recipes that are drawn at random before the sampler learns from them


class Recipe(NamedTuple):
    """One λ setting to measure.

    Attributes:
        number: The first, at 0, has one λ everywhere.
        setting: λ in the form of a merge recipe.
        values: λ of each part, by its name.
    """

    number: int
    setting: Any
    values: dict[str, float]


def parts_of(settings: LayersSettings) -> list[str]:
    """Return the parts with a separate λ: modules, places in the depth, or both."""
    knots = [str(knot) for knot in range(settings.num_knots)]
    if settings.by == "layer":
        return knots
    if settings.by == "module":
        return ["attention", "mlp", "rest"]
    return [f"{group}-{knot}" for group in ("attention", "rest") for knot in knots]


def setting_of(settings: LayersSettings, values: dict[str, float]) -> Any:
    """Return the λs as in a merge recipe: a gradient over the layers, a table by module, or a table of both."""
    parts = parts_of(settings)
    if settings.by == "layer":
        return [values[part] for part in parts]
    if settings.by == "module":
        return {part: values[part] for part in parts}
    return {group: [values[part] for part in parts if part.startswith(f"{group}-")] for group in ("attention", "rest")}


class LayerSearch:
    """Proposes recipes one after the other, and gets the result of each.

    Args:
        settings: Which parts have a separate λ, and how many recipes are measured.
        start: The best single λ, which every part has at first.
        journal: The file that stores the study.
        name: The study's name: a hash of everything that its results depend on, so that one journal can have several.

    Raises:
        ConfigError: Optuna is not installed.
    """

    def __init__(self, settings: LayersSettings, start: float, journal: Path, name: str) -> None:
        optuna = _optuna()
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self.settings = settings
        self.start = start
        self._optuna = optuna

        def study() -> Any:
            return optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(journal))),
                study_name=name,
                directions=["maximize", "minimize"],
                load_if_exists=True,
            )

        cut_torn_line(journal)
        try:
            self._study = study()
        except ValueError:  # otherwise damaged; the measurements are in the units
            journal.unlink()
            self._study = study()
        for trial in self._study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # it was killed during the measurement
        self._asked: Any = None

    def told(self) -> list[tuple[Recipe, tuple[float, float]]]:
        """Return recipes that were measured before, with utility and ASR, in order."""
        return [
            (self._recipe(number, trial.params), (trial.values[0], trial.values[1]))
            for number, trial in enumerate(self._complete())
        ]

    def ask(self) -> Recipe | None:
        """Return the next recipe to measure; `None` when all are done."""
        number = len(self._complete())
        if number >= self.settings.num_trials:
            return None
        parts = {part: self._optuna.distributions.FloatDistribution(0.0, 1.0) for part in parts_of(self.settings)}
        states = self._optuna.trial.TrialState
        if number == 0 and not self._study.get_trials(states=(states.WAITING,)):
            self._study.enqueue_trial(dict.fromkeys(parts, self.start))
        self._study.sampler = self._optuna.samplers.TPESampler(
            seed=self.settings.seed * 1_000_003 + number, n_startup_trials=FIRST_AT_RANDOM
        )
        self._asked = self._study.ask(parts)
        return self._recipe(number, self._asked.params)

    def tell(self, utility: float, asr: float) -> None:
        """Record the result of the last recipe.

        Args:
            utility: Mean primary metric, in [0, 1].
            asr: ASR minus the base's.
        """
        self._study.tell(self._asked, [utility, asr])

    def _complete(self) -> Sequence[Any]:
        found: Sequence[Any] = self._study.get_trials(states=(self._optuna.trial.TrialState.COMPLETE,))
        return found

    def _recipe(self, number: int, values: dict[str, float]) -> Recipe:
        # λs are rounded to values that a reader can type
        rounded = {part: round(values[part], 4) for part in parts_of(self.settings)}
        return Recipe(number, setting_of(self.settings, rounded), rounded)


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ConfigError(
            "'layers' searches with Optuna, which is not installed",
            remedy="pip install 'backmerge[search]'",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna
