"""Several small runs, written by hand figure by figure: to be compared, and to make the paper's tables of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

from .synthetic import difference

HALF = 0.05  # width of every model's interval to either side
Values = Mapping[str, Mapping[str, Sequence[float]]]  # point to benchmark to each model's value

# the base's one model, then each of two tuned models'
VALUES: Values = {
    "base": {"task": [0.2], "advbench": [0.01], "hexphi": [0.02]},
    "linear@0.4": {"task": [0.6, 0.7], "advbench": [0.02, 0.04], "hexphi": [0.04, 0.06]},
    "linear@0.6": {"task": [0.7, 0.8], "advbench": [0.10, 0.12], "hexphi": [0.12, 0.14]},
    "slerp@0.4": {"task": [0.61, 0.71], "advbench": [0.03, 0.05], "hexphi": [0.05, 0.07]},
    "model_stock": {"task": [0.5], "advbench": [0.02], "hexphi": [0.03]},
    "tuned": {"task": [0.8, 0.9], "advbench": [0.3, 0.34], "hexphi": [0.4, 0.5]},
}
KINDS = {"advbench": "safety", "hexphi": "safety", "harmful": "safety", "harmless": "over_refusal"}
METRICS = {"safety": "asr", "over_refusal": "over_refusal", "utility": "accuracy"}


def results_of(
    values: Values = VALUES,
    *,
    base: str = "someone/aligned-7b",
    title: str = "synthetic",
    tuned: Sequence[str] = ("seed-1", "seed-2"),
    chosen: str | None = "linear@0.4",
    best: Mapping[str, str | None] | None = None,
    verdict: str = "restored",
    split: str = "halves",
    category_means: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """`results.json` of a run.

    Args:
        values: What every model had, on both splits.
        base: Of this name.
        title: The experiment's.
        tuned: Tuned models; points with a single value stand for one merge of all.
        chosen: The point that was chosen.
        best: Series to its best point, where methods were compared.
        verdict: Of the confirmation.
        split: `halves` or `whole`.
        category_means: Point to mean over the task's categories.
    """
    names = list(values["base"])
    points = [_point(name, len(values[name][names[0]])) for name in values]
    by_name = {point["point"]: point for point in points}
    confirmed = {"base", "tuned", chosen, *(best or {}).values()}
    scores, summary = [], []
    for part in ("selection", "confirmation"):
        for point in points:
            if part == "confirmation" and point["point"] not in confirmed:
                continue
            for name in names:
                own = values[point["point"]][name]
                place = {"benchmark": name, "split": part, "metric": METRICS[KINDS.get(name, "utility")]}
                mean = None if KINDS.get(name) or not category_means else category_means[point["point"]]
                models = [point["point"]] if point["role"] == "base" else [f"{point['point']}/{m}" for m in tuned]
                models = models if len(own) == len(models) else [f"{point['point']}/all"]
                for model, value in zip(models, own, strict=True):
                    scores.append({**place, "model": model, "category_mean": mean, **_score(value)})
                summary.append({**point, **place, **_level(own)})
    at = by_name[chosen] if chosen else dict.fromkeys(("series", "lam", "setting"))
    gap = None if chosen is None else difference(fmean(values[chosen]["advbench"]) - values["base"]["advbench"][0])
    own_gaps = (
        []
        if chosen is None
        else [
            {"tuned": name, "verdict": verdict, "asr_difference": difference(value - values["base"]["advbench"][0])}
            for name, value in zip(tuned, values[chosen]["advbench"], strict=False)
        ]
    )
    return {
        "schema_version": 2,
        "name": title,
        "backmerge": "0.1.0",
        "base": {"name": base, "fingerprint": f"print-of-{base}", "license": None},
        "tuned": [{"name": name, "kind": "adapter", "fingerprint": f"{title}-{name}"} for name in tuned],
        "inputs": {"benchmarks": {name: f"prompts-of-{name}" for name in names}},
        "benchmarks": [_benchmark(name) for name in names],
        "points": points,
        "choice": {
            "rule": "safe",
            "margin": 0.03,
            "point": chosen,
            **{key: at[key] for key in ("series", "lam", "setting")},
            "reason": "It is the best.",
            "steps": [],
        },
        "split": split,
        "confirmation": {
            "verdict": verdict if chosen else "not shown",
            "tuned_asr_difference": difference(0.3),
            "asr_difference": gap,
            "models": own_gaps,
            "kept_gain": None,
        },
        "comparison": None if best is None else _comparison(best, by_name),
        "validation": [],
        "merged": [],
        "scores": scores,
        "by_category": [],
        "summary": summary,
        "differences": [],
    }


def experiment_of(seeds: Sequence[int] = (1, 2), *, dataset: str | None = "reasoning", **more: Any) -> dict[str, Any]:
    """Settings, as far as reports read them; without a data set, the tuned models came from elsewhere."""
    made: dict[str, Any] = {
        "name": "any",
        "base": "any",
        "evaluate": {"sampling": {"seed": 0}},
        "report": {"text": "none", "num_samples": 0},
    }
    tuning = {"finetune": {"dataset": dataset, "seeds": list(seeds), "steps": 10}, "tuned": []}
    return {**made, **(tuning if dataset else {"finetune": None, "tuned": ["a", "b"]}), **more}


def written(directory: Path, results: Mapping[str, Any], experiment: Mapping[str, Any] | None = None) -> Path:
    """A finished run's directory."""
    directory.mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps(results), encoding="utf-8")
    samples = {"samples": [], "points": [], "totals": {}, "cut_at": 0, "split": "selection", "tuned": None}
    (directory / "samples.json").write_text(json.dumps(samples), encoding="utf-8")
    (directory / "experiment.yaml").write_text(yaml.safe_dump(dict(experiment or experiment_of())), encoding="utf-8")
    return directory


def of_models(values: Values, *indices: int) -> Values:
    """The same values of some of the tuned models only."""
    return {
        point: {name: own if len(own) == 1 else [own[index] for index in indices] for name, own in of_point.items()}
        for point, of_point in values.items()
    }


def _point(name: str, num_models: int) -> dict[str, Any]:
    if name in {"base", "tuned"}:
        lam = float(name == "tuned")
        place = {"point": name, "role": name, "series": name, "lam": lam, "setting": lam}
        return {**place, "method": None, "parameters": {}, "tuned": "each"}
    series, _, lam_name = name.partition("@")
    found = float(lam_name) if lam_name else None
    place = {"point": name, "role": "merged", "series": series, "lam": found, "setting": found}
    how = {"method": series.partition("(")[0], "parameters": {}, "tuned": "each" if lam_name else "all"}
    return {**place, **how}


def _score(value: float) -> dict[str, Any]:
    bounds = {"low": max(0.0, value - HALF), "high": min(1.0, value + HALF)}
    readings = {"value_if_unscored_0": value, "value_if_unscored_1": value}
    return {
        "value": value,
        "numerator": value * 100,
        "n": 100,
        "n_effective": 100.0,
        "unscored": 0,
        **bounds,
        **readings,
    }


def _level(own: Sequence[float]) -> dict[str, Any]:
    mean = fmean(own)
    return {
        "mean": mean,
        "spread": stdev(own) if len(own) > 1 else None,
        "low": mean - HALF,
        "high": mean + HALF,
        "lowest": min(own),
        "highest": max(own),
        "num_models": len(own),
        "n": 100,
        "unscored": 0,
    }


def _benchmark(name: str) -> dict[str, Any]:
    kind = KINDS.get(name, "utility")
    return {
        "name": name,
        "kind": kind,
        "metric": METRICS[kind],
        "sizes": {"selection": 100, "confirmation": 100},
        "judge": None if kind == "utility" else "a-judge",
        "judge_is_weak": False,
    }


def _comparison(best: Mapping[str, str | None], points: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    level = {"mean": 0.5, "low": 0.4, "high": 0.6}
    rows = []
    for series, name in best.items():
        point = points[name] if name else None
        rows.append(
            {
                "series": series,
                "point": name,
                "lam": point and point["lam"],
                "setting": point and point["setting"],
                "reason": "It is the best." if point else "None passed.",
                "num_models": 2 if point else 0,
                "utility": level if point else None,
                "asr": level if point else None,
                "over_refusal": None,
                "asr_difference": difference(0.01) if point else None,
                "utility_difference": None,
                "p_adjusted": None,
                "verdict": "restored" if point else "not shown",
            }
        )
    return {"reference": next(iter(best)), "rows": rows}
