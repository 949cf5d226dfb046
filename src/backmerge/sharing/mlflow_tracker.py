"""MLflow: settings as parameters, figures and curves as metrics, files as artifacts; a curve's step is λ times 1000.

The destination is MLflow's own setting: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME; by default a local store.
"""

from __future__ import annotations

import os
from pathlib import Path

from backmerge.sharing.tracked import STEPS, Tracked
from backmerge.sharing.trackers import PROJECT

LONGEST = 500  # characters of a parameter that every store accepts


def log(what: Tracked, place: Path) -> str:
    """Write a run; return its place.

    Raises:
        ConnectionError: the store cannot be reached, or refuses.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT)
        with mlflow.start_run(run_name=what.name, tags={**what.findings}) as run:
            for name, value in what.settings.items():
                mlflow.log_param(name, str(value)[:LONGEST])
            mlflow.log_metrics(dict(what.figures))
            for curve in what.curves:
                for lam, figures in curve.points:
                    named = {f"{curve.name}/{key}": value for key, value in figures.items()}
                    mlflow.log_metrics(named, step=round(lam * STEPS))
            mlflow.log_artifacts(str(place))
            return f"run {run.info.run_id} in {mlflow.get_tracking_uri()}"
    except (MlflowException, OSError) as error:
        raise ConnectionError(str(error)) from error
