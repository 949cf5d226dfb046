"""A small run's results, written by hand: no model is behind them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# per point: utility, attack success rate, over-refusal, as the mean over tuned models
VALUES = {
    "base": (0.10, 0.01, 0.02),
    "linear@0.25": (0.40, 0.01, 0.02),
    "linear@0.5": (0.82, 0.016, 0.03),
    "slerp@0.5": (0.85, 0.02, 0.04),
    "tuned": (0.90, 0.30, 0.05),
}
SIZES = {"task": 50, "harmful": 200, "harmless": 40}
METRICS = {"task": "accuracy", "harmful": "asr", "harmless": "over_refusal"}
SHIFT = 0.01  # of each next tuned model's rates


def difference(value: float, half_width: float = 0.01) -> dict[str, float]:
    """A paired difference with an interval that is symmetric about it."""
    return {
        "difference": value,
        "low": value - half_width,
        "high": value + half_width,
        "lower_bound": value - 0.8 * half_width,
        "upper_bound": value + 0.8 * half_width,
        "n": 200,
        "n_effective": 190.0,
    }


def made_results(
    *,
    chosen: str | None = "linear@0.5",
    verdict: str = "restored",
    tuned: Sequence[str] = ("seed-1", "seed-2"),
    difference_of_chosen: float = 0.005,
    difference_of_tuned: float = 0.29,
    own_verdicts: Sequence[str] | None = None,
    is_weak: bool = False,
    unscored: int = 0,
    with_over_refusal: bool = True,
    with_slerp: bool = False,
    base: str = "someone/aligned-7b",
) -> dict[str, Any]:
    """`results.json` of a run; the keywords say in what it differs from the usual."""
    points = [_point(name) for name in VALUES if with_slerp or not name.startswith("slerp")]
    names = [name for name in SIZES if with_over_refusal or name != "harmless"]
    scores = [
        _score(point["point"], model, name, split, index, unscored)
        for point in points
        for index, model in enumerate(["base"] if point["role"] == "base" else tuned)
        for name in names
        for split in ("selection", "confirmation")
        if split == "selection" or point["role"] != "merged" or point["point"] == chosen
    ]
    own = own_verdicts or [verdict] * len(tuned)
    found = None if chosen is None else difference(difference_of_chosen)
    at = _point(chosen) if chosen else {"series": None, "lam": None}
    confirmation: dict[str, Any] = {
        "verdict": verdict,
        "tuned_asr_difference": difference(difference_of_tuned),
        "asr_difference": found,
        "models": [],
        "kept_gain": None,
    }
    if chosen is not None:
        utility = {"base": VALUES["base"][0], "tuned": VALUES["tuned"][0], "merged": VALUES[chosen][0]}
        kept = (utility["merged"] - utility["base"]) / (utility["tuned"] - utility["base"])
        models = [{"tuned": n, "verdict": v, "asr_difference": found} for n, v in zip(tuned, own, strict=True)]
        confirmation |= {"utility": utility, "kept_gain": kept, "models": models}
    passed = [verdict == "restored" and own_verdict == "restored" for own_verdict in own]
    return {
        "schema_version": 1,
        "name": "synthetic",
        "backmerge": "0.1.0",
        "environment": {"python": "3.11.7", "engine": "transformers", "device": "cpu"},
        "base": {"name": base, "fingerprint": "base0123"},
        "tuned": [{"name": name, "kind": "adapter", "fingerprint": f"print-of-{name}"} for name in tuned],
        "benchmarks": [_benchmark(name, is_weak) for name in names],
        "points": points,
        "choice": {
            "rule": "safe",
            "margin": 0.03,
            "point": chosen,
            **{key: at[key] for key in ("series", "lam")},
            "reason": "The reason for the choice.",
            "steps": [
                _step("linear@0.25", passes=True),
                _step("linear@0.5", passes=chosen is not None),
                _step("tuned", passes=None),
            ],
        },
        "confirmation": confirmation,
        "merged": [
            {
                "tuned": name,
                "point": chosen,
                "directory": f"{'merged' if is_passed else 'unconfirmed'}/{name}",
                "confirmed": is_passed,
            }
            for name, is_passed in zip(tuned, passed, strict=True)
            if chosen is not None
        ],
        "scores": scores,
        "summary": _summary(scores, points),
        "differences": [],
    }


def made_samples(text: str = "An answer.", prompt: str = "A prompt?") -> list[dict[str, Any]]:
    """`samples.json`: one prompt of each kind, with every finding among the answers."""
    return [
        {
            "benchmark": "task",
            "kind": "utility",
            "example": "task-1",
            "category": None,
            "prompt": prompt,
            "reference": text,
            "answers": {
                "base": {"text": text, "scores": {"accuracy": 0.0}},
                "tuned": {"text": text, "scores": {"accuracy": 1.0}},
                "merged": {"text": "", "scores": {"accuracy": None}},
            },
        },
        {
            "benchmark": "harmful",
            "kind": "safety",
            "example": "harmful-1",
            "category": "fraud",
            "prompt": prompt,
            "reference": None,
            "answers": {
                "base": {"text": text, "finding": "refused"},
                "tuned": {"text": text, "finding": "harmful"},
                "merged": {"text": text, "finding": "other"},
            },
        },
        {
            "benchmark": "harmless",
            "kind": "over_refusal",
            "example": "harmless-1",
            "category": None,
            "prompt": prompt,
            "reference": None,
            "answers": {
                "base": {"text": text, "finding": "answered"},
                "tuned": {"text": text, "finding": "unscored"},
            },
        },
    ]


EXPERIMENT = """\
name: synthetic
base: someone/aligned-7b
finetune:
  dataset: plans
  seeds: [1, 2]
evaluate:
  sampling: {seed: 7}
report:
  text: TEXT
"""


def made_run(
    directory: Path,
    results: dict[str, Any] | None = None,
    samples: list[dict[str, Any]] | None = None,
    *,
    text: str = "full",
) -> Path:
    """A finished run's directory, as far as the report reads it."""
    results = results if results is not None else made_results()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (directory / "samples.json").write_text(
        json.dumps(samples if samples is not None else made_samples()), encoding="utf-8"
    )
    (directory / "experiment.yaml").write_text(EXPERIMENT.replace("TEXT", text), encoding="utf-8")
    for index, row in enumerate(results["tuned"]):
        folder = directory / "tuned" / row["name"]
        folder.mkdir(parents=True, exist_ok=True)
        losses = [{"step": step, "loss": 5.0 / step + index} for step in (1, 2, 3)]
        (folder / "loss.jsonl").write_text("".join(json.dumps(loss) + "\n" for loss in losses))
    for row in results["merged"]:
        (directory / row["directory"]).mkdir(parents=True, exist_ok=True)
    return directory


def _point(name: str) -> dict[str, Any]:
    if name in {"base", "tuned"}:
        return {"point": name, "role": name, "series": name, "lam": float(name == "tuned")}
    series, lam = name.split("@")
    return {"point": name, "role": "merged", "series": series, "lam": float(lam)}


def _benchmark(name: str, is_weak: bool) -> dict[str, Any]:
    is_judged = name != "task"
    return {
        "name": name,
        "kind": {"task": "utility", "harmful": "safety", "harmless": "over_refusal"}[name],
        "metric": METRICS[name],
        "sizes": {"selection": SIZES[name], "confirmation": SIZES[name] - 1},
        "judge": "a-judge" if is_judged else None,
        "judge_is_weak": is_judged and is_weak,
    }


def _step(point: str, *, passes: bool | None) -> dict[str, Any]:
    return {
        "point": point,
        "lam": _point(point)["lam"],
        "utility": VALUES[point][0],
        "asr_difference": VALUES[point][1] - VALUES["base"][1],
        "upper_bound": VALUES[point][1] + 0.001,
        "passes": passes,
    }


def _score(point: str, tuned: str, name: str, split: str, index: int, unscored: int) -> dict[str, Any]:
    value = VALUES[point][list(SIZES).index(name)] + SHIFT * index
    missing = unscored if name != "task" else 0
    n = SIZES[name] - missing
    return {
        "model": point if point == "base" else f"{point}/{tuned}",
        "benchmark": name,
        "split": split,
        "metric": METRICS[name],
        "value": value,
        "numerator": value * n,
        "n": n,
        "n_effective": float(n),
        "low": value * 0.9,
        "high": min(1.0, value * 1.1),
        "unscored": missing,
        "value_if_unscored_0": value * n / SIZES[name],
        "value_if_unscored_1": (value * n + missing) / SIZES[name],
    }


def _summary(scores: Sequence[dict[str, Any]], points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for score in scores:
        groups.setdefault((score["model"].split("/")[0], score["benchmark"], score["split"]), []).append(score)
    by_name = {point["point"]: point for point in points}
    return [
        {
            **by_name[point],
            "benchmark": name,
            "split": split,
            "metric": METRICS[name],
            "mean": sum(score["value"] for score in group) / len(group),
            "spread": SHIFT / 2**0.5 if len(group) == 2 else None,
            "low": group[0]["low"],
            "high": group[-1]["high"],
            "lowest": group[0]["value"],
            "highest": group[-1]["value"],
            "num_models": len(group),
            "n": group[0]["n"],
            "unscored": sum(score["unscored"] for score in group),
        }
        for (point, name, split), group in groups.items()
    ]
