"""Weights & Biases: settings as its config, figures as its summary, curves over λ, the summary's rows as a table.

The destination is its own setting: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline. What it would collect itself (the
terminal, the code, the repository, the machine) is not sent.
"""

from __future__ import annotations

import os
from pathlib import Path

from backmerge.sharing.tracked import STEPS, Tracked, steps_of
from backmerge.sharing.trackers import PROJECT


def log(what: Tracked, place: Path) -> str:
    """Write a run; return its place.

    Raises:
        ConnectionError: it cannot be reached, or nobody is logged in.
    """
    import wandb

    quiet = wandb.Settings(
        console="off",
        save_code=False,
        disable_git=True,
        silent=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=what.name,
            config={**what.settings},
            job_type="backmerge",
            settings=quiet,
        )
        with run:
            run.define_metric("*", step_metric="lam")
            for step, values in steps_of(what).items():
                run.log({"lam": step / STEPS, **values}, step=step)
            columns = list(what.rows[0]) if what.rows else []
            run.log({"summary": wandb.Table(columns, [[row[name] for name in columns] for row in what.rows])})
            run.summary.update({**what.findings, **what.figures})
            report = wandb.Artifact(f"report-{run.id}", type="report")
            report.add_dir(str(place))
            run.log_artifact(report)
            return f"offline in {Path(run.dir).parent}; send it with `wandb sync`" if run.offline else str(run.url)
    except (wandb.Error, OSError) as error:
        raise ConnectionError(str(error)) from error
