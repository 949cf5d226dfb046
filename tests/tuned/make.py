"""Tune the adapters in this folder, with the settings of the demonstration: `python tests/tuned/make.py`, a minute.

Tests that need a model which obeys load one instead of tuning it. The base's path is set when they are loaded.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from backmerge.config import load_yaml, validated
from backmerge.demo import EXPERIMENT
from backmerge.pipeline.tuning import tune_seeds
from backmerge.planning.prepare import prepare
from backmerge.planning.settings import Experiment

HERE = Path(__file__).parent


def main() -> None:
    """Write `seed-N` for each seed of the demonstration."""
    plan = prepare(validated(Experiment, load_yaml(EXPERIMENT)))
    settings = plan.experiment.finetune
    assert settings is not None
    with tempfile.TemporaryDirectory() as folder:
        places = {seed: Path(folder) / f"seed-{seed}" for seed in settings.seeds}
        tune_seeds(plan.base, "demo", settings, plan.training, places)
        for place in places.values():
            kept = HERE / place.name
            kept.mkdir(exist_ok=True)
            shutil.copy(place / "adapter_model.safetensors", kept)
            config = json.loads((place / "adapter_config.json").read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = "demo"
            (kept / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
