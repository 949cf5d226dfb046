"""The embedded tiny aligned model, its language, and the experiment that shows the method on it."""

from pathlib import Path
from typing import NamedTuple


class Demonstration(NamedTuple):
    """An experiment that ships with the package.

    Attributes:
        file: The experiment file.
        fast: The settings that `--fast` changes, as `--set` options.
        has_harmful_requests: Whether harmful requests ship with it too.
    """

    file: Path
    fast: tuple[str, ...]
    has_harmful_requests: bool


EXPERIMENT = Path(__file__).with_name("experiment.yaml")
DEMONSTRATIONS = {
    "tiny": Demonstration(EXPERIMENT, ("finetune.seeds=[42]", "merge.0.lam=[0.3, 0.5]"), has_harmful_requests=True),
    "smollm2": Demonstration(
        Path(__file__).with_name("smollm2") / "experiment.yaml",
        ("finetune.steps=40", "evaluate.limit=60", "merge.0.lam=[0.2, 0.3]", "merge.1.lam=[0.25, 0.5]"),
        has_harmful_requests=False,
    ),
}


def model_directory() -> Path:
    """The embedded model's folder, a normal Hugging Face directory."""
    return Path(__file__).with_name("model")
