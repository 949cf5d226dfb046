"""The front matter of a model card: what the hub reads of it, by its own keys.

Source: the hub's specification of model cards, `modelcard.md` of its documentation (`base_model`,
`base_model_relation`, `license`, `model-index`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from backmerge.records import Estimate
from backmerge.reporting.card_facts import CONFIRMATION, CardFacts, plain
from backmerge.reporting.explained import KINDS
from backmerge.reporting.findings import METRIC_NAMES

DIGITS = 6  # of a share; the intervals are far wider
HUB = "https://huggingface.co"
TASK = "text-generation"


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """The front matter as plain data, in the order in which it is written."""
    origin = _origin(facts)
    index = model_index(facts)
    return {
        **origin,
        **_license(facts),
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": TASK,
        "tags": list(_tags(facts)),
        "backmerge": _ours(facts),
        **({"model-index": index} if index[0]["results"] else {}),
    }


def model_index(facts: CardFacts) -> list[dict[str, Any]]:
    """This model's scores on the confirmation prompts; each metric with its 95 % interval under `args`.

    Values are shares in [0, 1], and those of base and tuned stand beside them.
    """
    return [{"name": _name(facts), "results": list(_index_results(facts))}]


def _index_results(facts: CardFacts) -> Iterator[dict[str, Any]]:
    cells = facts.cells()
    own = cells.pop("this model", None)
    if own is None:  # the tuned model itself was chosen
        own = cells.pop("tuned")
    for benchmark in facts.results.benchmarks:
        metrics = [
            _metric(metric, cell, {who: found.get((name, metric)) for who, found in cells.items()})
            for (name, metric), cell in own.items()
            if name == benchmark.name and cell.value is not None
        ]
        if metrics:
            name = plain(benchmark.name)
            size = benchmark.sizes.confirmation
            yield {
                "task": {"type": TASK, "name": KINDS[benchmark.kind][0]},
                "dataset": {"type": name, "name": name, "split": CONFIRMATION, "args": {"num_prompts": size}},
                "metrics": metrics,
            }


def _metric(metric: str, cell: Estimate, others: Mapping[str, Estimate | None]) -> dict[str, Any]:
    beside = {who: _rounded(other.value) for who, other in others.items() if other is not None}
    interval = {"low": _rounded(cell.low), "high": _rounded(cell.high), "confidence": 0.95}
    return {
        "type": plain(metric),
        "value": _rounded(cell.value),
        "name": METRIC_NAMES.get(metric, plain(metric)),
        "args": {**interval, "n": cell.n, "unscored": cell.unscored, **beside},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def _name(facts: CardFacts) -> str:
    return f"{plain(facts.results.name)}-{plain(facts.row.tuned)}"


def _origin(facts: CardFacts) -> dict[str, Any]:
    """What it comes from, as far as that is on the hub."""
    if facts.base_on_hub is None:
        return {}
    if facts.is_adapter:  # its base is what it is loaded on
        return {"base_model": facts.base_on_hub, "base_model_relation": "adapter"}
    models = list(dict.fromkeys([facts.base_on_hub, *facts.tuned_on_hub]))
    return {"base_model": models, "base_model_relation": "merge" if facts.is_merge else "finetune"}


def _license(facts: CardFacts) -> dict[str, str]:
    """The base's."""
    base = facts.results.base
    if not base.license:
        return {}
    found = {"license": plain(base.license)}
    if base.license_name:
        found["license_name"] = plain(base.license_name)
    link = _license_link(base.license_link, facts)
    return found | ({"license_link": link} if link else {})


def _license_link(link: str | None, facts: CardFacts) -> str | None:
    """Where the licence can be read: as the base says, a file that came along, or the file beside the base."""
    if not link:
        return None
    if link.startswith(("https://", "http://")):
        return plain(link)
    name = plain(link)
    if "/" in name or name.startswith("."):
        return None
    if name in facts.files:
        return name
    return f"{HUB}/{facts.base_on_hub}/blob/main/{name}" if facts.base_on_hub else None


def _tags(facts: CardFacts) -> Iterator[str]:
    yield "backmerge"
    if facts.is_merge:
        yield "merge"
    if facts.is_adapter:
        yield "lora"
    if not facts.row.confirmed:
        yield "safety-not-confirmed"


def _ours(facts: CardFacts) -> dict[str, Any]:
    """For programs: what was found, and of which weights."""
    return {
        "version": plain(facts.results.backmerge),
        "confirmed": bool(facts.row.confirmed),
        "verdict": plain(facts.own_confirmation.verdict),
        "findings": [finding.name for finding in facts.results.findings],
        "point": plain(facts.row.point),
        **({"fingerprint": facts.fingerprint} if facts.fingerprint else {}),
    }
