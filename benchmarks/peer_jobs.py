"""Carries out many mergekit merges in one process, to pay for its imports once; run by mergekit's own interpreter.

Takes a JSON list of {"configuration": ..., "out": ...} on its standard input.
"""

import json
import sys

import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions


def main() -> None:
    """Carry out the jobs, each as mergekit-yaml would."""
    for job in json.load(sys.stdin):
        # through YAML, as a user's configuration comes
        configuration = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(job["configuration"])))
        run_merge(configuration, job["out"], options=MergeOptions(quiet=True))


if __name__ == "__main__":
    main()
