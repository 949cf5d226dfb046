"""Make the front matter of a model card: what the hub reads from it, by its own keys.

`huggingface_hub` writes both forms of results that the hub has: `model-index` in the card, and `.eval_results/*.yaml`,
which the hub shows next to a data set that registers itself as a benchmark.

Source: the hub's specification of model cards, `modelcard.md` of its documentation (`base_model`,
`base_model_relation`, `license`, `model-index`), and https://huggingface.co/docs/hub/eval-results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from backmerge.reporting.card_facts import CONFIRMATION, CardFacts, plain
from backmerge.reporting.explained import KINDS
from backmerge.reporting.findings import METRIC_NAMES

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

DIGITS = 6  # of a share; the intervals are much wider
HUB = "https://huggingface.co"
# the data sets on the hub that benchmarks get their prompts from
HUB_DATASETS: Mapping[str, str] = {
    "advbench": "walledai/AdvBench",
    "bbh": "SaylorTwift/bbh",
    "harmbench": "walledai/HarmBench",
    "hexphi": "LLM-Tuning-Safety/HEx-PHI",
    "humaneval": "openai/openai_humaneval",
    "jailbreakbench": "JailbreakBench/JBB-Behaviors",
    "jailbreakbench-benign": "JailbreakBench/JBB-Behaviors",
    "or-bench-hard": "bench-llm/or-bench",
    "sorry-bench": "sorry-bench/sorry-bench-202503",
    "strongreject": "walledai/StrongREJECT",
    "wildjailbreak": "allenai/wildjailbreak",
    "wildjailbreak-benign": "allenai/wildjailbreak",
    "xstest": "walledai/XSTest",
    "xstest-unsafe": "walledai/XSTest",
}
TASK = "text-generation"


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """Return the front matter as plain data, in the order in which it is written."""
    from huggingface_hub import ModelCardData

    found = list(eval_results(facts))
    data = ModelCardData(
        **_origin(facts),
        **_license(facts),
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag=TASK,
        tags=list(_tags(facts)),
        backmerge=_ours(facts),
        model_name=_name(facts) if found else None,
        eval_results=found or None,
    )
    written: dict[str, Any] = data.to_dict()  # type: ignore[no-untyped-call] # theirs
    return written


def eval_results(facts: CardFacts) -> Iterator[EvalResult]:
    """Yield this model's scores on the confirmation prompts; each metric with its 95 % interval under `args`.

    Values are shares in [0, 1], followed by those of base and tuned.
    """
    from huggingface_hub import EvalResult

    cells = facts.cells()
    own = cells.pop("this model", None)
    if own is None:  # the tuned model itself was chosen
        own = cells.pop("tuned")
    for benchmark in facts.results.benchmarks:
        name = plain(benchmark.name)
        for (of, metric), cell in own.items():
            if of != benchmark.name or cell.value is None:
                continue
            others = {who: found[of, metric] for who, found in cells.items() if (of, metric) in found}
            interval = {"low": _rounded(cell.low), "high": _rounded(cell.high), "confidence": 0.95}
            beside = {who: _rounded(other.value) for who, other in others.items()}
            yield EvalResult(
                task_type=TASK,
                task_name=KINDS[benchmark.kind][0],
                dataset_type=name,
                dataset_name=name,
                dataset_split=CONFIRMATION,
                dataset_args={"num_prompts": benchmark.sizes.confirmation},
                metric_type=plain(metric),
                metric_name=METRIC_NAMES.get(metric, plain(metric)),
                metric_value=_rounded(cell.value),
                metric_args={**interval, "n": cell.n, "unscored": cell.unscored, **beside},
            )


def registered_results(facts: CardFacts) -> list[dict[str, Any]]:
    """Return `.eval_results/backmerge.yaml` as plain data: the primary metric of each benchmark whose data are known.

    The hub shows an entry if that data set has registered a task of this name, which we cannot check.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    primary = {plain(one.name): one for one in facts.results.benchmarks}
    entries = []
    for result in eval_results(facts):
        benchmark = primary[result.dataset_name]
        repository = HUB_DATASETS.get(result.dataset_name)
        if repository is None or result.metric_type != plain(benchmark.metric):
            continue
        args, of = result.metric_args or {}, benchmark.sizes
        part = "" if facts.results.is_whole else f" of {of.selection + of.confirmation}; the others chose λ"
        judge = f", judged by {plain(benchmark.judge)}" if benchmark.judge else ""
        notes = (
            f"{result.metric_name} as a share, 95 % interval [{args['low']}, {args['high']}] on {args['n']} prompts"
            f"{part}{judge}; backmerge {plain(facts.results.backmerge)}"
        )
        entries.append(
            EvalResultEntry(dataset_id=repository, task_id="default", value=result.metric_value, notes=notes)
        )
    written: list[dict[str, Any]] = eval_result_entries_to_yaml(entries)
    return written


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, DIGITS)


def _name(facts: CardFacts) -> str:
    return f"{plain(facts.results.name)}-{plain(facts.row.tuned)}"


def _origin(facts: CardFacts) -> dict[str, Any]:
    """Return the models that this one was made from, if they are on the hub."""
    if facts.base_on_hub is None:
        return {}
    if facts.is_adapter:  # the base is the model that it is loaded on
        return {"base_model": facts.base_on_hub, "base_model_relation": "adapter"}
    models = list(dict.fromkeys([facts.base_on_hub, *facts.tuned_on_hub]))
    return {"base_model": models, "base_model_relation": "merge" if facts.is_merge else "finetune"}


def _license(facts: CardFacts) -> dict[str, Any]:
    """Return the base's licence."""
    base = facts.results.base
    if not base.license:
        return {}
    found = {"license": plain(base.license)}
    if base.license_name:
        found["license_name"] = plain(base.license_name)
    link = _license_link(base.license_link, facts)
    return found | ({"license_link": link} if link else {})


def _license_link(link: str | None, facts: CardFacts) -> str | None:
    """Return the licence's place: the base's own link, a file in this folder, or the file next to the base."""
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
    if not facts.results.has_safety:
        yield "safety-not-measured"
    elif not facts.row.confirmed:
        yield "safety-not-confirmed"


def _ours(facts: CardFacts) -> dict[str, Any]:
    """Return the results and the weights' fingerprint, for programs."""
    return {
        "version": plain(facts.results.backmerge),
        "confirmed": bool(facts.row.confirmed),
        "verdict": plain(facts.own_confirmation.verdict),
        "findings": [finding.name for finding in facts.results.findings],
        "point": plain(facts.row.point),
        **({"fingerprint": facts.fingerprint} if facts.fingerprint else {}),
    }
