"""The facts for a model card, from the run's results; without local folders."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from backmerge.checkpoints.locate import HUB_ID, short_name
from backmerge.records import Estimate
from backmerge.reporting.page import visible
from backmerge.results import MergedModel, ModelVerdict, PointRow, RestoreResults, TunedModel

ALL = "all"  # the single merge of several tuned models
CONFIRMATION = "confirmation"
ADAPTER_CONFIG = "adapter_config.json"
UNKNOWN: Mapping[str, Any] = MappingProxyType({})


class CardFacts(NamedTuple):
    """One merged model.

    Attributes:
        results: Results of the run.
        row: Its row of `results.merged`.
        experiment: The run's settings, as far as they are known.
        fingerprint: Fingerprint of the written weights.
        files: Names of the files in its folder.
    """

    results: RestoreResults
    row: MergedModel
    experiment: Mapping[str, Any] = UNKNOWN
    fingerprint: str | None = None
    files: frozenset[str] = frozenset()

    @property
    def is_adapter(self) -> bool:
        """Return whether the weights are an adapter on the base."""
        return ADAPTER_CONFIG in self.files

    @property
    def is_merge(self) -> bool:
        """Return whether anything was merged: λ = 1 and a snapshot of the tuning are tuned models."""
        return self.row.point != "tuned" and (self.point is None or self.point.method != "path")

    @property
    def point(self) -> PointRow | None:
        """Return the chosen point's row in the results."""
        return next((point for point in self.results.points if point.point == self.row.point), None)

    @property
    def base_on_hub(self) -> str | None:
        """Return the base's id on the hub; `None` for a folder."""
        return hub_id(self.results.base.name)

    @property
    def base_words(self) -> str:
        """Return the public name of the base."""
        return self.base_on_hub or plain(short_name(self.results.base.name))

    @property
    def tuned_rows(self) -> list[TunedModel]:
        """Return the tuned models that were merged into it."""
        return [row for row in self.results.tuned if self.row.tuned in (row.name, ALL)]

    @property
    def tuned_on_hub(self) -> list[str]:
        """Return their ids on the hub, if they have any."""
        asked = self.experiment.get("tuned") or []
        if len(asked) != len(self.results.tuned):
            return []
        names = [row.name for row in self.tuned_rows]
        pairs = zip(asked, self.results.tuned, strict=True)
        return [found for text, row in pairs if row.name in names and (found := hub_id(str(text)))]

    @property
    def own_confirmation(self) -> ModelVerdict:
        """Return the confirmation of this model."""
        return next(model for model in self.results.confirmation.models if model.tuned == self.row.tuned)

    def cells(self) -> dict[str, dict[tuple[str, str], Estimate]]:
        """Return base, tuned and this model (not a mean) on the confirmation prompts, by benchmark and metric."""
        models = {"base": "base", "tuned": f"tuned/{self.row.tuned}"}
        if self.row.point != "tuned":
            models["this model"] = f"{self.row.point}/{self.row.tuned}"
        found = {heading: dict(self._scores(model)) for heading, model in models.items()}
        if not found["tuned"]:  # one merge of all has no single tuned model
            found["tuned"] = {
                (entry.benchmark, entry.metric): entry.estimate
                for entry in self.results.summary
                if entry.split == CONFIRMATION and entry.point == "tuned"
            }
        return found

    def _scores(self, model: str) -> Iterator[tuple[tuple[str, str], Estimate]]:
        for score in self.results.scores:
            if score.split == CONFIRMATION and score.model == model:
                yield (score.benchmark, score.metric), score.estimate


def hub_id(name: str) -> str | None:
    """Return a name's repository; `None` for a folder, which means nothing on the hub."""
    match = None if Path(name).expanduser().exists() else HUB_ID.fullmatch(name)
    return match["repo"] if match else None


def plain(text: Any) -> str:
    """Return foreign text on one line, without control characters and without the folders before a file's name."""
    line = " ".join(visible(str(text)).split())
    return Path(line).name if line.startswith(("/", "~", "./", "../")) else line
