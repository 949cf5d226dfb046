"""`backmerge schema`: the JSON schema of experiment files."""

from __future__ import annotations

import typer


def schema() -> None:
    """Print the JSON schema of experiment files, every key with its meaning; editors can use it.

    Example: backmerge schema > experiment.schema.json
    """
    import json

    from backmerge.planning.settings import Experiment

    typer.echo(json.dumps(Experiment.model_json_schema(), indent=2))
