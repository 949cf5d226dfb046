"""A large run's report is still a page that a phone opens: under 3 MB, and drawn whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from backmerge.pipeline.samples import MOST_TEXT
from backmerge.reporting.report import read_run, rendered

from .synthetic import answer, difference, made_results, made_run, made_samples

METHODS = ("linear", "slerp", "dare")
LAMS = tuple(number / 10 for number in range(1, 10))
SEEDS = ("seed-42", "seed-1024", "seed-48763")
BENCHMARKS = {
    "bbh": ("utility", "accuracy"),
    "advbench": ("safety", "asr"),
    "hexphi": ("safety", "asr"),
    "xstest": ("over_refusal", "over_refusal"),
}
NUM_CATEGORIES, NUM_LAYERS, NUM_MODULES, NUM_PROMPTS, NUM_STEPS = 11, 32, 9, 40, 1500
LIMIT = 3_000_000  # bytes


def large_results() -> dict[str, Any]:
    """Three methods at nine λs from three seeds on four benchmarks, one metric more each, eleven categories."""
    points = [_point("base", "base", "base", 0.0), _point("tuned", "tuned", "tuned", 1.0)]
    points += [_point(f"{name}@{lam:g}", "merged", name, lam) for name in METHODS for lam in LAMS]
    kinds = {name: kind for name, (kind, _) in BENCHMARKS.items()}
    metrics = {name: metric for name, (_, metric) in BENCHMARKS.items()}
    scores, summary, categories = [], [], []
    for point in points:
        for name, metric in metrics.items():
            for split in ("selection", "confirmation"):
                value = 0.123456789 + 0.3 * point["lam"]
                level = {"low": value - 0.0987654321, "high": value + 0.0987654321, "n": 1234, "unscored": 3}
                place = {key: point[key] for key in ("point", "role", "series", "lam")}
                for shown in (metric, f"second_{metric}"):
                    more = {"mean": value, "spread": 0.0123, "lowest": value, "highest": value, "num_models": 3}
                    summary.append({**place, "benchmark": name, "split": split, "metric": shown, **more, **level})
                for seed in SEEDS:
                    model = point["point"] if point["role"] == "base" else f"{point['point']}/{seed}"
                    row = {"model": model, "benchmark": name, "split": split, "metric": metric, "value": value, **level}
                    row |= dict.fromkeys(("numerator", "value_if_unscored_0", "value_if_unscored_1"), value)
                    row["n_effective"] = 1234.0
                    scores.append(row)
                    categories += [{**row, "category": f"a kind of harm, {n}"} for n in range(NUM_CATEGORIES)]
    usual = made_results()
    return {
        **usual,
        "points": points,
        "tuned": [{"name": seed, "kind": "adapter", "fingerprint": f"print-of-{seed}"} for seed in SEEDS],
        "benchmarks": [
            {
                "name": name,
                "kind": kinds[name],
                "metric": metric,
                "sizes": {"selection": 1234, "confirmation": 1234},
                "judge": "wildguard",
                "judge_is_weak": False,
            }
            for name, metric in metrics.items()
        ],
        "choice": {
            **usual["choice"],
            "point": "linear@0.4",
            "lam": 0.4,
            "setting": 0.4,
            "steps": [
                {"point": p["point"], "lam": p["lam"], "utility": 0.5, "asr_difference": 0.1}
                | {"upper_bound": 0.2, "passes": None}
                for p in points
            ],
        },
        "confirmation": {
            **usual["confirmation"],
            "models": [{"tuned": seed, "verdict": "restored", "asr_difference": difference(0.01)} for seed in SEEDS],
        },
        "merged": [],
        "scores": scores,
        "summary": summary,
        "by_category": categories,
        "drift": [
            {"tuned": seed, "stack": "model.layers", "layer": layer, "module": f"mlp.m_{n}", "relative_change": 0.0123}
            for seed in SEEDS
            for layer in range(NUM_LAYERS)
            for n in range(NUM_MODULES)
        ],
    }  # fmt: skip


def _point(name: str, role: str, series: str, lam: float) -> dict[str, Any]:
    return {"point": name, "role": role, "series": series, "lam": lam, "setting": lam, "method": series}


def large_samples(results: dict[str, Any], sign: str) -> dict[str, Any]:
    """As many different characters of text as are ever kept."""
    points = results["points"]
    length = MOST_TEXT // (NUM_PROMPTS * len(points))
    prompt = made_samples()["samples"][1]

    def text(number: int, place: int) -> str:
        return f"{number} {place} ".ljust(length, sign)

    return {
        **made_samples(),
        "points": [{key: p[key] for key in ("point", "role", "series", "lam")} for p in points],
        "cut_at": length,
        "totals": {
            "harmful_requests": 1234,
            "harmless_requests": 250,
            "flipped": 500,
            "flipped_back": {p["point"]: 400 for p in points},
            "refused": {p["point"]: 4 for p in points},
        },
        "samples": [
            {
                **prompt,
                "example": f"hexphi-{number}",
                "answers": {
                    p["point"]: answer(text(number, place), harmful=place > 20, refusal=False, cut_from=5000)
                    for place, p in enumerate(points)
                },
            }
            for number in range(NUM_PROMPTS)
        ],
    }


@pytest.mark.parametrize("sign", ["x", "字", "\U0001f9ea", "\n"], ids=["one byte", "three", "four", "line ends"])
def test_a_large_run_has_a_small_page(tmp_path: Path, sign: str) -> None:
    """Whatever the models' alphabet, the page stays under 3 MB, with every recipe and category in it."""
    results = large_results()
    run = made_run(tmp_path / "run", results, large_samples(results, sign))
    for seed in SEEDS:
        losses = [{"step": step, "loss": 1 / step + 0.1 * (step % 7)} for step in range(1, NUM_STEPS)]
        (run / "tuned" / seed / "loss.jsonl").write_text("".join(json.dumps(loss) + "\n" for loss in losses))
    page = rendered(read_run(run))
    assert len(page.encode()) < LIMIT
    assert page.count('class="spot"') == 2 + len(METHODS) * len(LAMS)
    # four benchmarks with categories, and the layers
    assert page.count('<table class="map') == 5
    assert page.count('style="--share') == 4 * NUM_CATEGORIES * (2 + len(METHODS) * len(LAMS))
