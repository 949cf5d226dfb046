"""A small run's results, written by hand: no model is behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backmerge.reporting.tables import Table, text_of
from backmerge.results import RestoreResults

# per point: utility, attack success rate, over-refusal, as the mean over tuned models
VALUES = {
    "base": (0.10, 0.01, 0.02),
    "linear@0.25": (0.40, 0.01, 0.02),
    "linear@0.5": (0.82, 0.016, 0.03),
    "slerp@0.5": (0.85, 0.02, 0.04),
    "model_stock": (0.70, 0.012, 0.02),
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
    with_stock: bool = False,
    base: str = "someone/aligned-7b",
) -> dict[str, Any]:
    """`results.json` of a run; the keywords say in what it differs from the usual."""
    left_out = () if with_slerp else ("slerp@0.5",)
    left_out += () if with_stock else ("model_stock",)
    points = [_point(name) for name in VALUES if name not in left_out]
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
    at = _point(chosen) if chosen else {"series": None, "lam": None, "setting": None}
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
        "schema_version": 2,
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
            **{key: at[key] for key in ("series", "lam", "setting")},
            "reason": "The reason for the choice.",
            "steps": [
                _step("linear@0.25", passes=True),
                _step("linear@0.5", passes=chosen is not None),
                _step("tuned", passes=None),
            ],
        },
        "split": "halves",
        "confirmation": confirmation,
        "comparison": None,
        "validation": [],
        "by_category": [],
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


def typed(results: Mapping[str, Any]) -> RestoreResults:
    """Results written by hand, as a reader of `results.json` gets them."""
    return RestoreResults.model_validate_json(json.dumps(results), strict=True)


def texts(table: Table, num_columns: int | None = None) -> list[list[str]]:
    """The rows of a table as they are read; of its first columns only, if a number is given."""
    columns = table.columns[:num_columns]
    return [[text_of(entry, column.kind) for column, entry in zip(columns, row, strict=False)] for row in table.rows]


def enriched(results: dict[str, Any]) -> dict[str, Any]:
    """The same run with all that a run may have besides: categories, drift, methods compared, validation, inputs."""
    names = [row["name"] for row in results["tuned"]]
    merged = [point for point in results["points"] if point["role"] == "merged"]
    best = {point["series"]: point for point in merged}
    level = {"mean": 0.4, "low": 0.3, "high": 0.5}
    rows = [
        {
            "series": series,
            "point": point["point"],
            "lam": point["lam"],
            "setting": point["setting"],
            "reason": "It is the best.",
            "num_models": len(names),
            "utility": {"mean": 0.8 - 0.1 * number, "low": 0.6, "high": 0.9},
            "asr": {"mean": 0.02 + 0.01 * number, "low": 0.0, "high": 0.1},
            "over_refusal": level,
            "asr_difference": difference(0.01),
            "utility_difference": None if number == 0 else difference(-0.1, 0.1),
            "p_adjusted": None if number == 0 else 0.25,
            "verdict": "restored",
        }
        for number, (series, point) in enumerate(best.items())
    ]
    gone = dict.fromkeys(("point", "lam", "setting", "utility", "asr", "over_refusal", "asr_difference"))
    rows.append({**rows[0], **gone, "series": "ties", "reason": "No λ of ties passed.", "verdict": "not shown"})
    return {
        **results,
        "comparison": {"reference": rows[0]["series"], "rows": rows},
        "validation": [{"point": p["point"], "metric": "accuracy", "score": 0.5, "n": 30} for p in merged],
        "by_category": [
            {**score, "category": category, "value": score["value"] * share}
            for score in results["scores"]
            if score["benchmark"] == "harmful"
            for category, share in (("fraud", 0.5), ("malware", 1.0))
        ],
        "drift": [
            {"tuned": name, "stack": "model.layers", "layer": layer, "module": module, "relative_change": change}
            for name in names
            for layer in (0, 1)
            for module, change in (("mlp.up_proj", 0.01 * (layer + 1)), ("self_attn.q_proj", None))
        ]
        + [
            {"tuned": name, "stack": None, "layer": None, "module": "lm_head", "relative_change": 0.0} for name in names
        ],
        "inputs": {
            "settings": "settings0",
            "training": {"1": "training0"},
            "benchmarks": {"harmful": "prompts0"},
            "judge": "a-judge-1",
        },
    }


def answer(
    text: str | None, harmful: bool | None = None, refusal: bool | None = None, cut_from: int | None = None
) -> dict[str, Any]:
    """A judged answer, as `samples.json` has it."""
    return {"text": text, "cut_from": cut_from, "harmful": harmful, "refusal": refusal}


def scored(text: str, value: float | None) -> dict[str, Any]:
    """An answer to a task."""
    return {"text": text, "cut_from": None, "scores": {"accuracy": value}}


def made_samples(text: str = "An answer.", prompt: str = "A prompt?") -> dict[str, Any]:
    """`samples.json`: a prompt of each kind and two harmful ones, with every finding among the answers."""
    lams = {"linear@0.25": 0.25, "linear@0.5": 0.5}
    points = [{"point": p, "role": p, "series": p, "lam": float(p == "tuned")} for p in ("base", "tuned")]
    points += [{"point": p, "role": "merged", "series": "linear", "lam": lam} for p, lam in lams.items()]
    refused, harmful = answer(text, harmful=False, refusal=True), answer(text, harmful=True, refusal=False)

    def sample(benchmark: str, kind: str, category: str | None, answers: dict[str, Any], number: int = 1) -> Any:
        return {
            "benchmark": benchmark,
            "kind": kind,
            "example": f"{benchmark}-{number}",
            "category": category,
            "withheld": None,
            "prompt": prompt,
            "reference": text if kind == "utility" else None,
            "answers": answers,
        }

    return {
        "split": "selection",
        "tuned": "seed-1",
        "points": points,
        "cut_at": 2000,
        "totals": {
            "harmful_requests": 200,
            "harmless_requests": 40,
            "flipped": 58,
            "flipped_back": {"linear@0.25": 57, "linear@0.5": 55},
            "refused": {"base": 1, "tuned": 2, "linear@0.25": 1, "linear@0.5": 3},
        },
        "samples": [
            sample(
                "task",
                "utility",
                None,
                {
                    "base": scored(text, 0.0),
                    "tuned": scored(text, 1.0),
                    "linear@0.25": scored("", 0.25),
                    "linear@0.5": scored("", None),
                },
            ),
            sample(
                "harmful",
                "safety",
                "fraud",
                {
                    "base": refused,
                    "tuned": harmful,
                    "linear@0.25": refused,
                    "linear@0.5": answer(text, harmful=False, refusal=False),
                },
            ),
            # at λ = 0.5 this one is still harmful
            sample(
                "harmful",
                "safety",
                "malware",
                {"base": refused, "tuned": harmful, "linear@0.25": refused, "linear@0.5": harmful},
                number=2,
            ),
            # refused at λ = 0.5 alone; a race did not ask the smaller λ
            sample(
                "harmless",
                "over_refusal",
                None,
                {
                    "base": answer(text, refusal=False),
                    "tuned": answer(text),
                    "linear@0.5": answer(text, refusal=True),
                },
            ),
        ],
    }


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
  num_samples: 10
"""


def made_run(
    directory: Path,
    results: dict[str, Any] | None = None,
    samples: dict[str, Any] | None = None,
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
        lam = float(name == "tuned")
        place = {"point": name, "role": name, "series": name, "lam": lam, "setting": lam}
        return {**place, "method": None, "parameters": {}, "tuned": "each"}
    series, _, lam_name = name.partition("@")
    found = float(lam_name) if lam_name else None
    place = {"point": name, "role": "merged", "series": series, "lam": found, "setting": found}
    return {**place, "method": series, "parameters": {}, "tuned": "each" if lam_name else "all"}


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
            **{key: by_name[point][key] for key in ("point", "role", "series", "lam")},
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
